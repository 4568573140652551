"""Forward mode. torch's one forward-AD level per process, shared by all threads.

Provides levels to enter by `with`, and dual tensors. Imports `thread_state`, `modes`, and `errors`.
"""

from __future__ import annotations

import threading
import time
import warnings
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.nn import Parameter

from autodiff._torch.modes import on_stack
from autodiff._torch.thread_state import Shared, leave_level, thread
from autodiff.errors import ForwardLevelError

if TYPE_CHECKING:
    from types import TracebackType

# How long another thread's torch.func.jvp is waited for, and how long between two looks, in seconds.
_MAX_WAIT, _PAUSE = 0.25, 0.0005
# torch._VF looks a name up by a function of its own, at every use.
_make_dual, _unpack_dual = torch._VF._make_dual, torch._VF._unpack_dual
_ADVICE = (
    "Use autodiff's transforms in all threads, or let only one thread at a time into forward mode, by torch.func.jvp "
    "or torch.autograd.forward_ad."
)
_LEFT = (
    "forward mode: another thread left torch's one forward-AD level, which it had entered first. The tangents of this "
    f"thread went with it. {_ADVICE}"
)
_BETWEEN = (
    "forward mode: another thread is half way into torch's one forward-AD level, or out of it, so that this one cannot "
    f"enter. {_ADVICE}"
)


class _DualLevel(Shared):
    """The one forward-AD level that torch keeps per process, shared by all of our threads.

    torch enters and leaves it by unlocked module globals, so two threads get errors, or tangents vanish; and where one
    leaves it while another computes, memory is corrupted. A level of another thread's torch.func.jvp is waited for. One
    that stays, or a level by torch.autograd.forward_ad, which may be the caller's own, is shared: it may be left
    while we use it, which a probe, a dual tensor of our own, shows.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rules_loaded = False
        self.owned = False

    def enter(self) -> None:
        until = None
        while not self._try_enter(may_wait=until is None or time.monotonic() < until):
            until = until or time.monotonic() + _MAX_WAIT
            time.sleep(_PAUSE)

    def _try_enter(self, *, may_wait: bool) -> bool:
        """Enter the level, or join those who are in it; False where there is something to wait for."""
        with self._lock:
            if not self._rules_loaded:
                self._load_rules()
            open_, nested = forward_ad._current_level >= 0, eager_transforms.JVP_NESTING > 0
            if not self.owned and nested and may_wait and not on_stack(_functorch.TransformType.Jvp):
                return False
            if not open_ and not self._try_open(may_wait=may_wait):
                return False
            self.join()
            return True

    def _try_open(self, *, may_wait: bool) -> bool:
        nested = eager_transforms.JVP_NESTING > 0
        # Nothing is called in between: an interrupt finds the level open, and settles that, or not open. torch.func.jvp
        # inside our level must find it and not enter one of its own.
        eager_transforms.JVP_NESTING += 1
        forward_ad._current_level, self.owned = 0, True
        try:
            torch._C._enter_dual_level()
        except RuntimeError as error:
            eager_transforms.JVP_NESTING -= 1
            forward_ad._current_level, self.owned = -1, False
            if may_wait:
                return False
            if nested:
                raise ForwardLevelError(_BETWEEN) from error
            # Entering and leaving never take so long: a torch.compile that failed has left the level open.
            try:
                torch._C._exit_dual_level(level=0)
            except RuntimeError:
                raise ForwardLevelError(_BETWEEN) from error
            return False
        return True

    def settle(self) -> None:
        if not self._is_closed():
            # Another thread's torch.func.jvp goes on inside our level: it is left when that is out.
            threading.Thread(target=self._close, name="autodiff: forward-AD level", daemon=True).start()

    def _close(self) -> None:
        closed = False
        while not closed:
            time.sleep(_PAUSE)
            with self._lock:
                closed = self._is_closed()

    def _is_closed(self) -> bool:
        """Leave the level if nobody is in it; False where somebody of torch's is."""
        if self._users or not self.owned:
            return True
        if eager_transforms.JVP_NESTING > 1:
            return False
        # In this order: a torch.func.jvp that finds the level half left raises, and leaves none of its own behind.
        # Python changes threads at calls, so that none can come between the question above and this.
        eager_transforms.JVP_NESTING -= 1
        forward_ad._current_level = -1
        self.owned = False
        torch._C._exit_dual_level(level=0)
        return True

    def _load_rules(self) -> None:
        # It uses TorchScript, whose deprecation warning would be an error under `python -W error`.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            forward_ad._maybe_load_decompositions()
        self._rules_loaded = True


