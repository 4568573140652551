"""Finite differences against hand-derived Jacobians, and how runs of a function are kept alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from autodiff.testing.differences import copied, in_double, point_at, same_random_numbers
from scenarios import SCENARIOS, Scenario, assert_close, leaves_of, map_tree, pushed

DEFAULT = (None, None, None)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_quotient_is_the_directional_derivative(scenario: Scenario) -> None:
    point = point_at("check", scenario.func, (scenario.primal,), False, DEFAULT, seed=3)
    everything = range(len(point.primals))
    directions = iter(point.directions)
    tangents = map_tree(lambda _: next(directions), scenario.primal, scenario.primal)
    outputs = scenario.func(scenario.primal)
    expected = leaves_of(pushed(scenario.jacobian(scenario.primal), outputs, tangents, scenario.primal))
    for j, exact in enumerate(expected):
        value, rounding = point.finite_difference(everything, j)
        # Closer than the tolerance of a check by two digits, and within what rounding may do.
        torch.testing.assert_close(value, exact, rtol=1e-8, atol=1e-10)
        assert ((value - exact).abs() <= rounding + 1e-9 * exact.abs()).all()


def test_quotient_moves_one_input_alone() -> None:
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    point = point_at("check", lambda x, y: x * y, (x, y), False, DEFAULT, seed=0)
    one, other = point.directions
    torch.testing.assert_close(point.finite_difference([0], 0).value, one * y, rtol=1e-9, atol=0)
    torch.testing.assert_close(point.finite_difference([1], 0).value, other * x, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        point.finite_difference([0, 1], 0).value, one * y + other * x, rtol=1e-9, atol=1e-9
    )


def test_quotient_has_fourth_order() -> None:
    """The error of x^5 at 1 is -4 eps^4 t^5 exactly: halving the step divides it by 16."""

    def error(eps: float) -> float:
        point = point_at("check", lambda x: x**5, (torch.ones(()),), False, (None, None, eps), seed=0)
        (t,) = point.directions
        return float((point.finite_difference([0], 0).value - 5 * t) / t**5)

    assert error(0.02) == pytest.approx(-4 * 0.02**4, rel=1e-4)
    assert error(0.01) == pytest.approx(-4 * 0.01**4, rel=1e-4)


def test_steps_follow_the_sizes_of_numbers() -> None:
    x = torch.tensor([1e-5, 0.01, 0.5, 10.0, 1e6])
    seen: list[Tensor] = []

    def f(x: Tensor) -> Tensor:
        seen.append(x.clone())
        return x

    point = point_at("check", f, (x,), False, (None, None, 2.0**-10), seed=1)
    point.finite_difference([0], 0)
    noise = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = noise * torch.tensor([0.01, 0.01, 0.5, 10.0, 10.0], dtype=torch.float64) * 2.0**-10
    moves = [(value - x.double()).tolist() for value in seen[1:]]
    for steps in (1, -1, 2, -2):
        assert any(move == pytest.approx((steps * expected).tolist(), rel=1e-5) for move in moves)


def test_copies_are_double_apart_and_like_the_tree() -> None:
    tree = {
        "half": torch.ones(2, dtype=torch.float16),
        "single": torch.ones(2, dtype=torch.complex64),
        "int": torch.tensor([1, 2]),
        "other": ("text", None, 3),
        "tracked": torch.ones(2, dtype=torch.float64, requires_grad=True),
    }
    wide = in_double(tree)
    kinds = {"half": torch.float64, "single": torch.complex128, "int": torch.int64, "tracked": torch.float64}
    assert {key: wide[key].dtype for key in kinds} == kinds
    assert wide["other"] == ("text", None, 3)
    assert not wide["tracked"].requires_grad
    same = copied(wide)
    for key in kinds:
        assert wide[key].data_ptr() != tree[key].data_ptr()
        assert same[key].data_ptr() != wide[key].data_ptr()
        assert_close(same[key], wide[key])


def test_draws_are_the_same_and_the_state_is_that_after_one_run() -> None:
    torch.manual_seed(5)
    once = torch.rand(3)
    after = torch.rand(1)
    torch.manual_seed(5)
    with same_random_numbers() as again:
        draw = again(torch.rand)
        assert_close(draw(3), once)
        assert_close(draw(3), once)
        assert_close(draw(2), once[:2])
    assert_close(torch.rand(1), after)


def test_state_is_that_after_one_run_where_something_raises() -> None:
    def fails() -> None:
        with same_random_numbers() as again:
            again(torch.rand)(3)
            torch.rand(7)
            raise KeyError

    torch.manual_seed(5)
    torch.rand(3)
    after = torch.rand(1)
    torch.manual_seed(5)
    with pytest.raises(KeyError):
        fails()
    assert_close(torch.rand(1), after)
