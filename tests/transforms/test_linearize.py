"""What linearize promises beyond a pushforward: one evaluation, many products, everywhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import autodiff as ad
from scenarios import assert_close

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
T = torch.tensor([1.0, -2.0, 0.25], dtype=torch.float64)


def test_one_evaluation_serves_many_products() -> None:
    calls = []

    def func(x: Tensor) -> Tensor:
        calls.append(1)
        return x.sin() * x[0]

    out, pushforward = ad.linearize(func, X)
    jacobian = torch.diag(X.cos() * X[0])
    jacobian[:, 0] += X.sin()
    assert_close(out, X.sin() * X[0])
    for k in range(3):
        assert_close(pushforward(T * k), jacobian @ (T * k))
    assert_close(ad.vmap(pushforward)(torch.eye(3, dtype=torch.float64)).T, jacobian)
    assert len(calls) == 1


def test_several_primals_and_trees() -> None:
    p = {"s": torch.tensor(2.0, dtype=torch.float64), "n": 4}
    out, pushforward = ad.linearize(lambda x, p: {"y": x * p["s"], "z": p["s"] ** 2 * p["n"]}, X, p)
    assert_close(out, {"y": 2 * X, "z": torch.tensor(16.0, dtype=torch.float64)})
    one = torch.tensor(1.0, dtype=torch.float64)
    assert_close(pushforward(T, {"s": one, "n": None}), {"y": 2 * T + X, "z": 16 * one})


@pytest.mark.parametrize("times", [1, 2, 5])
def test_right_under_grad_every_time(times: int) -> None:
    def slope(x: Tensor) -> Tensor:
        _, pushforward = ad.linearize(lambda x: x**3, x)
        return sum((pushforward(T).sum() for _ in range(times)), torch.zeros((), dtype=x.dtype))

    # sum of 3 x^2 t, so the gradient is 6 x t.
    assert_close(ad.grad(slope)(X), 6 * X * T * times)


def test_right_under_vmap_and_with_control_flow() -> None:
    def func(x: Tensor, positive: bool) -> Tensor:
        return x.exp() if positive else x**2

    for positive, slope in [(True, X.exp()), (False, 2 * X)]:
        _, pushforward = ad.linearize(lambda x, positive=positive: func(x, positive), X)
        assert_close(pushforward(T), slope * T)

    batch = torch.stack([X, 2 * X])
    result = ad.vmap(lambda x: ad.linearize(torch.sin, x)[1](T))(batch)
    assert_close(result, batch.cos() * T)


def test_branch_on_data_is_fixed_where_it_was_linearized() -> None:
    _, pushforward = ad.linearize(lambda x: x**2 if x.sum() > 0 else x**3, X)
    assert_close(pushforward(T), 2 * X * T)


def test_complex_product_is_not_conjugated() -> None:
    z, t = torch.tensor([1 + 2j], dtype=torch.complex128), torch.tensor([0.5 - 1j], dtype=torch.complex128)
    _, pushforward = ad.linearize(lambda z: z**2 * (1 + 1j), z)
    assert_close(pushforward(t), 2 * z * t * (1 + 1j))


def test_independent_output_has_zero_tangent() -> None:
    _, pushforward = ad.linearize(lambda x: {"constant": torch.ones(2), "y": 2 * x}, X)
    assert_close(pushforward(T), {"constant": torch.zeros(2), "y": 2 * T})


def test_product_is_differentiable_in_the_direction_and_a_watched_primal() -> None:
    x, t = X.clone().requires_grad_(), T.clone().requires_grad_()
    _, pushforward = ad.linearize(lambda x: x.sin(), x)
    by_x, by_t = torch.autograd.grad(pushforward(t).sum(), (x, t))
    assert_close(by_x, -T * X.sin())
    assert_close(by_t, X.cos())


def test_nothing_watched_gives_no_grad_fn() -> None:
    out, pushforward = ad.linearize(torch.sin, X)
    assert not out.requires_grad
    assert not pushforward(T).requires_grad


def test_output_not_reached_by_a_piecewise_constant_branch() -> None:
    _, pushforward = ad.linearize(lambda x: torch.floor(x) + x * 0, X)
    assert_close(pushforward(T), torch.zeros_like(X))


def test_pullback_that_is_linear_by_way_of_logarithms() -> None:
    """torch's pullback of logcumsumexp takes the logarithm of the cotangent."""
    x, t = torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, -2.0, 0.25])
    weights = torch.tril(x.exp().expand(3, 3))
    _, pushforward = ad.linearize(lambda x: x.logcumsumexp(0), x)
    assert_close(pushforward(t), weights @ t / weights.sum(1))
