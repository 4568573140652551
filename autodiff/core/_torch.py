"""Floor 1, SEAM: the only file that names torch's private parts.

Hands on levels, wrappers, modes and the engine under names of its own, each entered by ``with``.
Every private symbol used here is pinned by tests/test_torch.py. Imports only `errors`.
"""

from __future__ import annotations

import threading
import warnings
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib import import_module
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch import eager_transforms, predispatch
from torch.autograd import Variable, forward_ad
from torch.autograd import graph as autograd_graph
from torch.utils import _python_dispatch
from torch.utils import _pytree as torch_pytree

from autodiff.errors import ForwardLevelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_SAVED_TENSOR_HOOKS = (
    "a saved-tensor hook (torch.utils.checkpoint, save_on_cpu, saved_tensors_hooks) cannot run inside a transform "
    "that is itself inside vmap or another transform: it would see torch's wrappers in place of values. Enter the "
    "hook around the outermost transform's function only when nothing batches it, or leave it out."
)

# Sees every operation, beneath all transforms.
DispatchMode = _python_dispatch.TorchDispatchMode
# torch.func has it since 2.13.
rearrange: Any = getattr(torch.func, "rearrange", None) or import_module("functorch.einops").rearrange


# Where we are.


# Whether torch.compile or torch.export traces the caller.
compiling = torch.compiler.is_compiling


def on_ground() -> bool:
    """Whether no transform and no forward-mode level is active in this thread."""
    return (
        _functorch.peek_interpreter_stack() is None
        and not _thread.pushes
        and (forward_ad._current_level < 0 or _dual_level.owned)
    )


def grad_level_active() -> bool:
    """Whether a reverse-mode level is on this thread's stack of transforms."""
    return _on_stack(_functorch.TransformType.Grad)


def forward_level_active() -> bool:
    """Whether this thread pushes tangents, or forward mode is on for somebody unknown."""
    if _thread.pushes or _on_stack(_functorch.TransformType.Jvp):
        return True
    return forward_ad._current_level >= 0 and not _dual_level.owned


def _on_stack(kind: _functorch.TransformType) -> bool:
    stack = _functorch.get_interpreter_stack()
    return stack is not None and any(layer.key() == kind for layer in stack)


def requires_grad_at_any_depth(tensor: Tensor) -> bool:
    """Whether the tensor, or any tensor inside its wrappers, requires grad.

    A batched tensor's own ``requires_grad`` says False although the tensor under it is watched.
    """
    while not tensor.requires_grad:
        if not _functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return True


def bottom(tensor: Tensor) -> Tensor:
    """The tensor inside all wrappers, with every batch dimension in sight."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def outside_inference(tensor: Tensor) -> Tensor:
    """The tensor, or its clone where it was made in inference mode; call with that mode off.

    Such a tensor can be neither watched nor saved for backward, and forward mode ignores it silently.
    """
    return tensor.clone() if tensor.is_inference() else tensor


def in_inference_mode() -> bool:
    """Whether inference mode is on; torch.compile's tracer cannot tell."""
    return not compiling() and torch.is_inference_mode_enabled()


# What torch.no_grad and its kin call, as a torch function mode sees it.
SWITCH_OF_GRAD_MODE = torch._C._set_grad_enabled
# Attention by a fused kernel and by a formula: whether it is on, and the switch.
FLASH_ATTENTION = torch._C._get_flash_sdp_enabled, torch._C._set_sdp_use_flash
MATH_ATTENTION = torch._C._get_math_sdp_enabled, torch._C._set_sdp_use_math


# Reverse mode.


def _leave_inference_mode() -> ExitStack | None:
    """Switch inference mode off; what to close in order to have it back, None where it was off."""
    if not torch.is_inference_mode_enabled():
        return None
    outside = ExitStack()
    outside.enter_context(torch.inference_mode(mode=False))
    return outside


class Recording(AbstractContextManager[None]):
    """Grad mode on and inference mode off; what was before comes back on leaving."""

    __slots__ = ("_outside", "_was_recording")

    def __enter__(self) -> None:
        self._was_recording = torch.is_grad_enabled()
        self._outside = _leave_inference_mode()
        torch._C._set_grad_enabled(True)

    def __exit__(self, *exc: object) -> None:
        if self._outside is not None:
            self._outside.close()
        torch._C._set_grad_enabled(self._was_recording)


class NormalMode(AbstractContextManager[None]):
    """Inference mode off, grad mode as it was: what a functorch level must see when it is made."""

    __slots__ = ("_outside",)

    def __enter__(self) -> None:
        grad, forward = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
        self._outside = _leave_inference_mode()
        if self._outside is not None:
            torch._C._set_grad_enabled(grad)
            torch._C._set_fwd_grad_enabled(forward)

    def __exit__(self, *exc: object) -> None:
        if self._outside is not None:
            self._outside.close()


