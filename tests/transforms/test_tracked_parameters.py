"""Who can watch a result: captured parameters, inputs that require grad, grad and inference mode.

A result is connected to autograd's graph exactly where somebody outside can see its derivative.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autodiff as ad
from every_transform import EVERY, Every, T, W, X, cubic, each, gradient, hessian
from scenarios import assert_close


@each
def test_nothing_watched_gives_no_grad_fn(every: Every) -> None:
    result = every.apply(cubic, X)
    assert_close(result, every.expected(X, W))
    assert result.grad_fn is None
    assert not result.requires_grad


def by_unit_vectors(every: Every, weights: Tensor) -> Tensor:
    """d/dw of sum(weights * expected(x, w)), which is linear in w."""
    return torch.stack([(weights * every.expected(X, e)).sum() for e in torch.eye(3, dtype=W.dtype)])


@each
@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "computed"])
def test_captured_parameter_keeps_its_gradient(every: Every, leaf: bool) -> None:
    parameter = W.clone().requires_grad_()
    w = parameter if leaf else 2 * parameter
    result = every.apply(lambda x: cubic(x, w), X)
    assert_close(result.detach(), every.expected(X, w.detach()))
    weights = torch.randn(result.shape, dtype=result.dtype)
    (result * weights).sum().backward()
    assert_close(parameter.grad, by_unit_vectors(every, weights) * (1 if leaf else 2))


@each
def test_watched_input_gives_a_connected_result(every: Every) -> None:
    x = X.clone().requires_grad_()
    result = every.apply(cubic, x)
    weights = torch.randn(result.shape, dtype=result.dtype)
    (by_x,) = torch.autograd.grad((result * weights).sum(), x)
    step = 1e-5
    expected = [
        ((every.expected(X + step * e, W) - every.expected(X - step * e, W)) * weights).sum() / (2 * step)
        for e in torch.eye(3, dtype=X.dtype)
    ]
    torch.testing.assert_close(by_x, torch.stack(expected), rtol=1e-6, atol=1e-6)


@each
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "unwatched"])
def test_right_and_detached_where_grad_mode_is_off_outside(every: Every, mode: Any, tracked: bool) -> None:
    w, x = W.clone().requires_grad_(tracked), X.clone().requires_grad_(tracked)
    with mode():
        result = every.apply(lambda x: cubic(x, w), x)
        inside = torch.ones(1)
    assert not result.requires_grad
    assert inside.is_inference() is (mode is torch.inference_mode)
    assert_close(result.clone(), every.expected(X, W))


@each
def test_inputs_made_in_inference_mode(every: Every) -> None:
    with torch.inference_mode():
        x, w = X.clone(), W.clone()
        result = every.apply(lambda x: cubic(x, w * 1), x)
    assert_close(result.clone(), every.expected(X, W))


# Forward mode does not ask grad mode: there no_grad hides nothing, as in torch.func.jvp.
PURELY_FORWARD = {"jvp", "jacfwd", "vmap-jacfwd", "hessian-forward-over-forward"}


@pytest.mark.parametrize("every", [e for e in EVERY if e.name != "vmap"], ids=lambda e: e.name)
def test_no_grad_inside_the_function_hides_from_reverse_mode_what_runs_in_it(every: Every) -> None:
    def func(x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = x**3
        return cubic(x) + hidden.sum() * 5

    seen = W + 5 if every.name in PURELY_FORWARD else W
    assert_close(every.apply(func, X), every.expected(X, seen))


def detached_slope(x: Tensor) -> Tensor:
    """The derivative is 3 w x^2, but x of the weight is held fixed by no_grad around a transform."""
    with torch.no_grad():
        slope = ad.grad(cubic)(x)
    return (slope * x).sum()


@pytest.mark.parametrize("transform", [ad.grad, ad.jacrev, ad.jacobian])
def test_transform_under_no_grad_inside_a_transform_is_a_constant(transform: Any) -> None:
    assert_close(transform(detached_slope)(X), gradient(X))


def test_enable_grad_inside_no_grad_is_watched_again() -> None:
    w = W.clone().requires_grad_()
    with torch.no_grad(), torch.enable_grad():
        result = ad.grad(lambda x: cubic(x, w))(X)
    (by_w,) = torch.autograd.grad(result.sum(), w)
    assert_close(by_w, 3 * X**2)


class Net(nn.Module):
    """A small network from one number to one number."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def forward(self, t: Tensor) -> Tensor:
        return self.body(t.reshape(1)).squeeze()


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize(
    "second",
    [
        ad.hessian,
        lambda u: ad.hessian(u, mode="forward-over-reverse"),
        lambda u: ad.grad(ad.grad(u)),
        lambda u: ad.jacfwd(ad.grad(u)),
    ],
    ids=["hessian", "forward-over-reverse", "grad-grad", "jacfwd-grad"],
)
def test_physics_informed_loss_trains_the_network(second: Any, chunk_size: int | None) -> None:
    u, points = Net(), torch.linspace(-1, 1, 7, dtype=torch.float64)

    def trained(library: Any, curve: Any, **options: Any) -> list[Tensor]:
        residual = library.vmap(curve, **options)(points) + points
        return list(torch.autograd.grad((residual**2).mean(), list(u.parameters())[:-1]))

    expected = trained(torch.func, torch.func.hessian(u))
    assert all(g.abs().sum() > 0 for g in expected)
    assert_close(trained(ad, second(u), chunk_size=chunk_size), expected)


