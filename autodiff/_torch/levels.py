"""Torch's levels and the wrappers around tensors at each of them, reverse mode and batching.

Provides where this thread stands, and levels to enter by `with`. Imports all files below but `kernels`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _autograd, _functorch
from torch._functorch import eager_transforms, predispatch
from torch._functorch import vmap as torch_vmap
from torch.autograd import forward_ad
from torch.nn import Parameter

from autodiff._torch import forward_level as forward
from autodiff._torch.compiled import uncompiled
from autodiff._torch.modes import on_stack
from autodiff._torch.recomputation import put_back_checkpoint_hooks, take_checkpoint_hooks
from autodiff._torch.thread_state import allow_hooks, leave_level, thread

if TYPE_CHECKING:
    from collections.abc import Iterable

# Classes that no package needs to keep.
_PLAIN = (Tensor, Parameter)

_SAVED_TENSOR_HOOKS = (
    "a saved-tensor hook (torch.utils.checkpoint, save_on_cpu, saved_tensors_hooks) cannot run inside a transform "
    "that is itself inside vmap or another transform: it would see torch's wrappers in place of values. Enter the "
    "hook around the outermost transform's function only when nothing batches it, or leave it out."
)


def is_eager() -> bool:
    """Whether no transform and no forward-mode level is active in this thread."""
    return (
        _functorch.peek_interpreter_stack() is None
        and not thread.pushes
        and (forward_ad._current_level < 0 or not _foreign_forward_level())
    )


def grad_level_active() -> bool:
    """Whether a reverse-mode level is on this thread's stack of transforms."""
    return on_stack(_functorch.TransformType.Grad)


def forward_level_active() -> bool:
    """Whether this thread pushes tangents, or a forward-AD level is open that is not ours."""
    if thread.pushes or on_stack(_functorch.TransformType.Jvp):
        return True
    return _foreign_forward_level()


def _foreign_forward_level() -> bool:
    return forward_ad._current_level >= 0 and not forward.dual_level.owned and not thread.hidden


class _TopLevelPopped(AbstractContextManager[Any]):
    """The top of this thread's stack of transforms, taken off in C: no interrupt comes between that and the body.

    The body puts it back, since an interrupt may come first of all in an ``__exit__``.
    """

    __enter__ = staticmethod(_functorch.pop_dynamic_layer_stack)

    def __exit__(self, *exc: object) -> None:
        pass


_top_level_popped = _TopLevelPopped()


class OutsideTransforms(AbstractContextManager[None]):
    """Outside of all transforms that are active, for what has run there before and runs again.

    Where an interrupt leaves it out, the levels that it has taken off are gone: so are the transforms around.
    """

    __slots__ = ("_ignored", "_layers")

    def __enter__(self) -> None:
        self._layers: list[Any] = []
        self._ignored = forward.ForwardModeIgnored() if forward_level_active() else None
        while _functorch.peek_interpreter_stack() is not None:
            self._layers.append(_functorch.pop_dynamic_layer_stack())
        if self._ignored is not None:
            self._ignored.__enter__()

    def __exit__(self, *exc: object) -> None:
        if self._ignored is not None:
            self._ignored.__exit__(None, None, None)
        while self._layers:
            _functorch.push_dynamic_layer_stack(self._layers.pop())


def requires_grad_at_any_depth(tensor: Tensor) -> bool:
    """Whether the tensor, or any tensor inside its wrappers, requires grad.

    A batched tensor's own ``requires_grad`` says False although the tensor under it is tracked.
    """
    while not tensor.requires_grad:
        if not _functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return True


def has_tangent_at_any_depth(tensor: Tensor) -> bool:
    """Whether the tensor carries a tangent at any level of forward mode that is active."""
    stack = _functorch.get_interpreter_stack()
    if not stack:
        return forward.unpack_dual(tensor)[1] is not None
    top = stack[-1]
    if top.key() == _functorch.TransformType.Jvp and forward.unpack_dual(tensor)[1] is not None:
        return True
    below = _functorch.maybe_get_level(tensor) == top.level()
    with _top_level_popped as popped:
        try:
            return has_tangent_at_any_depth(_functorch.get_unwrapped(tensor) if below else tensor)
        finally:
            _functorch.push_dynamic_layer_stack(popped)


def functorch_active() -> bool:
    """Whether a level of torch's stack is active."""
    return _functorch.peek_interpreter_stack() is not None


def active_levels() -> set[int]:
    """The numbers of the levels on this thread's stack."""
    return {layer.level() for layer in _functorch.get_interpreter_stack() or ()}


def level_of(tensor: Tensor) -> int | None:
    """The number of the level that wraps the tensor."""
    return _functorch.maybe_get_level(tensor)


def batch_levels(tensors: Iterable[Tensor]) -> set[int]:
    """The levels at which one of the tensors carries a batch."""
    levels = set()
    for tensor in tensors:
        while _functorch.is_functorch_wrapped_tensor(tensor):
            if _functorch.is_batchedtensor(tensor):
                levels.add(_functorch.maybe_get_level(tensor))
            tensor = _functorch.get_unwrapped(tensor)  # noqa: PLW2901  the next wrapper
    return levels


