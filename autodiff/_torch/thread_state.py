"""What this thread has entered: remembered, and put back wherever an interrupt comes.

Ctrl-C raises at any call that Python makes, so also between the entering of a context and its body, and at the first
instruction of an ``__exit__`` that is written in Python, which then does nothing. It does not raise between two
assignments, nor between an ``__enter__`` written in C and the body. Imports nothing from the package.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import overrides
from torch._C import _autograd, _functorch
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., Any]")
R = TypeVar("R")
_LEAVE = {
    _functorch.TransformType.Grad: _functorch._grad_decrement_nesting,
    _functorch.TransformType.Jvp: _functorch._jvp_decrement_nesting,
    _functorch.TransformType.Vmap: _functorch._vmap_decrement_nesting,
}
_CHECKPOINT = checkpoint.__file__
_GENERATOR_CONTEXTS = {
    contextlib._GeneratorContextManager.__enter__.__code__,
    contextlib._GeneratorContextManager.__exit__.__code__,
}


# The torch function mode that sees an operation first, None where there is none.
function_mode = overrides._get_current_function_mode
# All of them, the one that sees an operation first last.
function_modes = overrides._get_current_function_mode_stack


class _ThreadState(threading.local):
    """What this thread has entered, besides what torch knows."""

    __dict__: dict[Any, Any]
    pushes = 0  # of tangents, in plain forward mode
    hidden = False  # forward mode is on, but not for what runs here


thread = _ThreadState()


class FunctionMode(TorchFunctionMode):
    """A torch function mode that an interrupt may have taken off: torch takes modes off for a while."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or function_mode() is self:
            super().__exit__(kind, error, trace)


class Shared(ABC):
    """What the whole process shares: its first user, a thread, enters it, and the last one leaves it.

    How many times a thread has entered it stands in `thread`. The lock is never held while user code runs. An interrupt
    may leave the users and what is entered at odds; whoever puts the thread's state back settles that.
    """

    every: list[Shared] = []  # noqa: RUF012  few, for ever

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self.every.append(self)

    def join(self) -> None:
        """Become a user, once more perhaps; call with the lock held."""
        # In assignments with no call between them: an interrupt finds all or none of it.
        own = thread.__dict__
        times = own.get(self, 0)
        self._users += not times
        own[self] = times + 1

    def leave(self) -> None:
        """Be a user once less."""
        own = thread.__dict__
        if own[self] > 1:
            own[self] -= 1
            return
        with self._lock:
            self._users -= 1
            del own[self]
            self.settle()

    def leave_until(self, times: int) -> None:
        """Have entered it only so often in this thread, whatever an interrupt has left."""
        own = thread.__dict__
        while own.get(self, 0) > times:
            self.leave()
        with self._lock:
            self.settle()

    @abstractmethod
    def settle(self) -> None:
        """Leave it for the process if nobody uses it; called with the lock held, perhaps for a second time."""


def guard(func: Callable[..., R], /, *args: Any, **kwargs: Any) -> R:
    """``func(*args, **kwargs)``, after which this thread stands as before, also where an interrupt came in between."""
    own = thread.__dict__
    before = (
        own.copy(),
        torch.is_grad_enabled(),
        torch._C._is_fwd_grad_enabled(),
        _functorch.get_dynamic_layer_stack_depth(),
        _autograd._top_saved_tensors_default_hooks(True),
    )
    own["guarded"] = True
    try:
        return func(*args, **kwargs)
    except BaseException as error:
        try:
            _restore(error, *before)
        finally:  # an interrupt may have come while an error was handled
            _restore(error, *before)
        raise
    finally:
        del own["guarded"]


def under_guard(func: Callable[..., R], /, *args: Any, **kwargs: Any) -> R:
    """``func(*args, **kwargs)`` inside a `guard`, this one if it is the first."""
    return func(*args, **kwargs) if "guarded" in thread.__dict__ else guard(func, *args, **kwargs)


def keeps_grad_mode(func: F) -> F:
    """``func``, which enters nothing itself but grad mode, after which that is as before, and with inference mode off.

    A guard takes 6 us, and one C call in ``finally`` is as safe.
    """

    @wraps(func)
    def keeping(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled():
            return without_inference_mode(keeping, *args, **kwargs)
        before = torch.is_grad_enabled()
        try:
            return func(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(before)

    return keeping  # type: ignore[return-value]


def _restore(
    error: BaseException, own: dict[Any, Any], grad: bool, forward: bool, levels: int, hooks: Any
) -> None:
    """Take this thread back to where it stood outside its outermost guard."""
    _close_generators(error)
    # First these: they see the switches below.
    while any(isinstance(mode, FunctionMode) for mode in function_modes()):
        torch._C._pop_torch_function_stack()
    _leave_levels(levels)
    torch._C._set_grad_enabled(grad)
    torch._C._set_fwd_grad_enabled(forward)
    if not levels:
        allow_hooks(None)
        _functorch.set_single_level_autograd_function_allowed(False)
    while _autograd._top_saved_tensors_default_hooks(True) not in (None, hooks):
        _autograd._pop_saved_tensors_default_hooks()
    for shared in Shared.every:
        shared.leave_until(own.get(shared, 0))
    for key in thread.__dict__.keys() - own.keys() - {"guarded"}:
        del thread.__dict__[key]
    thread.__dict__.update(own)


def leave_level(level: int, leave: Callable[[], Any], error: BaseException | None) -> None:
    """Leave a level, and after an error those inside it that an interrupt has left, if it is there at all."""
    if error is None:
        leave()
    else:
        _leave_levels(level - 1)


def _leave_levels(count: int) -> None:
    """Leave the innermost levels of torch's stack until only so many are left."""
    while _functorch.get_dynamic_layer_stack_depth() > count:
        _LEAVE[_functorch.get_interpreter_stack()[-1].key()]()


def allow_hooks(message: str | None) -> None:
    """Allow saved-tensor hooks, or with a message forbid them."""
    if message is None:
        _autograd._saved_tensors_hooks_enable()
    else:
        _autograd._saved_tensors_hooks_disable(message)


def _close_generators(error: BaseException | None) -> None:
    """Run the end of a generator's ``with`` that an interrupt has left out: it would run when the traceback goes.

    So does that of torch.utils.checkpoint, in torch 2.11 after any error.
    """
    generators = []
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code in _GENERATOR_CONTEXTS:
                generators.append(trace.tb_frame.f_locals["self"].gen)
            elif trace.tb_frame.f_code.co_filename == _CHECKPOINT and "gen" in trace.tb_frame.f_locals:
                generators.append(trace.tb_frame.f_locals["gen"])
            trace = trace.tb_next
        error = error.__context__
    for generator in reversed(generators):  # the innermost first; those that have ended do nothing
        with contextlib.suppress(BaseException):
            generator.close()


def without_inference_mode(func: Callable[..., R], /, *args: Any, **kwargs: Any) -> R:
    """``func(*args, **kwargs)`` with inference mode off, and grad mode as it was."""
    grad, forward = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
    with torch._C._InferenceMode(False):  # in C
        torch._C._set_grad_enabled(grad)
        torch._C._set_fwd_grad_enabled(forward)
        return func(*args, **kwargs)
