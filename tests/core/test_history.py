"""Loops whose state keeps its graph: the work of a step does not grow with the steps before."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor

import autodiff as ad
from autodiff.core import graph, history
from autodiff.core.tape import checkpoints

STEPS = 150  # some 1,000 nodes


def scalar(x: Tensor, state: Tensor) -> Tensor:
    return ((x * state).sin() * x).sum()


def vector(x: Tensor, state: Tensor) -> Tensor:
    return (x * state).sin() * x


def pushed(f, x):
    return ad.linearize(f, x)[1](torch.ones_like(x))


# From the derivative with respect to x, the closed form of whose sum over rows is beside it.
CALLS = {
    "grad": (scalar, lambda f, x: ad.grad(f)(x), 1),
    "value_and_grad": (scalar, lambda f, x: ad.value_and_grad(f)(x)[1], 1),
    "vjp": (vector, lambda f, x: ad.vjp(f, x)[1](torch.ones_like(x))[0], 1),
    "linearize": (vector, pushed, 1),
    "jacrev": (vector, lambda f, x: ad.jacrev(f)(x).sum(0), 1),
    "jacobian": (vector, lambda f, x: ad.jacobian(f)(x).sum(0), 1),
    "hessian": (scalar, lambda f, x: ad.hessian(f)(x).sum(0), 2),
    "hvp": (scalar, lambda f, x: ad.hvp(f, (x,), (torch.ones_like(x),))[1], 2),
    "functional.hvp": (
        scalar,
        lambda f, x: ad.functional.hvp(f, x, torch.ones_like(x), create_graph=True)[1],
        2,
    ),
    "functional.jacobian": (
        vector,
        lambda f, x: ad.functional.jacobian(f, x, create_graph=True).sum(0),
        1,
    ),
}


def closed_form(x: Tensor, state: Tensor, order: int) -> Tensor:
    angle = x * state
    if order == 1:
        return angle.sin() + angle * angle.cos()
    return 2 * state * angle.cos() - state * angle * angle.sin()


def loop(derivative, steps: int = STEPS):
    """A state made by one derivative after another, and how it depends on the weight that it began with."""
    weight = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
    state, x = weight * 1.0, torch.linspace(0.1, 0.4, 3, dtype=torch.float64)
    for _ in range(steps):
        slope = derivative(x, state)
        state = (state * 0.9 + 0.1 * slope).clamp(-1, 1)
    (sensitivity,) = torch.autograd.grad(state.sum(), weight)
    return state.detach(), sensitivity


@pytest.fixture(autouse=True)
def no_checkpoint_before(monkeypatch):
    """A process that has used a checkpoint records nothing at a level."""
    monkeypatch.setattr(checkpoints, "used", False)


def counted_walks(monkeypatch) -> list[int]:
    """How many nodes every walk over a graph visits from now on."""
    visited, walk = [0], graph.walk

    def counting(*args):
        result = walk(*args)
        visited.append(len(result[1]))
        return result

    monkeypatch.setattr(graph, "walk", counting)
    return visited


@pytest.mark.parametrize("name", CALLS)
def test_a_captured_state_with_a_long_history(name, monkeypatch):
    func, call, order = CALLS[name]
    visited = counted_walks(monkeypatch)
    actual = loop(lambda x, state: call(lambda x: func(x, state), x))
    torch.testing.assert_close(actual, loop(partial(closed_form, order=order)))
    # Until the function is known, a walk goes through all of its history.
    assert max(visited) < history.LONG + 100
    assert max(visited[-20:]) < 50


@pytest.mark.parametrize("name", CALLS)
def test_a_differentiated_state_with_a_long_history(name, monkeypatch):
    func, call, _ = CALLS[name]
    visited = counted_walks(monkeypatch)
    loop(lambda constant, state: call(lambda state: func(state, constant), state))
    assert max(visited) < 60


def remembered(func) -> bool:
    """Whether the function is recorded at a level after a run that captured a long history."""
    state = torch.ones(3, requires_grad=True)
    for _ in range(2 * history.LONG):
        state = state * 1.0
    captured[:] = [state]
    torch.testing.assert_close(ad.grad(func)(torch.ones(3)), torch.ones(3))
    return history.reaches_far(func)


captured: list[Tensor] = []


def times_captured(x):
    return (x * captured[0]).sum()


def test_the_level_is_left_when_the_history_is_gone():
    assert remembered(times_captured)
    captured[:] = [torch.full((3,), 2.0)]
    torch.testing.assert_close(ad.grad(times_captured)(torch.ones(3)), torch.full((3,), 2.0))
    assert not history.reaches_far(times_captured)


class Doubled(torch.autograd.Function):
    """Without a setup_context, which a level needs."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent * 2


