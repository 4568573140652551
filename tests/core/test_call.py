"""One call, lifted: argnums by number and name, keywords, signatures, aux."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autodiff as ad
from autodiff.core.call import Call, is_differentiable, parameter_names
from scenarios import assert_close

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
Y = torch.tensor([3.0, 0.25, -2.0], dtype=torch.float64)

TRANSFORMS = [ad.grad, ad.jacrev, ad.jacfwd, ad.jacobian]


def product(x: Tensor, y: Tensor = Y, *rest: Tensor, scale: Any = 1, **more: Tensor) -> Tensor:
    total = (x * x * y).sum() * scale
    return total + sum(r.sum() for r in rest) + sum((m**2).sum() for m in more.values())


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("argnums", "args", "kwargs", "expected"),
    [
        (0, (X,), {}, 2 * X * Y),
        (0, (X,), {"scale": 3}, 6 * X * Y),
        (0, (), {"x": X}, 2 * X * Y),
        (1, (X,), {"y": Y}, X * X),
        ("x", (X, Y), {}, 2 * X * Y),
        ("y", (X, Y), {"scale": 2}, 2 * X * X),
        (2, (X, Y, Y), {}, torch.ones_like(Y)),
        (-1, (X, Y, Y), {}, torch.ones_like(Y)),
        ("extra", (X, Y), {"extra": Y}, 2 * Y),
        (("extra", 0), (X, Y), {"extra": Y}, (2 * Y, 2 * X * Y)),
        (("y", "x"), (), {"x": X, "y": Y}, (X * X, 2 * X * Y)),
    ],
)
def test_selected_arguments(transform: Any, argnums: Any, args: Any, kwargs: Any, expected: Any) -> None:
    assert_close(transform(product, argnums=argnums)(*args, **kwargs), expected)


class Scaled(nn.Module):
    def forward(self, x: Tensor, power: Tensor) -> Tensor:
        return (x.abs() ** power).sum()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_name_of_a_parameter_of_a_modules_forward(transform: Any) -> None:
    power = torch.tensor(2.0, dtype=torch.float64)
    assert_close(transform(Scaled(), argnums="power")(X, power), (X**2 * X.abs().log()).sum())


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_name_of_a_parameter_of_a_method_and_a_partial(transform: Any) -> None:
    class Owner:
        def method(self, x: Tensor, y: Tensor) -> Tensor:
            return (x * y).sum()

    assert_close(transform(Owner().method, argnums="y")(X, Y), X)
    assert_close(transform(functools.partial(product, scale=2), argnums="y")(X, Y), 2 * X * X)


def test_builtin_without_a_signature_takes_numbers() -> None:
    assert_close(ad.grad(torch.dot, argnums=1)(X, Y), X)
    assert parameter_names(torch.dot) == []


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        (X, True),
        (torch.ones(1, dtype=torch.complex64), True),
        (torch.ones(1, dtype=torch.bfloat16), True),
        (torch.ones(1, dtype=torch.int64), False),
        (torch.ones(1, dtype=torch.bool), False),
        (1.0, False),
        (None, False),
    ],
)
def test_differentiable_leaves(leaf: Any, expected: bool) -> None:
    assert is_differentiable(leaf) is expected


def test_call_lifts_every_other_tensor() -> None:
    lifted = []

    def lift(tensor: Tensor) -> Tensor:
        lifted.append(tensor)
        return tensor * 1

    index, other, keyword = torch.tensor([0, 1]), Y * 2, Y * 3
    call = Call(
        "grad",
        lambda p, o, *, k: (p["x"] * o * k).sum(),
        ({"x": X, "i": index}, other),
        {"k": keyword},
        0,
        has_aux=False,
    )
    (output,), aux = call.evaluate([X], lift)
    assert_close(output, (X * other * keyword).sum())
    assert aux == []
    assert {id(t) for t in lifted} >= {id(index), id(other), id(keyword)}


def test_unselected_arguments_are_left_alone() -> None:
    class Opaque:
        pass

    opaque = Opaque()

    def func(x: Tensor, thing: Any, *, other: Any) -> Tensor:
        assert thing is opaque
        assert other == {"set": {1, 2}}
        return (x**2).sum()

    for transform in TRANSFORMS:
        assert_close(transform(func)(X, opaque, other={"set": {1, 2}}), 2 * X)


def test_watched_unselected_argument_keeps_its_gradient() -> None:
    y = Y.clone().requires_grad_()
    for transform in TRANSFORMS:
        (by_y,) = torch.autograd.grad(transform(product)(X, y).sum(), y)
        assert_close(by_y, 2 * X)


@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("name", ["grad", "jacrev", "jacobian", "hessian"])
def test_refused_write_to_an_argument_tells_the_way_out_once(name: str, tracked: bool) -> None:
    x = X.clone().requires_grad_(tracked)
    with pytest.raises(RuntimeError, match="requires grad is being used in an in-place operation") as raised:
        getattr(ad, name)(lambda x: product(x.mul_(2)))(x)
    (note,) = raised.value.__notes__
    assert note.startswith(f"{name}: the function writes in place to an argument that is differentiated.")
    assert "Write to a clone" in note
    assert_close(x.detach(), X)


def test_same_tensor_in_two_places_is_two_inputs() -> None:
    result = ad.grad(lambda p: (p["a"] * p["b"] ** 2).sum())({"a": X, "b": X})
    assert_close(result, {"a": X**2, "b": 2 * X * X})
    assert_close(ad.grad(lambda a, b: (a * b**2).sum(), argnums=(0, 1))(X, X), (X**2, 2 * X * X))


def test_default_arguments_count() -> None:
    def func(x: Tensor, power: int = 3) -> Tensor:
        return (x**power).sum()

    assert_close(ad.grad(func)(X), 3 * X**2)
    assert_close(ad.grad(func)(X, power=2), 2 * X)


# wrt: leaves by patterns of their places.

TREE = {
    "0.weight": torch.tensor([1.0, 2.0]),
    "0.bias": torch.tensor(3.0),
    "last": [torch.tensor(4.0), 5, "name"],
}


def of_leaves(tree: Any, scale: float = 1.0) -> torch.Tensor:
    return tree["0.weight"].prod() * tree["0.bias"] ** 2 * tree["last"][0] * scale


@pytest.mark.parametrize(
    ("wrt", "picked"),
    [
        ("0.*", {"0.weight", "0.bias"}),
        ("*bias", {"0.bias"}),
        ("last.0", {"last"}),
        (("last.*", "*.weight"), {"last", "0.weight"}),
        ("*", {"0.weight", "0.bias", "last"}),
    ],
)
def test_wrt_picks_leaves_by_their_places(wrt: Any, picked: set[str]) -> None:
    gradient = ad.grad(of_leaves, wrt=wrt)(TREE)
    expected = {
        "0.weight": torch.tensor([72.0, 36.0]),
        "0.bias": torch.tensor(48.0),
        "last": torch.tensor(18.0),
    }
    came = {**gradient, "last": gradient["last"][0]}
    assert gradient["last"][1:] == [None, None]
    for name, value in came.items():
        if name in picked:
            assert torch.equal(value, expected[name])
        else:
            assert value is None


@pytest.mark.parametrize(
    "transform", [ad.value_and_grad, ad.grad_and_value, ad.jacrev, ad.jacfwd, ad.jacobian]
)
def test_wrt_is_the_same_everywhere(transform: Any) -> None:
    result = transform(of_leaves, wrt="0.bias")(TREE)
    gradient = {ad.value_and_grad: lambda r: r[1], ad.grad_and_value: lambda r: r[0]}.get(
        transform, lambda r: r
    )(result)
    assert torch.equal(gradient["0.bias"], torch.tensor(48.0))
    assert gradient["0.weight"] is None


@pytest.mark.parametrize(
    "mode", ["auto", "forward-over-reverse", "reverse-over-forward", "forward-over-forward"]
)
def test_wrt_of_a_hessian_gives_its_block(mode: Any) -> None:
    result = ad.hessian(of_leaves, wrt=("0.weight", "last.0"), mode=mode)(TREE)
    matrix = ad.pytree.to_matrix(result, TREE)
    expected = torch.tensor([[0.0, 36.0, 18.0], [36.0, 0.0, 9.0], [18.0, 9.0, 0.0]])
    torch.testing.assert_close(matrix, expected)
    assert result["0.bias"] is None
    assert result["0.weight"]["0.bias"] is None


def test_wrt_reaches_into_every_selected_argument() -> None:
    func = lambda p, q: (p["a"] * p["b"]) * (q["a"] * q["b"])
    p, q = ({"a": torch.tensor(a), "b": torch.tensor(b)} for a, b in ((2.0, 3.0), (5.0, 7.0)))
    one, other = ad.grad(func, argnums=(0, 1), wrt="b")(p, q)
    assert (one["a"], other["a"]) == (None, None)
    assert (one["b"], other["b"]) == (2 * 35, 6 * 5)
    # A pattern that only one of them has.
    one, other = ad.grad(func, argnums=("p", "q"), wrt=("a",))(p, {**q, "c": torch.ones(())})
    assert (one["b"], other["c"]) == (None, None)
    # A leaf that is the argument itself has the empty place.
    assert ad.grad(lambda x: x**2, wrt="*")(torch.tensor(3.0)) == 6


def test_leaves_that_wrt_leaves_out_stay_connected() -> None:
    bias = torch.tensor(3.0, requires_grad=True)
    gradient = ad.grad(of_leaves, wrt="0.weight")({**TREE, "0.bias": bias})
    (mixed,) = torch.autograd.grad(gradient["0.weight"][0], bias)
    assert mixed == 2 * 2 * 3 * 4
    inner = lambda w: ad.grad(of_leaves, wrt="0.bias")({**TREE, "0.weight": w})["0.bias"]
    assert torch.equal(ad.grad(inner)(TREE["0.weight"]), torch.tensor([48.0, 24.0]))


@pytest.mark.parametrize("wrt", [3, (), ("a", 1), [], b"x"])
def test_wrt_is_a_pattern_or_several(wrt: Any) -> None:
    with pytest.raises(ad.errors.OptionError, match=r"grad: wrt is a pattern of leaves' places, .* got"):
        ad.grad(of_leaves, wrt=wrt)(TREE)


def test_a_pattern_that_matches_nothing_says_what_there_is() -> None:
    text = r"hessian: wrt='1\.\*' matches no leaf .* places are '0\.weight', '0\.bias', 'last\.0'\."
    with pytest.raises(ad.errors.ArgnumsError, match=text):
        ad.hessian(of_leaves, wrt=("0.*", "1.*"))(TREE)
    with pytest.raises(ad.errors.ArgnumsError, match=r"'7', \.\.\.\."):
        ad.grad(sum, wrt="8")([torch.ones(()), *[torch.ones(())] * 7, 8, torch.ones(())])
