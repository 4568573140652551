"""vmap(fallback="loop"): functions that branch on data, under every transform, on either side of vmap."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import dropout

import autodiff as ad
from scenarios import assert_close

F64 = torch.float64
XS = torch.tensor([[0.5, -1, 2], [-3, 1, 0.5], [1, 1, 1], [-0.1, -0.2, -0.3]], dtype=F64)
W = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
T = torch.tensor([0.25, 1.0, -3.0], dtype=F64)
POSITIVE = (XS.sum(1) > 0)[:, None]


def branching(x: Tensor, w: Tensor = W) -> Tensor:
    """sum w x^3 where the sum of x is positive, sum w x^2 elsewhere."""
    return (w * x**3).sum() if x.sum() > 0 else (w * x**2).sum()


def reading(x: Tensor, w: Tensor = W) -> Tensor:
    """The same, by .item()."""
    return (w * x ** (3 if x.sum().item() > 0 else 2)).sum()


BY_W = torch.where(POSITIVE, XS**3, XS**2)
VALUES = (W * BY_W).sum(1)
GRADIENTS = torch.where(POSITIVE, 3 * W * XS**2, 2 * W * XS)
HESSIANS = torch.diag_embed(torch.where(POSITIVE, 6 * W * XS, 2 * W))

loop = partial(ad.vmap, fallback="loop")
each = pytest.mark.parametrize("func", [branching, reading], ids=lambda f: f.__name__)
in_chunks = pytest.mark.parametrize("chunk_size", [None, 1, 3, "auto"])
HESSIAN_MODES = ["auto", "forward-over-reverse", "reverse-over-forward", "forward-over-forward"]
FIRST = {
    "grad": ad.grad,
    "jacrev": ad.jacrev,
    "jacfwd": ad.jacfwd,
    "jacobian": ad.jacobian,
    "torch.func.grad": torch.func.grad,
    "torch.func.jacfwd": torch.func.jacfwd,
}


@each
@in_chunks
@pytest.mark.parametrize("derive", FIRST.values(), ids=FIRST)
def test_first_derivatives_of_each_sample(derive: Any, chunk_size: Any, func: Any) -> None:
    assert_close(loop(derive(func), chunk_size=chunk_size)(XS), GRADIENTS)


@each
@in_chunks
@pytest.mark.parametrize("rows", [None, 1, 2])
@pytest.mark.parametrize("mode", HESSIAN_MODES)
def test_hessians_of_each_sample(mode: Any, rows: Any, chunk_size: Any, func: Any) -> None:
    hessian = ad.hessian(func, mode=mode, chunk_size=rows)
    assert_close(loop(hessian, chunk_size=chunk_size)(XS), HESSIANS)


@each
def test_products_and_values_of_each_sample(func: Any) -> None:
    assert_close(loop(ad.value_and_grad(func))(XS), (VALUES, GRADIENTS))
    assert_close(loop(lambda x: ad.jvp(func, (x,), (T,)))(XS), (VALUES, GRADIENTS @ T))
    assert_close(loop(lambda x: ad.vjp(func, x)[1](torch.ones((), dtype=F64)))(XS), (GRADIENTS,))
    assert_close(loop(lambda x: ad.hvp(func, (x,), (T,)))(XS), (VALUES, HESSIANS @ T))
    assert_close(loop(ad.hessian_diagonal(func))(XS), HESSIANS.diagonal(dim1=1, dim2=2))
    with_aux = ad.grad(lambda x: (func(x), {"sum": x.sum(), "note": "text"}), has_aux=True)
    assert_close(loop(with_aux)(XS), (GRADIENTS, {"sum": XS.sum(1), "note": "text"}))


@pytest.mark.parametrize(
    ("in_dims", "args", "kwargs"),
    [
        ((1, None), (XS.T, W), {}),
        ({"x": 1}, (XS.T,), {"w": W}),
        ({"x": 1, "w": 0}, (XS.T,), {"w": W.expand(4, 3)}),
        ({"w": -1, "x": -1}, (), {"x": XS.T, "w": W.expand(4, 3).T}),
    ],
)
@pytest.mark.parametrize("out_dim", [0, 1, -1])
@in_chunks
def test_dims_by_position_and_by_name(
    in_dims: Any, args: Any, kwargs: Any, out_dim: int, chunk_size: Any
) -> None:
    by_x = partial(loop, in_dims=in_dims, out_dims=out_dim, chunk_size=chunk_size)
    gradients = by_x(ad.grad(branching, argnums="x"))(*args, **kwargs)
    assert_close(gradients, GRADIENTS.movedim(0, out_dim).contiguous())
    hessians = by_x(ad.hessian(branching, argnums="x"))(*args, **kwargs)
    assert_close(hessians, HESSIANS.movedim(0, out_dim).contiguous())


OF_W = {
    "grad": lambda f: ad.grad(lambda w: f(w).sum())(W),
    "torch.func.grad": lambda f: torch.func.grad(lambda w: f(w).sum())(W),
    "value_and_grad": lambda f: ad.value_and_grad(lambda w: f(w).sum())(W)[1],
    "vjp": lambda f: ad.vjp(f, W)[1](torch.ones(4, dtype=F64))[0],
    "jacrev": lambda f: ad.jacrev(f)(W).sum(0),
    "jacfwd": lambda f: ad.jacfwd(f)(W).sum(0),
    "jacobian": lambda f: ad.jacobian(f)(W).sum(0),
}


@each
@in_chunks
@pytest.mark.parametrize("derive", OF_W.values(), ids=OF_W)
def test_the_loop_is_differentiated(derive: Any, chunk_size: Any, func: Any) -> None:
    losses = lambda w: loop(func, in_dims=(0, None), chunk_size=chunk_size)(XS, w)
    assert_close(derive(losses), BY_W.sum(0))


@each
def test_the_loop_is_pushed_forward(func: Any) -> None:
    losses = lambda w: loop(func, in_dims=(0, None))(XS, w)
    assert_close(ad.jvp(losses, (W,), (T,)), (VALUES, BY_W @ T))
    assert_close(ad.linearize(losses, W)[1](T), BY_W @ T)
    assert_close(ad.jvp(loop(func), (XS,), (XS,))[1], (GRADIENTS * XS).sum(1))


@each
@pytest.mark.parametrize("mode", HESSIAN_MODES)
def test_the_loop_is_differentiated_twice(mode: Any, func: Any) -> None:
    loss = lambda w: loop(func, in_dims=(0, None))(XS, w**2).sum()
    assert_close(ad.hessian(loss, mode=mode)(W), torch.diag(2 * BY_W.sum(0)))
    expected = torch.einsum("nij,nm->nimj", HESSIANS, torch.eye(4, dtype=F64))
    assert_close(ad.hessian(lambda xs: loop(func)(xs).sum(), mode=mode)(XS), expected)


@each
def test_gradients_of_each_sample_are_differentiated(func: Any) -> None:
    """vmap(grad) inside grad: the gradients are linear in w."""
    total = lambda w: (loop(ad.grad(func), in_dims=(0, None))(XS, w) * T).sum()
    assert_close(ad.grad(total)(W), (GRADIENTS / W * T).sum(0))
    assert_close(ad.grad(lambda xs: (loop(ad.grad(func))(xs) * T).sum())(XS), HESSIANS @ T)


@each
@in_chunks
def test_captured_parameter_that_requires_grad(chunk_size: Any, func: Any) -> None:
    w = W.clone().requires_grad_()
    total = loop(lambda x: func(x, w), chunk_size=chunk_size)(XS).sum()
    assert_close(torch.autograd.grad(total, w)[0], BY_W.sum(0))
    gradients = loop(ad.grad(lambda x: func(x, w)), chunk_size=chunk_size)(XS)
    assert_close(torch.autograd.grad((gradients * T).sum(), w)[0], (GRADIENTS / W * T).sum(0))
    scaled = lambda s: loop(lambda x: func(x * s, w), chunk_size=chunk_size)(XS).sum()
    by_scale = ad.grad(scaled)(torch.ones(3, dtype=F64))
    assert_close(by_scale.detach(), (GRADIENTS * XS).sum(0))
    assert_close(torch.autograd.grad(by_scale @ T, w)[0], (GRADIENTS / W * XS).sum(0) * T)


def test_shared_output_of_a_differentiated_loop() -> None:
    def losses(w: Tensor) -> Tensor:
        values, shared = loop(lambda x, w: (branching(x, w), w.sin()), (0, None), (0, None))(XS, w)
        return values.sum() + shared.sum()

    assert_close(ad.grad(losses)(W), BY_W.sum(0) + W.cos())
    assert_close(ad.jvp(losses, (W,), (T,))[1], (BY_W.sum(0) + W.cos()) @ T)


def test_module_and_keywords() -> None:
    class Gate(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(W.clone())

        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            return scale * branching(x, self.w)

    module, scale = Gate(), torch.arange(1.0, 5, dtype=F64)
    run = lambda params, x, scale: ad.functional_call(module, params, (x,), {"scale": scale})
    params = {"w": W}
    gradients = loop(ad.grad(run), in_dims={"x": 0, "scale": 0})(params, XS, scale=scale)
    assert_close(gradients, {"w": BY_W * scale[:, None]})
    values = loop(module, in_dims={"x": 0, "scale": 0})(XS, scale=scale)
    assert_close(values.detach(), VALUES * scale)


def test_a_loop_inside_a_vmap_needs_the_outer_one_to_loop_too() -> None:
    inner, both = loop(branching), torch.stack([XS, 2 * XS])
    with pytest.raises(RuntimeError, match="data-dependent control flow"):
        ad.vmap(inner)(both)
    expected = torch.stack([torch.stack([branching(x) for x in xs]) for xs in both])
    assert_close(loop(inner)(both), expected)
    # What the outer one batches is not what the function branches on.
    ws = torch.stack([W, 3 * W])
    values = ad.vmap(loop(branching, in_dims=(0, None)), in_dims=(None, 0))(XS, ws)
    assert_close(values, torch.stack([VALUES, 3 * VALUES]))


RANDOM = {
    "value": lambda f: f,
    "grad": lambda f: ad.grad(lambda x: f(x).sum()),
    "jacfwd": ad.jacfwd,
    "hessian": lambda f: ad.hessian(lambda x: (f(x) ** 2).sum()),
    "forward": lambda f: ad.hessian(lambda x: (f(x) ** 2).sum(), mode="forward-over-forward"),
}


def drawing(x: Tensor) -> Tensor:
    return dropout(x, 0.5) * (2 if x.sum() > 0 else 1)


@in_chunks
@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("derive", RANDOM.values(), ids=RANDOM)
def test_random_numbers_are_those_of_a_plain_loop(derive: Any, randomness: Any, chunk_size: Any) -> None:
    """The generator ends where a plain loop ends, and with "same" where one run ends."""
    xs = torch.ones(4, 6, dtype=F64)
    torch.manual_seed(3)
    came = loop(derive(drawing), randomness=randomness, chunk_size=chunk_size)(xs)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    first = derive(drawing)(xs[0])
    if randomness == "same":
        expected = torch.stack([first] * 4)
    else:
        expected = torch.stack([first, *[derive(drawing)(x) for x in xs[1:]]])
        assert not torch.equal(expected[0], expected[1])
    assert torch.equal(came, expected)
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("func", [drawing, dropout], ids=["branching", "random alone"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_random_numbers_are_refused_by_default(func: Any, chunk_size: Any) -> None:
    before = torch.get_rng_state()
    with pytest.raises(
        ad.errors.RandomnessError, match=r"vmap: called random operation .* randomness='same'"
    ):
        loop(func, chunk_size=chunk_size)(torch.ones(4, 6))
    assert torch.equal(before, torch.get_rng_state())


def test_error_in_the_loop_leaves_nothing_behind() -> None:
    def failing(x: Tensor) -> Tensor:
        if x.sum() > 0:
            raise KeyError("mine")
        return x.sum()

    for derive in (ad.grad, ad.jacfwd, ad.hessian):
        with pytest.raises(KeyError, match="mine"):
            ad.grad(lambda xs: loop(derive(failing))(xs).sum())(XS)  # noqa: B023
        assert_close(ad.grad(torch.sum)(XS), torch.ones_like(XS))
        assert_close(ad.vmap(torch.sum)(XS), XS.sum(1))
        assert not XS.requires_grad
