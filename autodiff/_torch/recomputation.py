"""torch.utils.checkpoint: how its second run ends, what surrounds it, and its hooks.

Imports nothing from the package.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import _C
from torch.utils import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

# Raised through the user's function, and through ours, when a second run has saved all that the first one has.
StopRecomputation = checkpoint._StopRecomputationError

# What is entered around each second run. Empty, it is torch's own.
around_recomputation: dict[str, Callable[[], AbstractContextManager[Any]]] = {}


class _Recomputation(checkpoint._recomputation_hook):
    """What torch enters for a second run, with `around_recomputation`."""

    def __enter__(self) -> Any:
        with ExitStack() as entered:
            for make in around_recomputation.values():
                entered.enter_context(make())
            hook = super().__enter__()
            self._around = entered.pop_all()
        return hook

    def __exit__(self, *exc: object) -> Any:
        with self._around:
            return super().__exit__(*exc)


checkpoint._recomputation_hook = _Recomputation  # type: ignore[misc]


@contextmanager
def without_checkpoint_hooks() -> Iterator[None]:
    """Tensors are saved as they are, and not by the hooks of checkpoints around, which would be shown wrappers.

    What is saved so needs no second run: only its memory is not spared.
    """
    pairs = []
    while (pair := _C._autograd._top_saved_tensors_default_hooks(True)) and _is_checkpoints(pair[0]):
        pairs.append(pair)
        _C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pair in reversed(pairs):
            _C._autograd._push_saved_tensors_default_hooks(*pair)


def _is_checkpoints(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == "torch.utils.checkpoint"
