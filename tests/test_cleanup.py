"""An exception inside the function leaves no level, mode or lock behind, whatever is nested in what.

The fixture in conftest.py looks at torch's state after every test; here each test also goes on working.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import autodiff as ad
from conftest import CLEAN, state_of_torch
from every_transform import EVERY, T, W, X, cubic
from scenarios import assert_close

Scalar = Callable[[Tensor], Tensor]

# Each takes a scalar function of a vector to another.
WRAPPERS: dict[str, Callable[[Scalar], Scalar]] = {
    "grad": lambda f: lambda x: ad.grad(f)(x).sum(),
    "vjp": lambda f: lambda x: ad.vjp(f, x)[1](torch.ones((), dtype=x.dtype))[0].sum(),
    "jvp": lambda f: lambda x: ad.jvp(f, (x,), (T,))[1],
    "linearize": lambda f: lambda x: ad.linearize(f, x)[1](T),
    "vmap": lambda f: lambda x: ad.vmap(f)(torch.stack([x, x])).sum(),
    "vmap-1": lambda f: lambda x: ad.vmap(f, chunk_size=1)(torch.stack([x, x])).sum(),
    "jacrev": lambda f: lambda x: ad.jacrev(f)(x).sum(),
    "jacfwd": lambda f: lambda x: ad.jacfwd(f)(x).sum(),
    "hessian": lambda f: lambda x: ad.hessian(f)(x).sum(),
    "hvp": lambda f: lambda x: ad.hvp(f, (x,), (T,))[1].sum(),
    "operators.jacobian": lambda f: lambda x: ad.operators.jacobian(f)(x) @ T,
    "operators.hessian": lambda f: lambda x: (ad.operators.hessian(f)(x) @ T).sum(),
    "torch.func.grad": lambda f: lambda x: torch.func.grad(f)(x).sum(),
    "torch.func.jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (T,))[1],
}
each_nesting = pytest.mark.parametrize(
    "names", [(name,) for name in WRAPPERS] + list(itertools.product(WRAPPERS, repeat=2)), ids="-".join
)


def nested(names: tuple[str, ...], func: Scalar) -> Scalar:
    for name in reversed(names):
        func = WRAPPERS[name](func)
    return func


class Interrupting(torch.autograd.Function):
    """Raises in the backward pass."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        raise ArithmeticError("in backward")


def still_works() -> None:
    """Every kind of transform gives the right numbers, here and in another thread."""
    for every in EVERY:
        assert_close(every.apply(cubic, X), every.expected(X, W))
    results: list[Tensor] = []
    # A lock that was left held would stop this thread.
    thread = threading.Thread(target=lambda: results.append(ad.jvp(cubic, (X,), (T,))[1]), daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive(), "a lock was left held"
    assert_close(results[0], 3 * W * X**2 @ T)


@each_nesting
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_exception_inside_the_function(names: tuple[str, ...], error: type[BaseException]) -> None:
    def raising(x: Tensor) -> Tensor:
        cubic(x)
        raise error("inside")

    with pytest.raises(error, match="inside"):
        nested(names, raising)(X)
    assert state_of_torch() == CLEAN
    assert_close(ad.jvp(cubic, (X,), (T,))[1], 3 * W * X**2 @ T)


@each_nesting
def test_exception_under_modes(names: tuple[str, ...]) -> None:
    def raising(x: Tensor) -> Tensor:
        raise ValueError("inside")

    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            before = state_of_torch()
            # torch 2.11 refuses its own jvp inside vmap under inference mode before the function runs.
            with pytest.raises((ValueError, RuntimeError)):
                nested(names, raising)(X)
            assert state_of_torch() == before


@each_nesting
def test_error_of_a_check(names: tuple[str, ...]) -> None:
    """The check of an output runs while the levels around it are open."""
    with pytest.raises(RuntimeError):
        nested(names, lambda x: ad.grad(lambda y: y.sin())(x).sum())(X)
    with pytest.raises(RuntimeError):
        nested(names, lambda x: ad.jvp(lambda y: y, (x,), (T[:2],))[1].sum())(X)
    assert state_of_torch() == CLEAN


@pytest.mark.parametrize(
    "name", ["grad", "vjp", "linearize", "jacrev", "hessian", "hvp", "operators.hessian", "vmap"]
)
def test_exception_in_the_backward_pass(name: str) -> None:
    func = WRAPPERS[name](lambda x: Interrupting.apply(x * x).sum())
    run = (ad.grad(func)) if name == "vmap" else func
    with pytest.raises((ArithmeticError, RuntimeError), match=r"in backward|vmap"):
        run(X)
    assert state_of_torch() == CLEAN


def test_all_works_after_many_exceptions() -> None:
    def raising(x: Tensor) -> Tensor:
        raise ValueError("inside")

    for names in itertools.product(WRAPPERS, repeat=2):
        with pytest.raises(ValueError, match="inside"):
            nested(names, raising)(X)
    still_works()


def test_function_that_changes_the_mode_and_raises() -> None:
    def raising(x: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        raise ValueError("inside")

    for name in ("grad", "jacrev", "hessian"):
        with pytest.raises(ValueError, match="inside"):
            WRAPPERS[name](raising)(X)
        assert torch.is_grad_enabled()


def test_exceptions_in_one_thread_leave_the_others_alone() -> None:
    stop, wrong = threading.Event(), []

    def fail() -> None:
        def raising(x: Tensor) -> Tensor:
            raise ValueError("inside")

        while not stop.is_set():
            for name in ("jvp", "jacfwd", "hvp"):
                try:
                    WRAPPERS[name](raising)(X)
                except ValueError:
                    continue
                wrong.append(name)

    thread = threading.Thread(target=fail, daemon=True)
    thread.start()
    try:
        for _ in range(200):
            assert_close(ad.jvp(cubic, (X,), (T,))[1], 3 * W * X**2 @ T)
    finally:
        stop.set()
        thread.join()
    assert wrong == []


def test_pullback_after_the_function_raised_in_an_outer_transform() -> None:
    """A generator of levels is closed in order when an inner transform is abandoned half way."""
    kept = []

    def func(x: Tensor) -> Tensor:
        _, pullback = ad.vjp(torch.sin, x)
        kept.append(pullback)
        raise ValueError("inside")

    for transform in (ad.grad, ad.jacfwd, ad.vmap):
        with pytest.raises(ValueError, match="inside"):
            transform(func)(X)
    assert state_of_torch() == CLEAN