dual_level = _DualLevel()


class _InDualLevel(AbstractContextManager[None]):
    """The level is there, and an error is raised on leaving if it was not there all the time."""

    __slots__ = ("_probe",)

    def __enter__(self) -> None:
        dual_level.enter()
        self._probe: Tensor | None = None
        if not dual_level.owned and not on_stack(_functorch.TransformType.Jvp):
            try:
                self._probe = _a_dual()
            except RuntimeError as error:
                dual_level.leave()
                raise ForwardLevelError(_BETWEEN) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            # Without the level torch may also raise something that does not say so.
            telling = kind is None or issubclass(kind, RuntimeError)
            lost = telling and self._probe is not None and _is_gone(self._probe)
        finally:
            dual_level.leave()
        if lost:
            raise ForwardLevelError(_LEFT) from error


def _a_dual() -> Tensor:
    return make_dual(torch.zeros(()), torch.ones(()))


def _is_gone(probe: Tensor) -> bool:
    """Whether the level in which the probe was made has been left.

    Tangents are cleared a moment after their level is left, when the last thread that is using it is done.
    """
    try:
        _a_dual()
    except RuntimeError:
        return True
    return unpack_dual(probe)[1] is None


class eager_forward_level(_InDualLevel):  # noqa: N801  used like a function
    """Plain forward AD in this thread, with no functorch level: half the time of `functorch_forward_level`."""

    __slots__ = ("_was_allowed",)

    def __enter__(self) -> None:
        super().__enter__()
        thread.pushes += 1
        self._was_allowed = torch._C._is_fwd_grad_enabled()
        torch._C._set_fwd_grad_enabled(True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        torch._C._set_fwd_grad_enabled(self._was_allowed)
        thread.pushes -= 1
        super().__exit__(kind, error, traceback)


class functorch_forward_level(_InDualLevel):  # noqa: N801  used like a function
    """A functorch forward-mode level, which nests; gives the level's number."""

    __slots__ = ("_level", "_was_allowed")

    def __enter__(self) -> int:  # type: ignore[override]
        super().__enter__()
        self._was_allowed = torch._C._is_fwd_grad_enabled()
        self._level = _functorch._jvp_increment_nesting()
        torch._C._set_fwd_grad_enabled(True)
        return self._level

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        torch._C._set_fwd_grad_enabled(self._was_allowed)
        leave_level(self._level, _functorch._jvp_decrement_nesting, error)
        super().__exit__(kind, error, traceback)


class ForwardModeIgnored(AbstractContextManager[None]):
    """This thread is not in plain forward mode, neither ours nor the caller's: for what no tangent enters."""

    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = thread.pushes, thread.hidden
        thread.pushes, thread.hidden = 0, True

    def __exit__(self, *exc: object) -> None:
        thread.pushes, thread.hidden = self._before


def make_dual(primal: Tensor, tangent: Tensor) -> Tensor:
    """A tensor that carries a tangent; a view of the primal."""
    if not primal.is_contiguous() and 0 in primal.stride():
        # torch lays the tangent out like the primal, which it cannot do where that is expanded.
        primal = primal.contiguous()
    if type(primal) in (Tensor, Parameter):
        return _make_dual(primal, tangent, level=0)
    # A name that a package may replace to keep its class: PyPose's retain_ltype does.
    dual: Tensor = forward_ad.make_dual(primal, tangent, level=0)
    return dual


def unpack_dual(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Primal and tangent, of one dtype; the latter None where the tensor carries none."""
    primal, tangent = _unpack_dual(tensor, level=0)
    if tangent is not None and tangent.dtype != primal.dtype:
        # torch promotes the tangent of a 0-dim float32 tensor times a Python float to float64.
        tangent = tangent.to(primal.dtype)
    return primal, tangent
