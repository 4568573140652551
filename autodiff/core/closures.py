"""The tensors that a function captures: found while it runs, and replaced by others when it runs again.

An operation that is handed one gets another in its place. Never sees a tree.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from autodiff import _torch
from autodiff.core.rules import inplace_counts, is_tracked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# They compute nothing, are put to what is inside wrappers too, and have the same answer in both runs.
_METADATA = frozenset({Tensor.requires_grad.__get__, Tensor.is_leaf.__get__, Tensor.grad_fn.__get__})  # type: ignore[attr-defined,union-attr]


class ReplacedTensors(_torch.FunctionMode):
    """Operations see ``others`` in place of ``tensors``; ``unused`` are those that none has asked for."""

    def __init__(self, tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        super().__init__()
        self._others = {id(tensor): other for tensor, other in zip(tensors, others, strict=True)}
        self.unused = set(self._others)
        self.hidden = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.hidden or func in _METADATA:
            return func(*args, **(kwargs or {}))
        named = {key: self._replaced(value) for key, value in (kwargs or {}).items()}
        return self._seen(func(*self._replaced(args), **named))

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._other(value)
        if type(value) in (tuple, list):
            return type(value)(map(self._replaced, value))
        return value

    def _other(self, tensor: Tensor) -> Tensor:
        self.unused.discard(id(tensor))
        return self._others.get(id(tensor), tensor)

    def _seen(self, result: Any) -> Any:
        return result


def active_modes() -> list[ReplacedTensors]:
    """The modes of this kind around, outermost first."""
    modes = _torch.function_modes()
    return [mode for mode in modes if isinstance(mode, ReplacedTensors) and not mode.hidden]


@contextmanager
def unseen() -> Iterator[None]:
    """Where the modes around see nothing: outside of all transforms, where other levels have the numbers they know."""
    modes = active_modes()
    for mode in modes:
        mode.hidden += 1
    try:
        yield
    finally:
        for mode in modes:
            mode.hidden -= 1


class CapturedTensors(ReplacedTensors):
    """Finds tensors that belong to a level or require grad and were not made here; hides their derivatives."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__((), ())
        # As the function has them, and as the checkpointed functions around show them to it.
        self.tensors: list[Tensor] = []
        self.shown: list[Tensor] = []
        self.versions: list[int] = []
        self.tracked: set[int] = set()
        self._around = active_modes()
        self._levels = _torch.active_levels()
        self._token = object()
        for tensor in inputs:
            self._seen(tensor)

    def _other(self, tensor: Tensor) -> Tensor:
        other = self._others.get(id(tensor))
        if other is not None:
            return other
        if self._token in getattr(tensor, "autodiff_made_in", ()):
            return tensor
        shown = tensor
        for mode in reversed(self._around):
            shown = mode._other(shown)  # noqa: SLF001  its own kind
        if not self._is_live(shown):
            return tensor
        # Kept, so that nothing else gets its id. What a transform inside gives has no mark, and may be among them.
        self.tensors.append(tensor)
        self.shown.append(shown)
        self.versions += inplace_counts([shown])
        if is_tracked(shown):
            self.tracked.add(id(tensor))
        with _torch.WithoutFunctionModes():  # else those around would take what they show for captured
            constant = shown.detach()
        self._others[id(tensor)] = constant
        for mode in (self, *self._around):
            mode._seen(constant)  # noqa: SLF001  its own kind
        return constant

    def _is_live(self, tensor: Tensor) -> bool:
        if _torch.is_wrapper(tensor):
            return _torch.level_of(tensor) in self._levels
        try:
            return is_tracked(tensor)
        except RuntimeError as error:
            # Torch's own decompositions are seen as well: below autograd, where no tensor can be asked for a tangent.
            if not _torch.says(error, "a level that is gone"):
                raise
            return False

    def _seen(self, result: Any) -> Any:
        for leaf in result if isinstance(result, tuple | list) else (result,):
            if isinstance(leaf, Tensor):
                # In each of the checkpointed functions that are inside one another.
                leaf.autodiff_made_in = (self._token, *getattr(leaf, "autodiff_made_in", ()))  # type: ignore[attr-defined]
        return result
