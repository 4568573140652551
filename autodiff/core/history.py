"""Functions that capture tensors with a long history, as in a loop whose state keeps its graph.

At every pull torch's engine goes through all that lies behind the outputs, 0.2 us for each node, unless the inputs lie
deeper still. A level of functorch hides what is captured, but costs more for each operation. So a function is recorded
at a level if it reached a long history when it was recorded last.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from autodiff import _torch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

# How many nodes of history cost more than a level.
LONG = 256

# By their code, since a loop makes its closures anew.
_far_reaching: WeakSet[Any] = WeakSet()
# What a level cannot run: a Function without setup_context, or numpy().
_eager_alone: WeakSet[Any] = WeakSet()


def reaches_far(func: Callable[..., Any] | None) -> bool:
    """Whether the function reached a long history when it was recorded last, and a level can run it."""
    return (
        bool(_far_reaching)
        and func is not None
        and _code(func) in _far_reaching
        # A second run, of a checkpoint, has to go the way of the first.
        and not _torch.saved_tensor_hooks_active()
    )


def remember(func: Callable[..., Any] | None, nodes: Collection[Any], start: int) -> None:
    """Remember the function if many of the nodes behind its outputs are from before ``start``, a sequence number.

    Each thread counts on its own. A node from another thread may be taken for older than it is, which costs time alone.
    """
    if func is None or len(nodes) < LONG or (code := _code(func)) in _eager_alone:
        return
    new = [node for node in nodes if _torch.sequence_number(node) >= start]
    if len(nodes) - len(new) > LONG and not any(map(_torch.is_eager_function, new)):
        _far_reaching.add(code)


def forget(func: Callable[..., Any] | None, *, for_good: bool = False) -> None:
    """Record the function without a level from now on; ``for_good`` if a level cannot run it."""
    if func is not None:
        _far_reaching.discard(_code(func))
        if for_good:
            _eager_alone.add(_code(func))


def _code(func: Callable[..., Any]) -> Any:
    while isinstance(func, partial):
        func = func.func
    func = inspect.unwrap(func)
    return getattr(func, "__code__", None) or type(func)
