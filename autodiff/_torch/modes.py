"""What is switched on in this thread, and switches that come back.

Imports `thread_state`.
"""

from __future__ import annotations

import re
import warnings
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch._C import _functorch
from torch._C._dynamo import eval_frame
from torch._subclasses import fake_tensor

from autodiff._torch.thread_state import Shared, thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

F = TypeVar("F", bound="Callable[..., Any]")
R = TypeVar("R")

# Whether torch.compile or torch.export traces the caller.
compiling = torch.compiler.is_compiling

# What torch.no_grad and torch.enable_grad call, as a torch function mode sees it.
set_grad_enabled = torch._C._set_grad_enabled
# Off with torch function modes: operations run as they are.
WithoutFunctionModes = torch._C.DisableTorchFunction
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


class SharedSwitch(Shared, AbstractContextManager[None]):
    """Switches of the whole process: the first user turns them, and the last one turns them back.

    ``read`` says how they stand, by a function that is called with True to turn them, and with False to turn them back
    to that. An interrupt may stop it half way; it is then called again.
    """

    def __init__(self, read: Callable[[], Callable[[bool], None]]) -> None:
        super().__init__()
        self._read, self._turned = read, False
        self._turn: Callable[[bool], None] | None = None

    def __enter__(self) -> None:
        with self._lock:
            self.join()
            if not self._turned:
                self._turn_all()

    def __exit__(self, *exc: object) -> None:
        self.leave()

    def around(self, func: Callable[..., R], *args: Any) -> R:
        """``func(*args)`` inside the switches, where no `guard` is: all in all a third of a guard and a ``with``."""
        own = thread.__dict__
        if self in own:
            return func(*args)
        try:
            with self._lock:
                self._users += 1
                own[self] = 1
                if not self._turned:
                    self._turn_all()
            result = func(*args)
            with self._lock:
                self._users -= 1
                del own[self]
                if not self._users:
                    self.settle()
        except BaseException:
            try:
                self.leave_until(0)
            finally:  # an interrupt may have come while an error was handled
                self.leave_until(0)
            raise
        return result

    def _turn_all(self) -> None:
        if self._turn is None:
            self._turn = self._read()
        self._turn(True)
        self._turned = True

    def settle(self) -> None:
        if not self._users and self._turn is not None:
            self._turned = False
            self._turn(False)
            self._turn = None


def _read_filters() -> Callable[[bool], None]:
    # torch's own switch cannot be asked how it stands. This filter comes and goes without touching any other.
    return _silence_fallbacks


def _silence_fallbacks(on: bool) -> None:
    if _FALLBACKS in warnings.filters:  # a catch_warnings that was left meanwhile may have taken it away
        warnings.filters.remove(_FALLBACKS)  # type: ignore[attr-defined]
    if on:
        warnings.filters.insert(0, _FALLBACKS)  # type: ignore[attr-defined]


_FALLBACKS = "ignore", re.compile("There is a performance drop"), UserWarning, None, 0


# No warning where vmap loops over an operation without a batching rule.
silenced_fallback_warning = SharedSwitch(_read_filters)


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


class GradMode(AbstractContextManager[None]):
    """Grad mode on, or off; what was before comes back on leaving."""

    __slots__ = ("_on", "_was_recording")

    def __init__(self, on: bool = True) -> None:
        self._on = on

    def __enter__(self) -> None:
        self._was_recording = torch.is_grad_enabled()
        torch._C._set_grad_enabled(self._on)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            torch._C._set_grad_enabled(self._was_recording)
            return
        with WithoutFunctionModes():  # one that an interrupt has left sees this
            torch._C._set_grad_enabled(self._was_recording)


class ForwardModeAllowed(AbstractContextManager[None]):
    """Forward mode allowed, as torch forbids it inside an autograd Function."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = torch._C._is_fwd_grad_enabled()
        torch._C._set_fwd_grad_enabled(True)

    def __exit__(self, *exc: object) -> None:
        torch._C._set_fwd_grad_enabled(self._before)