@contextmanager
def grad_level() -> Iterator[int]:
    """A reverse-mode level with grad mode on; gives the level's number.

    The level is made before grad mode is switched on: torch remembers the mode outside, and
    operations sent below the level obey that one.
    """
    with NormalMode(), autograd_graph.disable_saved_tensors_hooks(_SAVED_TENSOR_HOOKS):
        level = _functorch._grad_increment_nesting()
        try:
            with Recording():
                yield level
        finally:
            _functorch._grad_decrement_nesting()


def wrap(tensor: Tensor, level: int) -> Tensor:
    """The tensor as a citizen of the level, not yet watched by it."""
    if _functorch.maybe_get_level(tensor) == level:
        return tensor
    return _functorch._wrap_for_grad(tensor, level)


def wrap_watched(tensor: Tensor, level: int) -> Tensor:
    """The tensor as an input of the level that the level differentiates."""
    allowed = _functorch.get_inplace_requires_grad_allowed()
    _functorch.set_inplace_requires_grad_allowed(True)
    try:
        return _functorch._wrap_for_grad(tensor, level).requires_grad_()
    finally:
        _functorch.set_inplace_requires_grad_allowed(allowed)


def unwrap(leaf: Any, level: int) -> Any:
    """A tensor as the level below sees it; any other leaf as it is."""
    return _functorch._unwrap_for_grad(leaf, level) if isinstance(leaf, Tensor) else leaf


def detached(leaf: Any) -> Any:
    """A tensor cut off from every graph; any other leaf as it is."""
    return leaf.detach() if isinstance(leaf, Tensor) and requires_grad_at_any_depth(leaf) else leaf


def backward(
    outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    retain_graph: bool,
    create_graph: bool,
) -> list[Tensor | None]:
    """The engine alone: what torch.autograd.grad does after its own argument handling (12 against 17 us).

    On the CPU the engine works in this thread, and needs no copy of its context either.
    """
    run = (
        Variable._execution_engine.run_backward if outputs[0].is_cpu else autograd_graph._engine_run_backward
    )
    arguments = tuple(outputs), tuple(cotangents), retain_graph, create_graph, tuple(inputs)
    if not torch.is_inference_mode_enabled():
        return list(run(*arguments, allow_unreachable=True, accumulate_grad=False))
    with NormalMode():
        return list(run(*arguments, allow_unreachable=True, accumulate_grad=False))


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each tensor's storage was written in place."""
    return [tensor._version for tensor in tensors]


def cotangent_sizes(node: Any) -> list[int]:
    """The bytes of the cotangents that come into a node of a graph."""
    return [prod(metadata.shape) * metadata.dtype.itemsize for metadata in node._input_metadata]


@contextmanager
def quiet_fallbacks() -> Iterator[None]:
    """No warning where vmap loops over an operation without a batching rule; torch cannot be asked what it was."""
    _functorch._set_vmap_fallback_warning_enabled(False)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        _functorch._set_vmap_fallback_warning_enabled(True)  # type: ignore[attr-defined]


# Forward mode.


class _ThreadState(threading.local):
    """What this thread has entered; a level of its own for every thread."""

    pushes = 0


_thread = _ThreadState()