def fully_unwrapped(tensor: Tensor) -> Tensor:
    """The tensor inside all wrappers, with every batch dimension in sight."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def may_overlap(tensor: Tensor) -> bool:
    """Whether elements of the tensor may share their memory."""
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return False
    return torch._debug_has_internal_overlap(fully_unwrapped(tensor)) != 0


def unwrapped_if_dead(tensor: Tensor) -> Tensor:
    """The tensor without the wrapper of a level that has been left."""
    return _functorch.unwrap_if_dead(tensor)


def is_wrapper(tensor: Tensor) -> bool:
    """Whether the tensor is a transform's wrapper around another."""
    return _functorch.is_functorch_wrapped_tensor(tensor)


# Reverse mode.


class grad_level(AbstractContextManager[int]):  # noqa: N801  used like a function
    """A reverse-mode level with grad mode on; gives the level's number.

    The level is made before grad mode is switched on: torch remembers the mode outside, and
    operations sent below the level obey that one.
    """

    __slots__ = ("_checkpoint_hooks", "_forbidden", "_level", "_was_recording")

    def __enter__(self) -> int:
        self._was_recording = torch.is_grad_enabled()
        self._forbidden = _autograd._saved_tensors_hooks_get_disabled_error_message()
        self._checkpoint_hooks = take_checkpoint_hooks()
        allow_hooks(_SAVED_TENSOR_HOOKS)
        self._level = _functorch._grad_increment_nesting()
        torch._C._set_grad_enabled(True)
        uncompiled.__enter__()
        return self._level

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        uncompiled.__exit__()
        torch._C._set_grad_enabled(self._was_recording)
        leave_level(self._level, _functorch._grad_decrement_nesting, error)
        allow_hooks(self._forbidden)
        put_back_checkpoint_hooks(self._checkpoint_hooks)


def wrap(tensor: Tensor, level: int) -> Tensor:
    """The tensor as a wrapper of the level, not yet tracked by it."""
    if _functorch.maybe_get_level(tensor) == level:
        return tensor
    return _wrap_for_grad(tensor, level)


def _wrap_for_grad(tensor: Tensor, level: int) -> Tensor:
    if type(tensor) in _PLAIN:
        return _functorch._wrap_for_grad(tensor, level)
    # torch.func's own name of it, which a package may replace to keep its class: PyPose's retain_ltype does.
    return eager_transforms._wrap_tensor_for_grad(tensor, level)


def wrap_tracked(tensor: Tensor, level: int) -> Tensor:
    """The tensor as an input of the level that the level differentiates."""
    allowed = _functorch.get_inplace_requires_grad_allowed()
    try:
        _functorch.set_inplace_requires_grad_allowed(True)
        return _wrap_for_grad(tensor, level).requires_grad_()
    finally:
        _functorch.set_inplace_requires_grad_allowed(allowed)


def unwrap(leaf: Any, level: int) -> Any:
    """A tensor as the level below sees it; any other leaf as it is."""
    return _functorch._unwrap_for_grad(leaf, level) if isinstance(leaf, Tensor) else leaf


def detached(leaf: Any) -> Any:
    """A tensor cut off from every graph; any other leaf as it is."""
    return leaf.detach() if isinstance(leaf, Tensor) and requires_grad_at_any_depth(leaf) else leaf


# Batching.


# Whether torch has loaded what vmap decomposes: it takes 1 us to ask it.
_loaded: list[bool] = []


class batch_level(AbstractContextManager[int]):  # noqa: N801  used like a function
    """A vmap level; gives the level's number."""

    __slots__ = ("_level", "_randomness", "_size")

    def __init__(self, size: int, randomness: str) -> None:
        self._size, self._randomness = size, randomness

    def __enter__(self) -> int:
        if not _loaded:
            predispatch.lazy_load_decompositions()
            _loaded.append(True)
        self._level = _functorch._vmap_increment_nesting(self._size, self._randomness)
        uncompiled.__enter__()
        return self._level

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        uncompiled.__exit__()
        leave_level(self._level, _functorch._vmap_decrement_nesting, error)


def vmap_levels() -> list[tuple[int, int]]:
    """Number and size of every vmap level on this thread's stack, torch.func's included; the outermost first."""
    stack = _functorch.get_interpreter_stack() or []
    vmaps = [layer for layer in stack if layer.key() == _functorch.TransformType.Vmap]
    return [(layer.level(), _functorch.CVmapInterpreterPtr(layer).batchSize()) for layer in vmaps]


def add_batch(tensor: Tensor, dim: int, level: int) -> Tensor:
    """The tensor with one dimension hidden as the level's batch."""
    if type(tensor) in _PLAIN:
        return _functorch._add_batch_dim(tensor, dim, level)
    # As in `_wrap_for_grad`.
    return torch_vmap._add_batch_dim(tensor, dim, level)  # type: ignore[attr-defined]


def is_batched_at(tensor: Tensor, level: int) -> bool:
    """Whether the tensor carries the level's batch dimension."""
    return _functorch.is_batchedtensor(tensor) and _functorch.maybe_get_level(tensor) == level


def remove_batch(tensor: Tensor, dim: int, size: int, level: int) -> Tensor:
    """The tensor with the level's batch as dimension ``dim``, expanded if it carried none."""
    if not is_batched_at(tensor, level):
        # torch expands such a tensor at dimension 0, whatever dim says.
        return tensor.unsqueeze(dim).expand(*tensor.shape[:dim], size, *tensor.shape[dim:])
    return _functorch._remove_batch_dim(tensor, level, size, dim)
