"""Ctrl-C leaves nothing behind, wherever it comes; tests/soak tries 10,000 instants."""

from __future__ import annotations

import itertools
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._functorch import pyfunctorch

import autodiff as ad
from autodiff import functional
from autodiff._torch import forward_level, levels, modes, thread_state
from autodiff.core import closures, forward
from autodiff.functional import backward_only
from autodiff.torch_fixes.attention import plain_attention
from conftest import CLEAN, state_of_torch
from every_transform import T, W, X, cubic, hessian
from interrupted_calls import calls, state
from scenarios import assert_close
from soak import interrupts


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not interrupts.POSSIBLE, reason="needs fork and setitimer")
@pytest.mark.skipif(
    torch.backends.cuda.is_built(), reason="the engine of a build with CUDA has threads: no forks"
)
def test_random_instants_of_random_calls() -> None:
    came, left = interrupts.run(seed=1, count=400)
    assert came > 200
    assert dict(left) == {}


# An interrupt at the first instruction of an __exit__, which then does nothing, and one after the last of an __enter__,
# whose __exit__ is not called.

CONTEXTS: dict[str, tuple[type, Any]] = {
    "grad level": (levels.grad_level, lambda x: ad.vmap(ad.grad(cubic))(x[None])),
    "batch level": (levels.batch_level, lambda x: ad.vmap(cubic)(x[None])),
    "batch level of a Jacobian": (levels.batch_level, ad.jacrev(lambda x: x**3)),
    "batch level of a Hessian": (levels.batch_level, ad.hessian(cubic)),
    "forward level": (forward_level.functorch_forward_level, ad.hessian(cubic, mode="forward-over-forward")),
    "eager forward level": (forward_level.eager_forward_level, lambda x: ad.jvp(cubic, (x,), (T,))),
    "forward mode": (forward.ForwardMode, lambda x: ad.jvp(cubic, (x,), (T,))),
    "grad mode": (modes.GradMode, lambda x: functional.jacobian(cubic, x)),
    "mode that sees how grad mode is switched": (
        backward_only._BackwardOnly,
        lambda x: functional.jvp(cubic, x, T),
    ),
    "forward mode ignored": (
        forward_level.ForwardModeIgnored,
        lambda x: ad.jvp(lambda y: nn.functional.multi_margin_loss(y[None], torch.tensor([0])), (x,), (T,)),
    ),
    "captured tensors": (
        closures.CapturedTensors,
        lambda x: torch.func.vmap(torch.func.grad(ad.checkpoint(cubic)))(x[None]),
    ),
}
each_context = pytest.mark.parametrize(("context", "call"), CONTEXTS.values(), ids=CONTEXTS)


def interrupting(context: type, where: str) -> Any:
    """The method, which is interrupted the first time."""
    method, times = getattr(context, where), itertools.count()

    def interrupted(self: Any, *args: Any) -> Any:
        first = next(times) == 0
        if first and where == "__exit__":
            raise KeyboardInterrupt
        result = method(self, *args)
        if first:
            raise KeyboardInterrupt
        return result

    return interrupted


@each_context
@pytest.mark.parametrize("where", ["__enter__", "__exit__"])
def test_interrupt_between_a_context_and_its_body(
    context: type, call: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state()
    monkeypatch.setattr(context, where, interrupting(context, where))
    with pytest.raises(KeyboardInterrupt):
        call(X)
    monkeypatch.undo()
    assert state() == before
    assert_close(ad.hessian(cubic)(X), hessian(X))
    assert_close(ad.jvp(cubic, (X,), (T,))[1], 3 * W * X**2 @ T)


@pytest.mark.parametrize("name", ["_turn_all", "settle"])
def test_interrupt_while_kernels_are_switched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, times = getattr(modes.SharedSwitch, name), itertools.count()

    def interrupted(self: Any) -> None:
        if self is plain_attention and self._users == int(name == "_turn_all") and next(times) == 0:
            raise KeyboardInterrupt
        method(self)

    monkeypatch.setattr(modes.SharedSwitch, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        ad.hessian(cubic)(X)
    assert state_of_torch() == CLEAN
    assert not plain_attention._lock.locked()
    assert plain_attention._users == 0


def test_interrupt_while_an_error_is_handled(monkeypatch: pytest.MonkeyPatch) -> None:
    restore, times = thread_state._restore, itertools.count()

    def interrupted(*args: Any) -> None:
        if next(times) == 0:
            raise KeyboardInterrupt
        restore(*args)

    def raising(x: Tensor) -> Tensor:
        raise ValueError("inside")

    monkeypatch.setattr(thread_state, "_restore", interrupted)
    monkeypatch.setattr(levels.batch_level, "__exit__", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        ad.vmap(raising)(X)
    assert state_of_torch() == CLEAN


def test_generator_of_torchs_that_was_left_does_not_end_later() -> None:
    """torch steps out of a level by a generator, which would step back in when the traceback is freed."""

    def interrupted(x: Tensor) -> Tensor:
        context = pyfunctorch.temporarily_pop_interpreter_stack()
        context.gen.send(None)  # as __enter__ does
        raise_in_exit(context)
        return x

    with pytest.raises(KeyboardInterrupt) as caught:
        ad.vmap(interrupted)(X)
    assert state_of_torch() == CLEAN
    del caught
    assert state_of_torch() == CLEAN


def raise_in_exit(context: Any) -> None:
    """As an interrupt at the first instruction of the context's ``__exit__`` does."""
    code = type(context).__exit__.__code__

    def trace(frame: Any, event: str, arg: Any) -> Any:
        if frame.f_code is code:
            sys.settrace(before)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        context.__exit__(None, None, None)
    finally:
        sys.settrace(before)


def test_every_call_gives_the_same_twice_in_threads() -> None:
    """What the calls to be interrupted are compared by."""
    names = ["jvp(cubic)", "hessian(attended)", "grad(checkpointed)"]
    found: list[Any] = []

    def run() -> None:
        found.append([calls()[name]() for name in names[:2]])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert_close(found[0], [calls()[name]() for name in names[:2]])