def with_function(x):
    return (Doubled.apply(x) * captured[0]).sum() / 2


def with_numpy(x):
    return (x * captured[0]).sum() * float(x.detach().numpy().sum() / 3)


def test_what_a_level_cannot_run_is_recorded_without_one():
    assert remembered(with_numpy)
    for _ in range(2):
        torch.testing.assert_close(ad.grad(with_numpy)(torch.ones(3)), torch.ones(3))
        assert not history.reaches_far(with_numpy)
    assert not remembered(with_numpy)
    # Its nodes tell at once.
    assert not remembered(with_function)


def test_a_function_is_known_by_its_code_through_partials_and_modules():
    assert remembered(partial(times_captured))
    assert history.reaches_far(times_captured)

    class Times(torch.nn.Module):
        def forward(self, x):
            return times_captured(x)

    assert remembered(Times())
    assert not history.reaches_far(torch.nn.Identity())
    history.forget(Times())
    history.forget(times_captured)


def test_the_functions_of_the_user_are_not_kept():
    import gc
    import weakref

    def make():
        def local(x):
            return times_captured(x)

        assert remembered(local)
        return weakref.ref(local)

    reference = make()
    gc.collect()
    assert reference() is None


def long_history(x: Tensor) -> Tensor:
    for _ in range(2 * history.LONG):
        x = x * 1.0
    return x


@pytest.mark.parametrize(
    "checkpoint",
    [ad.checkpoint, lambda f: partial(torch.utils.checkpoint.checkpoint, f, use_reentrant=False)],
    ids=["autodiff", "torch"],
)
def test_both_runs_of_a_checkpoint_go_the_same_way(checkpoint):
    w = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    captured = long_history(w)

    def inner(y):
        return (y**3 * captured).sum()

    def block(x):
        return (ad.grad(inner)(x) * x.sin()).sum()

    x = torch.tensor([0.5, 1.5], dtype=torch.float64)
    expected = 3 * w.detach() * (2 * x * x.sin() + x**2 * x.cos())
    for _ in range(2):
        history.forget(inner)
        torch.testing.assert_close(ad.grad(checkpoint(block))(x).detach(), expected)
    leaf = x.clone().requires_grad_()
    history.forget(inner)
    checkpoint(block)(leaf).backward()
    torch.testing.assert_close(leaf.grad, expected)


def test_an_error_of_the_functions_own_is_raised_at_a_level_too():
    calls = []

    def failing(x):
        calls.append(x)
        if len(calls) == 2:
            raise RuntimeError("mine")
        return (x * captured[0]).sum()

    assert remembered(failing)
    with pytest.raises(RuntimeError, match="mine"):
        ad.grad(failing)(torch.ones(3))
    assert len(calls) == 2
    history.forget(failing)


def noisy(x):
    return (x * captured[0] * torch.rand(3)).sum() * float(x.detach().numpy().sum() / 3)


def test_what_runs_once_more_without_a_level_draws_the_same_numbers():
    state = torch.ones(3, requires_grad=True)
    captured[:] = [long_history(state)]
    gradients = []
    for _ in range(3):
        torch.manual_seed(0)
        gradients.append((ad.grad(noisy)(torch.ones(3)).detach(), torch.rand(())))
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])


def with_aux(x):
    return (x * captured[0]).sum(), (x**2, x * captured[0])


def test_aux_is_tracked_by_what_it_depends_on_with_a_level_and_without():
    captured[:] = [long_history(torch.ones(3, requires_grad=True))]
    for _ in range(2):
        _, aux = ad.grad(with_aux, has_aux=True)(torch.ones(3))
        assert [leaf.requires_grad for leaf in aux] == [False, True]
    assert history.reaches_far(with_aux)
    history.forget(with_aux)
