"""What is switched on in this thread, and switches that come back.

Imports nothing from the package.
"""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import overrides
from torch._C import _functorch
from torch._C._dynamo import eval_frame
from torch._subclasses import fake_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

F = TypeVar("F", bound="Callable[..., Any]")

# Whether torch.compile or torch.export traces the caller.
compiling = torch.compiler.is_compiling

# What torch.no_grad and torch.enable_grad call, as a torch function mode sees it.
set_grad_enabled = torch._C._set_grad_enabled
# Off with torch function modes: operations run as they are.
WithoutFunctionModes = torch._C.DisableTorchFunction
# The torch function mode that sees an operation first, None where there is none.
function_mode = overrides._get_current_function_mode
# All of them, the one that sees an operation first last.
function_modes = overrides._get_current_function_mode_stack
# Attention by a fused kernel and by a formula: whether it is on, and the switch.
flash_attention = torch._C._get_flash_sdp_enabled, torch._C._set_sdp_use_flash
math_attention = torch._C._get_math_sdp_enabled, torch._C._set_sdp_use_math
# The hooks that torch calls before every module, by keys of which each is used once.
module_pre_hooks: dict[Any, Any] = torch.nn.modules.module._global_forward_pre_hooks


def traced_inline_only(func: F) -> F:
    """``func``, traced by torch.compile as a part of its caller alone.

    Where something in it cannot be traced, and the caller runs uncompiled, so does all of it. torch would compile it
    in pieces, of which some believe that they are traced and others that they are not.
    """
    code, skip = func.__code__, eval_frame._FrameAction.SKIP
    eval_frame.set_code_exec_strategy(code, eval_frame._FrameExecStrategy(skip, skip))
    return func


def stop_tracing(message: str) -> None:
    """Where torch.compile traces: break the graph, or with ``fullgraph=True`` raise with these words.

    An error of our own would leave the transform around it uncompiled for the rest of the process.
    """
    torch._dynamo.graph_break(msg=message)


class SharedSwitch(AbstractContextManager[None]):
    """Switches of the whole process: the first user turns them, and the last one turns them back.

    ``turn`` turns them, and returns what turns them back to what they were. The lock is never held while user code
    runs. Every second derivative comes by here: without a ``with`` for the lock it takes a third less time.
    """

    def __init__(self, turn: Callable[[], Callable[[], None]]) -> None:
        self._turn, self._lock, self._users = turn, threading.Lock(), 0
        self._restore: Callable[[], None] = lambda: None

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            self._users += 1
            if self._users == 1:
                self._restore = self._turn()
        finally:
            self._lock.release()

    def __exit__(self, *exc: object) -> None:
        self._lock.acquire()
        try:
            self._users -= 1
            if self._users == 0:
                self._restore()
        finally:
            self._lock.release()


def _silence_fallbacks() -> Callable[[], None]:
    # torch's own switch cannot be asked how it stands. This filter comes and goes without touching any other.
    warnings.filters.insert(0, _FALLBACKS)  # type: ignore[attr-defined]
    return _show_fallbacks


def _show_fallbacks() -> None:
    with contextlib.suppress(ValueError):  # a catch_warnings that was left meanwhile has taken it away
        warnings.filters.remove(_FALLBACKS)  # type: ignore[attr-defined]


_FALLBACKS = "ignore", re.compile("There is a performance drop"), UserWarning, None, 0


# No warning where vmap loops over an operation without a batching rule.
silenced_fallback_warning = SharedSwitch(_silence_fallbacks)


def computes_numbers(tensors: Iterable[Tensor]) -> bool:
    """Whether a comparison of such tensors has an answer: nothing traces, and they are neither fake nor meta."""
    return not any(torch._C._get_dispatch_mode(key) is not None for key in _WITHOUT_NUMBERS) and not any(
        tensor.is_meta or isinstance(tensor, fake_tensor.FakeTensor) for tensor in tensors
    )


_WITHOUT_NUMBERS = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY


def on_stack(kind: _functorch.TransformType) -> bool:
    """Whether a level of this kind is on this thread's stack of transforms."""
    stack = _functorch.get_interpreter_stack()
    return stack is not None and any(layer.key() == kind for layer in stack)


def outside_inference_mode(tensor: Tensor) -> Tensor:
    """The tensor, or its clone where it was made in inference mode; call with that mode off.

    Such a tensor can be neither tracked nor saved for backward, and forward mode ignores it silently.
    """
    return tensor.clone() if tensor.is_inference() else tensor


def _leave_inference_mode() -> ExitStack | None:
    """Switch inference mode off; what to close in order to have it back, None where it was off."""
    if not torch.is_inference_mode_enabled():
        return None
    outside = ExitStack()
    outside.enter_context(torch.inference_mode(mode=False))
    return outside


class GradMode(AbstractContextManager[None]):
    """Grad mode on, or off, and inference mode off; what was before comes back on leaving."""

    __slots__ = ("_on", "_outside", "_was_recording")

    def __init__(self, on: bool = True) -> None:
        self._on = on

    def __enter__(self) -> None:
        self._was_recording = torch.is_grad_enabled()
        self._outside = _leave_inference_mode()
        torch._C._set_grad_enabled(self._on)

    def __exit__(self, *exc: object) -> None:
        if self._outside is not None:
            self._outside.close()
        torch._C._set_grad_enabled(self._was_recording)


class OutsideInferenceMode(AbstractContextManager[None]):
    """Inference mode off, grad mode as it was: what a functorch level must see when it is made."""

    __slots__ = ("_outside",)

    def __enter__(self) -> None:
        if not torch.is_inference_mode_enabled():
            self._outside = None
            return
        grad, forward = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
        self._outside = _leave_inference_mode()
        torch._C._set_grad_enabled(grad)
        torch._C._set_fwd_grad_enabled(forward)

    def __exit__(self, *exc: object) -> None:
        if self._outside is not None:
            self._outside.close()


class ForwardModeAllowed(AbstractContextManager[None]):
    """Forward mode allowed, as torch forbids it inside an autograd Function."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = torch._C._is_fwd_grad_enabled()
        torch._C._set_fwd_grad_enabled(True)

    def __exit__(self, *exc: object) -> None:
        torch._C._set_fwd_grad_enabled(self._before)
