"""Pushforwards against closed-form Jacobians contracted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import autodiff as ad
from disguises import OF_PRIMALS, Case, call, cases
from scenarios import SCENARIOS, assert_close, difference, pushed, random_like

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
T = torch.tensor([1.0, -2.0, 0.25], dtype=torch.float64)


def by_jvp(func: Any, x: Any, tangent: Any, has_aux: bool) -> tuple[Any, ...]:
    return ad.jvp(func, (x,), (tangent,), has_aux=has_aux)


def by_linearize(func: Any, x: Any, tangent: Any, has_aux: bool) -> tuple[Any, ...]:
    out, pushforward = ad.linearize((lambda x: func(x)[0]) if has_aux else func, x)
    return (out, pushforward(tangent), *([func(x)[1]] if has_aux else []))


@pytest.mark.parametrize("push", [by_jvp, by_linearize])
@pytest.mark.parametrize("case", cases(SCENARIOS, OF_PRIMALS))
def test_tangent_is_the_closed_form_jacobian_times_the_direction(case: Case, push: Any) -> None:
    scenario = case.scenario
    outputs = scenario.func(case.primals[0])
    direction = random_like(case.primals[0], seed=3)

    def transform(func: Any, argnums: int, has_aux: bool) -> Any:
        def derived(x: Any) -> Any:
            out, tangent, *aux = push(func, x, case.dress(direction), has_aux)
            result = {"out": out, "tangent": tangent}
            return (result, *aux) if has_aux else result

        return derived

    result = call(case, transform)
    assert_close(result["out"], case.expect(scenario.func))
    expected = case.expect(lambda x: pushed(scenario.jacobian(x), outputs, direction, x))
    assert_close(result["tangent"], expected, loose=outputs_are_single(outputs))


def outputs_are_single(outputs: Any) -> bool:
    return isinstance(outputs, Tensor) and outputs.dtype == torch.float32


def test_several_primals_and_ignored_tangents_of_passive_leaves() -> None:
    def func(x: Tensor, n: int, p: dict[str, Any]) -> Tensor:
        return x * n * p["s"]

    s = torch.tensor(2.0, dtype=torch.float64)
    primals, tangents = (X, 3, {"s": s, "note": "a"}), (T, None, {"s": s, "note": "ignored"})
    out, tangent = ad.jvp(func, primals, tangents)
    assert_close(out, 6 * X)
    assert_close(tangent, 6 * T + 6 * X)


def test_float32_number_times_python_float_stays_float32() -> None:
    one = torch.tensor(2.0)
    _, tangent = ad.jvp(lambda t: (t * 0.5).exp() * 3.0, (one,), (one,))
    assert tangent.dtype == torch.float32
    assert ad.jacfwd(lambda t: t * 0.5)(one).dtype == torch.float32
    assert ad.jacfwd(ad.jacfwd(lambda t: t**2 * 0.5))(one).dtype == torch.float32


def test_complex_tangent() -> None:
    z, t = torch.tensor(1 + 2j, dtype=torch.complex128), torch.tensor(0.5 - 1j, dtype=torch.complex128)
    out, tangent = ad.jvp(lambda z: z**2, (z,), (t,))
    torch.testing.assert_close((out, tangent), (z**2, 2 * z * t))


def test_nested_jvp_gives_the_second_directional_derivative() -> None:
    def first(x: Tensor) -> Tensor:
        return ad.jvp(lambda x: x.sin(), (x,), (T,))[1]

    _, second = ad.jvp(first, (X,), (T,))
    assert_close(second, -T * T * X.sin())


def test_tangent_is_differentiable_in_the_direction_and_the_primal() -> None:
    x, t = X.clone().requires_grad_(), T.clone().requires_grad_()
    _, tangent = ad.jvp(lambda x: x.sin(), (x,), (t,))
    by_x, by_t = torch.autograd.grad(tangent.sum(), (x, t))
    assert_close(by_x, -T * X.sin())
    assert_close(by_t, X.cos())


def test_independent_output_has_zero_tangent_and_strict_accepts_multiplied_zero() -> None:
    _, tangent = ad.jvp(lambda x: torch.ones(2), (X,), (T,))
    assert_close(tangent, torch.zeros(2))
    _, tangent = ad.jvp(lambda x: x * 0, (X,), (T,), strict=True)
    assert tangent.tolist() == [0, 0, 0]


def test_inside_a_users_own_dual_level() -> None:
    with torch.autograd.forward_ad.dual_level():
        outer = torch.autograd.forward_ad.make_dual(X, T)
        _, tangent = ad.jvp(lambda x: x.sin(), (X,), (T,))
        assert_close(tangent, T * X.cos())
        # The outer tangent survives, and sees through the inner product's primal.
        _, inner = ad.jvp(lambda x: x.sin(), (outer,), (T,))
        second = torch.autograd.forward_ad.unpack_dual(inner).tangent
        assert_close(second, -T * T * X.sin())


RULES_IN_PLACE = {
    "logsumexp": lambda x: x.logsumexp(-1),
    "softmax": lambda x: x.softmax(-1).square().sum(),
    "log_softmax": lambda x: x.log_softmax(-1)[0],
    "logcumsumexp": lambda x: x.logcumsumexp(-1)[-1],
    "cross_entropy": lambda x: torch.nn.functional.cross_entropy(x, torch.tensor(0)),
}


@pytest.mark.parametrize("func", RULES_IN_PLACE.values(), ids=RULES_IN_PLACE)
def test_gradient_of_a_directional_derivative_by_rules_that_write_in_place(func: Any) -> None:
    """On plain tensors torch's tangents of these are written over what their pullback needs."""
    expected = difference(ad.grad(func), X, T, 1e-4)
    x, t = X.clone().requires_grad_(), T.clone().requires_grad_()
    (by_x,) = torch.autograd.grad(ad.jvp(func, (x,), (T,))[1], x)
    (by_t,) = torch.autograd.grad(ad.jvp(func, (X,), (t,))[1], t)
    for result in (by_x, ad.grad(lambda x: ad.jvp(func, (x,), (T,))[1])(X)):
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-8)
    assert_close(by_t, ad.grad(func)(X))


MATRIX = torch.tensor([[3.0, 0.4], [-0.2, 2.0]], dtype=torch.float64)
OF_A_PARAMETER = {
    "solve": lambda y: torch.linalg.solve(MATRIX + torch.diag(y), y.cos()),
    "slogdet": lambda y: torch.linalg.slogdet(MATRIX + torch.diag(y))[1],
    "cumprod": lambda y: y.cumprod(0),
    "layer_norm": lambda y: torch.nn.functional.layer_norm(torch.cat([y, y.exp()]), (4,)),
    "mse_loss": lambda y: torch.nn.functional.mse_loss(y.sin(), y**2),
}


@pytest.mark.parametrize("func", OF_A_PARAMETER.values(), ids=OF_A_PARAMETER)
def test_tangent_is_differentiated_by_a_captured_parameter(func: Any) -> None:
    x, t = torch.tensor([0.5, -0.8], dtype=torch.float64), torch.tensor([1.0, 0.3], dtype=torch.float64)

    def tangent(p: Tensor) -> Tensor:
        return ad.jvp(lambda x: func((x * p).sin() + p), (x,), (t,))[1].sum()

    p = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(tangent(p), p)
    step = 1e-5
    with torch.no_grad():
        expected = (tangent(p + step) - tangent(p - step)) / (2 * step)
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-8)
