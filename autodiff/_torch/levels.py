"""Torch's levels and the wrappers around tensors at each of them, reverse mode and batching.

Provides where this thread stands, and levels to enter by `with`. Imports `modes`, `compiled`, `recomputation` and
`forward_level`.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch import eager_transforms, predispatch, pyfunctorch
from torch._functorch import vmap as torch_vmap
from torch.autograd import forward_ad
from torch.autograd import graph as autograd_graph
from torch.nn import Parameter

from autodiff._torch import forward_level as forward
from autodiff._torch.compiled import uncompiled
from autodiff._torch.modes import GradMode, OutsideInferenceMode, on_stack
from autodiff._torch.recomputation import without_checkpoint_hooks

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

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
        and not forward.thread.pushes
        and (forward_ad._current_level < 0 or not _foreign_forward_level())
    )


def grad_level_active() -> bool:
    """Whether a reverse-mode level is on this thread's stack of transforms."""
    return on_stack(_functorch.TransformType.Grad)


def forward_level_active() -> bool:
    """Whether this thread pushes tangents, or a forward-AD level is open that is not ours."""
    if forward.thread.pushes or on_stack(_functorch.TransformType.Jvp):
        return True
    return _foreign_forward_level()


def _foreign_forward_level() -> bool:
    return forward_ad._current_level >= 0 and not forward.dual_level.owned and not forward.thread.hidden


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Outside of all transforms that are active, for what has run there before and runs again."""
    without_forward_mode = forward.ForwardModeIgnored() if forward_level_active() else nullcontext()
    with pyfunctorch.temporarily_clear_interpreter_stack(), without_forward_mode:
        yield


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
    with pyfunctorch.temporarily_pop_interpreter_stack():
        below = _functorch.maybe_get_level(tensor) == top.level()
        return has_tangent_at_any_depth(_functorch.get_unwrapped(tensor) if below else tensor)


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


@contextmanager
def grad_level() -> Iterator[int]:
    """A reverse-mode level with grad mode on; gives the level's number.

    The level is made before grad mode is switched on: torch remembers the mode outside, and
    operations sent below the level obey that one.
    """
    forbidden = autograd_graph.disable_saved_tensors_hooks(_SAVED_TENSOR_HOOKS)
    with OutsideInferenceMode(), without_checkpoint_hooks(), forbidden:
        level = _functorch._grad_increment_nesting()
        try:
            with GradMode(), uncompiled:
                yield level
        finally:
            _functorch._grad_decrement_nesting()


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
    _functorch.set_inplace_requires_grad_allowed(True)
    try:
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


@contextmanager
def batch_level(size: int, randomness: str) -> Iterator[int]:
    """A vmap level; gives the level's number."""
    predispatch.lazy_load_decompositions()
    level = _functorch._vmap_increment_nesting(size, randomness)
    try:
        with uncompiled:
            yield level
    finally:
        _functorch._vmap_decrement_nesting()


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