class _DualLevel:
    """The one forward-AD level that torch keeps per process, shared by all of our threads.

    torch enters and leaves it by unlocked module globals, so two threads get errors, or tangents vanish. Here
    the first user enters it and the last one leaves it, under a lock that is never held while user code runs.
    Where another thread's torch.func.jvp has entered it before, it may leave it under our feet: a witness, a
    dual tensor of our own, tells.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._rules_loaded = False
        self.owned = False

    def arrive(self) -> None:
        with self._lock:
            if not self._rules_loaded:
                self._load_rules()
            if forward_ad._current_level < 0:
                forward_ad.enter_dual_level()
                # torch.func.jvp inside our level must find it and not enter one of its own.
                eager_transforms.JVP_NESTING += 1
                self.owned = True
            self._users += 1

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0 and self.owned:
                self.owned = False
                eager_transforms.JVP_NESTING -= 1
                forward_ad.exit_dual_level(level=0)

    def _load_rules(self) -> None:
        # It uses TorchScript, whose deprecation warning would be an error under `python -W error`.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            forward_ad._maybe_load_decompositions()
        self._rules_loaded = True


_dual_level = _DualLevel()


class _InDualLevel(AbstractContextManager[None]):
    """The level is there, and an error is raised on leaving if it was not there all the time."""

    __slots__ = ("_witness",)

    def __enter__(self) -> None:
        _dual_level.arrive()
        self._witness: Tensor | None = None
        if not _dual_level.owned and not _on_stack(_functorch.TransformType.Jvp):
            try:
                self._witness = make_dual(torch.zeros(()), torch.ones(()))
            except BaseException:
                _dual_level.leave()
                raise

    def __exit__(self, kind: object, *exc: object) -> None:
        try:
            lost = kind is None and self._witness is not None and unpack_dual(self._witness)[1] is None
        finally:
            _dual_level.leave()
        if lost:
            raise ForwardLevelError(
                "forward mode: another thread left torch's one forward-AD level, which it had entered first, by "
                "torch.func.jvp or torch.autograd.forward_ad. The tangents of this thread went with it. Use autodiff's "
                "transforms in all threads, or let only one thread at a time into forward mode."
            )


class dual_ground(AbstractContextManager[None]):  # noqa: N801  used like the function below
    """Plain forward AD in this thread, with no functorch level: half the time of `dual_stacked`."""

    __slots__ = ("_forward", "_level", "_normal")

    def __enter__(self) -> None:
        self._normal, self._level, self._forward = NormalMode(), _InDualLevel(), _ForwardGrad()
        self._normal.__enter__()
        try:
            self._level.__enter__()
        except BaseException:
            self._normal.__exit__()
            raise
        _thread.pushes += 1
        self._forward.__enter__()

    def __exit__(self, *exc: object) -> None:
        self._forward.__exit__()
        _thread.pushes -= 1
        try:
            self._level.__exit__(*exc)
        finally:
            self._normal.__exit__()


@contextmanager
def dual_stacked() -> Iterator[int]:
    """A functorch forward-mode level, which nests; gives the level's number."""
    with NormalMode(), _InDualLevel():
        level = _functorch._jvp_increment_nesting()
        try:
            with _ForwardGrad():
                yield level
        finally:
            _functorch._jvp_decrement_nesting()


class _ForwardGrad(AbstractContextManager[None]):
    __slots__ = ("_before",)

    def __enter__(self) -> None:
        self._before = torch._C._is_fwd_grad_enabled()
        torch._C._set_fwd_grad_enabled(True)

    def __exit__(self, *exc: object) -> None:
        torch._C._set_fwd_grad_enabled(self._before)


def make_dual(primal: Tensor, tangent: Tensor) -> Tensor:
    """A tensor that carries a tangent; a view of the primal."""
    if not primal.is_contiguous() and 0 in primal.stride():
        primal = (
            primal.contiguous()
        )  # torch lays the tangent out like the primal, which it cannot if expanded
    return torch._VF._make_dual(primal, tangent, level=0)


def unpack_dual(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """Primal and tangent, the latter None where the tensor carries none."""
    primal, tangent = torch._VF._unpack_dual(tensor, level=0)
    return primal, tangent


# Batching.


@contextmanager
def batch_level(size: int, randomness: str) -> Iterator[int]:
    """A vmap level; gives the level's number."""
    predispatch.lazy_load_decompositions()
    level = _functorch._vmap_increment_nesting(size, randomness)
    try:
        yield level
    finally:
        _functorch._vmap_decrement_nesting()


def add_batch(tensor: Tensor, dim: int, level: int) -> Tensor:
    """The tensor with one dimension hidden as the level's batch."""
    return _functorch._add_batch_dim(tensor, dim, level)


def is_batched_at(tensor: Tensor, level: int) -> bool:
    """Whether the tensor carries the level's batch dimension."""
    return _functorch.is_batchedtensor(tensor) and _functorch.maybe_get_level(tensor) == level


def remove_batch(tensor: Tensor, dim: int, size: int, level: int) -> Tensor:
    """The tensor with the level's batch as dimension ``dim``, expanded if it carried none."""
    if not is_batched_at(tensor, level):
        # torch expands such a tensor at dimension 0, whatever dim says.
        return tensor.unsqueeze(dim).expand(*tensor.shape[:dim], size, *tensor.shape[dim:])
    return _functorch._remove_batch_dim(tensor, level, size, dim)


def is_wrapped(tensor: Tensor) -> bool:
    """Whether the tensor is a transform's wrapper around another."""
    return _functorch.is_functorch_wrapped_tensor(tensor)


# Trees that torch flattens itself.

# The classes that torch's own pytree knows, with how it takes them apart.
torch_registry: dict[Any, Any] = torch_pytree.SUPPORTED_NODES


def register_with_torch(
    cls: type, flatten: Callable[[Any], tuple[list[Any], Any]], unflatten: Callable[[Any, Any], Any]
) -> None:
    """Register a class with torch's own pytree, so that it crosses torch.func's transforms too."""
    torch_pytree._private_register_pytree_node(cls, flatten, unflatten)