def adapted(transform: Any, meta: Tensor, task: Tensor) -> Tensor:
    """The loss of a task after one gradient step from the meta-parameter."""

    def loss(p: Tensor) -> Tensor:
        return ((p - task) ** 2 * p.exp()).sum()

    return loss(meta - 0.1 * transform(loss)(meta))


def adapted_by_hand(meta: Tensor, tasks: Tensor) -> Tensor:
    """d/dmeta of the sum over tasks of L(m - 0.1 L'(m)), where L, L', L'' are elementwise."""
    total = torch.zeros_like(meta)
    for task in tasks:

        def first(p: Tensor, task: Tensor = task) -> Tensor:
            return (2 * (p - task) + (p - task) ** 2) * p.exp()

        second = (2 + 4 * (meta - task) + (meta - task) ** 2) * meta.exp()
        total += first(meta - 0.1 * first(meta)) * (1 - 0.1 * second)
    return total


TASKS = torch.tensor([[0.1, 0.2, 0.3], [-1.0, 0.5, 0.0]], dtype=torch.float64)
INNER = {"grad": ad.grad, "jacrev": ad.jacrev, "torch": torch.func.grad, "jacfwd": ad.jacfwd}


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("library", [ad, torch.func], ids=lambda m: m.__name__)
@pytest.mark.parametrize("outer", ["backward", "grad", "torch.func"])
def test_meta_learning_gradient_over_vmapped_tasks(inner: str, library: Any, outer: str) -> None:
    meta = X / 4

    def loss(meta: Tensor) -> Tensor:
        return library.vmap(lambda m, t: adapted(INNER[inner], m, t), in_dims=(None, 0))(meta, TASKS).sum()

    if outer == "backward":
        tracked = meta.clone().requires_grad_()
        (result,) = torch.autograd.grad(loss(tracked), tracked)
    else:
        result = (ad if outer == "grad" else torch.func).grad(loss)(meta)
    assert_close(result, adapted_by_hand(meta, TASKS))


def test_batched_input_watched_below_its_wrapper() -> None:
    batch = torch.stack([X, 2 * X]).requires_grad_()
    result = ad.vmap(ad.grad(cubic))(batch)
    (second,) = torch.autograd.grad(result.sum(), batch)
    assert_close(second, 6 * W * batch.detach())


def test_aux_is_connected_only_where_it_is_watched() -> None:
    w = W.clone().requires_grad_()
    _, aux = ad.grad(lambda x: (cubic(x), {"free": x * 2, "tracked": x * w}), has_aux=True)(X)
    assert not aux["free"].requires_grad
    (by_w,) = torch.autograd.grad(aux["tracked"].sum(), w)
    assert_close(by_w, X)


def test_value_is_connected_with_its_gradient() -> None:
    w = W.clone().requires_grad_()
    value, slope = ad.value_and_grad(lambda x: cubic(x, w))(X)
    (by_value,) = torch.autograd.grad(value, w, retain_graph=True)
    (by_slope,) = torch.autograd.grad(slope.sum(), w)
    assert_close((by_value, by_slope), (X**3, 3 * X**2))


@pytest.mark.parametrize(
    "context", [nullcontext(), torch.no_grad(), torch.inference_mode()], ids=["plain", "no_grad", "inference"]
)
def test_hvp_and_hessian_agree_in_every_mode(context: AbstractContextManager[Any]) -> None:
    with context:
        value, product = ad.hvp(cubic, (X,), (T,))
        matrix = ad.hessian(cubic)(X)
    assert_close(matrix.clone(), hessian(X))
    assert_close((value.clone(), product.clone()), (cubic(X), hessian(X) @ T))


def test_a_mixed_partial_that_nobody_watches_has_no_graph() -> None:
    """The leaf of the inner transform's tape is nobody's once that is done."""
    x, w = torch.randn(2, 3, dtype=torch.float64).unbind(0)
    mixed = ad.grad(lambda x: ad.grad(lambda x, w: (x * x * w * w).sum(), argnums=1)(x, w).sum())(x)
    assert_close(mixed, 4 * x * w)
    assert not mixed.requires_grad
