"""Hessians and Hessian-vector products by every mode against closed forms."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import autodiff as ad
from autodiff import _torch
from autodiff.core.memory import Meter
from disguises import (
    CHUNKS,
    DTYPES,
    OF_PRIMALS,
    TRANSFORMERS,
    Case,
    as_tree,
    call,
    cases,
    passive_leaves,
    plain,
    vmapped,
)
from scenarios import SCALAR, SCENARIOS, assert_close, difference, pushed, random_like

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
MODES = [
    "auto",
    "reverse-over-reverse",
    "forward-over-reverse",
    "reverse-over-forward",
    "forward-over-forward",
]


def is_single(case: Case) -> bool:
    return "float32" in repr(case.primals[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "case",
    cases(SCENARIOS, [plain, vmapped, as_tree], DTYPES)
    + cases(SCENARIOS, [t for t in TRANSFORMERS if t not in (plain, vmapped, as_tree)], [torch.float64]),
)
def test_hessian_equals_the_closed_form(case: Case, mode: str) -> None:
    assert_close(call(case, partial(ad.hessian, mode=mode)), case.hessian(), loose=is_single(case))


@pytest.mark.parametrize("chunk_size", CHUNKS[1:])
@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("case", cases(SCENARIOS, [plain, vmapped, passive_leaves], [torch.float64]))
def test_chunks_change_nothing(case: Case, mode: str, chunk_size: int) -> None:
    assert_close(call(case, partial(ad.hessian, mode=mode, chunk_size=chunk_size)), case.hessian())


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "forward-over-forward"])
@pytest.mark.parametrize("case", cases(SCALAR, OF_PRIMALS))
def test_hvp_is_the_closed_form_hessian_times_the_direction(case: Case, mode: str) -> None:
    scenario = case.scenario
    direction = random_like(case.primals[0], seed=3)

    def transform(func: Any, argnums: int, has_aux: bool) -> Any:
        def derived(x: Any) -> Any:
            value, product, *aux = ad.hvp(func, (x,), (case.dress(direction),), mode=mode, has_aux=has_aux)
            result = {"value": value, "product": product}
            return (result, *aux) if has_aux else result

        return derived

    result = call(case, transform)
    assert_close(result["value"], case.expect(scenario.func))
    product = case.expect(lambda x: pushed(scenario.hessian(x), x, direction, x))
    assert_close(result["product"], case.dress(product), loose=is_single(case))


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_directional_difference_of_the_closed_form_jacobian_agrees(scenario: Any) -> None:
    """The closed forms themselves, and with them the library, against differences."""
    vector, unravel = ad.pytree.ravel(scenario.primal)
    direction = torch.randn_like(vector)

    def jacobian(v: Tensor) -> Tensor:
        return ad.pytree.ravel(scenario.jacobian(unravel(v)))[0]

    expected = difference(jacobian, vector, direction, 1e-3)
    # Blocks of the Hessian in the order of the Jacobian's leaves, each contracted with the direction.
    along = unravel(direction)
    contracted = contract(scenario.hessian(scenario.primal), scenario.jacobian(scenario.primal), along)
    torch.testing.assert_close(ad.pytree.ravel(contracted)[0], expected, rtol=1e-8, atol=1e-8)


def contract(hessian: Any, jacobian: Any, direction: Any) -> Any:
    """The Hessian's fully_unwrapped trees contracted with the direction, at every leaf of the Jacobian."""
    if isinstance(jacobian, Tensor):
        return pushed(hessian, jacobian, direction, direction)
    if isinstance(jacobian, dict):
        return {key: contract(hessian[key], jacobian[key], direction) for key in jacobian}
    return type(jacobian)(contract(h, j, direction) for h, j in zip(hessian, jacobian, strict=True))


def bilinear(x: Tensor, y: Tensor) -> Tensor:
    """x_0^2 sum(y) + x_1 y_0 y_1."""
    return x[0] ** 2 * y.sum() + x[1] * y[0] * y[1]


Y = torch.tensor([3.0, 5.0], dtype=torch.float64)
X2 = torch.tensor([0.5, -1.0], dtype=torch.float64)
XX = torch.tensor([[16.0, 0], [0, 0]], dtype=torch.float64)
XY = torch.tensor([[1.0, 1], [5, 3]], dtype=torch.float64)
YY = torch.tensor([[0.0, -1], [-1, 0]], dtype=torch.float64)


@pytest.mark.parametrize("mode", MODES)
def test_argnums_tuple_gives_tuples_in_tuples(mode: Any) -> None:
    assert_close(ad.hessian(bilinear, argnums=(0, 1), mode=mode)(X2, Y), ((XX, XY), (XY.T, YY)))
    assert_close(ad.hessian(bilinear, argnums=("y", 0), mode=mode)(X2, y=Y), ((YY, XY.T), (XY, XX)))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "forward-over-forward"])
