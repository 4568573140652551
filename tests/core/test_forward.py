"""Forward mode: one level per process, entered and left by us, and None for what carries no tangent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import autodiff as ad
from autodiff.core.forward import push
from every_transform import T, X
from scenarios import assert_close


def test_output_without_tangent_is_none() -> None:
    pushed = push(lambda inputs, _: ([inputs[0].sin(), torch.ones(2), "text"], [inputs[0], 3]), [X], [T])
    assert_close(pushed.outputs, [X.sin(), torch.ones(2), "text"])
    assert_close(pushed.tangents, [T * X.cos(), None, None])
    assert_close(pushed.aux, [X, 3])


def test_levels_are_open_only_while_the_function_runs() -> None:
    seen = []

    def func(x: Tensor) -> Tensor:
        seen.append(forward_ad._current_level + 1)
        return x.sin()

    ad.jvp(func, (X,), (T,))
    ad.jvp(lambda x: ad.jvp(func, (x,), (T,))[1], (X,), (T,))
    assert seen == [1, 1]
    assert forward_ad._current_level + 1 == 0


@pytest.mark.parametrize("library", [ad, torch.func], ids=lambda m: m.__name__)
def test_torch_func_jvp_inside_and_outside_shares_the_level(library: object) -> None:
    other = torch.func if library is ad else ad

    def slope(x: Tensor) -> Tensor:
        return other.jvp(lambda x: x**3, (x,), (T,))[1]

    _, second = library.jvp(slope, (X,), (T,))
    assert_close(second, 6 * X * T * T)


def test_users_own_level_is_left_open() -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, T)
        ad.jvp(torch.sin, (X,), (T,))
        ad.jacfwd(torch.sin)(X)
        assert forward_ad.unpack_dual(dual.sin()).tangent is not None
        assert forward_ad._current_level + 1 == 1


def test_users_dual_tensor_passes_through_a_gradient() -> None:
    """Forward over reverse, with the outer forward level the user's own."""
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, T)
        result = ad.grad(lambda x: (x**3).sum())(dual)
        tangent = forward_ad.unpack_dual(result).tangent
    assert_close(tangent, 6 * X * T)


def test_captured_dual_is_seen_by_an_inner_gradient_of_something_else() -> None:
    def func(x: Tensor) -> Tensor:
        return ad.grad(lambda y: (y * x**2).sum())(T)

    _, tangent = ad.jvp(func, (X,), (T,))
    assert_close(tangent, 2 * X * T)


def test_perturbations_of_nested_levels_are_not_confused() -> None:
    """d/dx [x d/dy (x + y)] = 1, the classic test of Siskind and Pearlmutter."""
    one = torch.ones((), dtype=torch.float64)

    def by_jvp(f: object, x: Tensor) -> Tensor:
        return ad.jvp(f, (x,), (torch.ones_like(x),))[1]

    for outer in (by_jvp, lambda f, x: ad.grad(f)(x)):
        for inner in (by_jvp, lambda f, x: ad.grad(f)(x)):
            result = outer(lambda x, inner=inner: x * inner(lambda y: x + y, one), one)
            assert result.item() == 1


def test_input_may_be_returned_as_output_and_aux() -> None:
    out, tangent, aux = ad.jvp(lambda x: (x, x), (X,), (T,), has_aux=True)
    assert_close((out, tangent, aux), (X, T, X))
    # No dual survives in what came back.
    with forward_ad.dual_level():
        assert forward_ad.unpack_dual(aux).tangent is None


def test_same_tensor_as_primal_and_tangent() -> None:
    assert_close(ad.jvp(torch.sin, (X,), (X,))[1], X * X.cos())


def test_expanded_primal() -> None:
    """Torch lays a tangent out like its primal, and cannot write where elements share memory."""
    x, t = X.expand(2, 3), torch.stack([T, X])
    assert_close(ad.jvp(torch.sin, (x,), (t,))[1], t * X.cos())
    assert_close(ad.jacfwd(lambda x: (x[0] ** 2 * x[1]).sum())(x), torch.stack([2 * X**2, X**2]))


def test_expanded_tangent() -> None:
    tangent = torch.ones((), dtype=torch.float64).expand(3)
    assert_close(ad.jvp(torch.sin, (X,), (tangent,))[1], X.cos())


@pytest.mark.parametrize(
    "overlapping",
    [X.unfold(0, 2, 1), X.expand(2, 3), X.as_strided((2, 2), (1, 1)), X.new_ones(2, 1).expand(2, 3)],
    ids=["unfold", "expand", "as_strided", "broadcast"],
)
@pytest.mark.parametrize(
    "derivative", [ad.jacfwd, lambda f: ad.hessian(f, mode="forward-over-reverse"), ad.jacrev]
)
def test_elements_that_share_memory_have_tangents_of_their_own(
    overlapping: Tensor, derivative: object
) -> None:
    def func(x: Tensor) -> Tensor:
        return (x.sin() * x**2).sum()

    actual = derivative(func)(overlapping)  # type: ignore[operator]
    assert_close(actual, derivative(func)(overlapping.clone()))  # type: ignore[operator]
    tangent = torch.linspace(-1, 1, overlapping.numel(), dtype=X.dtype).reshape(overlapping.shape)
    pushed = ad.jvp(torch.sin, (overlapping,), (tangent,))[1]
    assert_close(pushed, overlapping.cos() * tangent)
    samples = overlapping.expand(2, *overlapping.shape)
    assert_close(ad.vmap(lambda x: ad.jvp(torch.sin, (x,), (tangent,))[1])(samples)[1], pushed)