def test_hvp_of_several_primals_gives_a_tuple(mode: Any) -> None:
    t, s = torch.tensor([1.0, -2], dtype=torch.float64), torch.tensor([0.25, 3], dtype=torch.float64)
    value, product = ad.hvp(bilinear, (X2, Y), (t, s), mode=mode)
    assert_close(value, bilinear(X2, Y))
    assert_close(product, (XX @ t + XY @ s, XY.T @ t + YY @ s))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_holomorphic_hessian(mode: Any, chunk_size: int | None) -> None:
    z = torch.tensor([1 + 2j, 0.5 - 1j], dtype=torch.complex128)
    c = torch.tensor([2 - 1j, 3j], dtype=torch.complex128)
    result = ad.hessian(lambda z: c @ z**3, mode=mode, holomorphic=True, chunk_size=chunk_size)(z)
    assert_close(result, torch.diag(6 * c * z))


@pytest.mark.parametrize("mode", MODES)
def test_linear_function_has_a_zero_hessian(mode: Any) -> None:
    assert_close(ad.hessian(lambda x: x.sum(), mode=mode)(X), torch.zeros(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "forward-over-forward"])
def test_hvp_of_a_linear_function_is_zero(mode: Any) -> None:
    value, product = ad.hvp(lambda x: x.sum(), (X,), (X,), mode=mode)
    assert_close((value, product), (X.sum(), torch.zeros_like(X)))


@pytest.mark.parametrize("mode", MODES)
def test_strict_refuses_a_linear_function_and_accepts_zero_times_a_square(mode: Any) -> None:
    zeros = torch.zeros(3, 3, dtype=torch.float64)
    assert_close(ad.hessian(lambda x: 0 * (x**2).sum(), mode=mode, strict=True)(X), zeros)
    with pytest.raises(ad.errors.IndependenceError, match="hessian: with strict=True"):
        ad.hessian(lambda x: x.sum(), mode=mode, strict=True)(X)


# Is forward mode on while the function runs, is a reverse-mode level on the stack, is the input tracked.
SEEN_BY_MODE = {
    "auto": (False, False, True),
    "reverse-over-reverse": (False, False, True),
    "forward-over-reverse": (True, True, True),
    "reverse-over-forward": (True, False, True),
    "forward-over-forward": (True, False, False),
}


@pytest.mark.parametrize(
    ("transform", "mode"),
    [("hessian", mode) for mode in MODES]
    + [("hvp", mode) for mode in MODES if mode != "forward-over-forward"],
)
def test_mode_is_the_order_of_levels_that_the_function_runs_in(transform: str, mode: Any) -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        forward = forward_ad._current_level + 1 > 0
        seen.append((forward, _torch.grad_level_active(), _torch.requires_grad_at_any_depth(x)))
        return (x**3).sum()

    if transform == "hessian":
        ad.hessian(look, mode=mode)(X)
    else:
        ad.hvp(look, (X,), (X,), mode=mode)
    assert seen == [SEEN_BY_MODE[mode]]


@pytest.mark.parametrize("mode", MODES)
def test_hessian_of_a_branching_function(mode: Any) -> None:
    """Values of the primals can be read, so Python may branch on them."""
    result = ad.hessian(
        lambda x: (x**2).sum() if float(x[0].detach()) < 1 else x.sum(), mode=mode, chunk_size=1
    )(X)
    assert_close(result, 2 * torch.eye(3, dtype=torch.float64))


def test_per_sample_hessians_of_a_shared_parameter() -> None:
    """The main job: vmap(hessian(loss), (None, 0, 0)); loss (w.x - y)^2 has Hessian 2 x x^T."""
    w, xs, ys = torch.randn(3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64), torch.randn(5)
    result = ad.vmap(ad.hessian(lambda w, x, y: (w @ x - y) ** 2), in_dims=(None, 0, 0), chunk_size=2)(
        w, xs, ys
    )
    assert_close(result, 2 * torch.einsum("ni,nj->nij", xs, xs))


def test_rows_of_a_large_leaf_are_pulled_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch over the rows of all leaves feeds the operations that lead to the others with zeros."""
    params = {"a": torch.randn(9, 6), "b": torch.randn(9), "c": torch.randn(7, 9), "d": torch.randn(2, 7)}
    loss = lambda p, x: (p["d"] @ torch.tanh(p["c"] @ torch.tanh(p["a"] @ x + p["b"]))).square().sum()
    hessians = ad.vmap(ad.hessian(loss), in_dims=(None, 0))
    samples = torch.randn(8, 6)
    came, produced = [], []
    for worth in (2**60, 2**10, 0):
        monkeypatch.setattr("autodiff.core.products._MIN_GROUP_SIZE", worth)
        with Meter(torch.device("cpu")) as meter:
            came.append(hessians(params, samples))
        produced.append(meter.produced)
    torch.testing.assert_close(came[1], came[0])
    torch.testing.assert_close(came[2], came[0])
    assert produced[2] <= produced[1] < 0.6 * produced[0]
