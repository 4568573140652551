"""What a backward reaches besides what it saved: a pull depends on it, and the graph does not show it."""

from __future__ import annotations

from collections import deque
from functools import partial
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from autodiff import _torch
from autodiff.core.rules import user_code

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Calls, containers and objects inside each other, as far as they are searched.
_DEPTH = 6


def reaches_tracked_tensor(node: Any) -> bool:
    """Whether the backward of an autograd Function reaches a tensor that requires grad, which it has not saved.

    It is looked for in the Function's context and class, in what its functions enclose and in the globals that they
    name, and inside of modules, containers and objects there.
    """
    return any(map(_torch.requires_grad_at_any_depth, _tensors(user_code(node))))


def reaches_wrapper(function: Any) -> bool:
    """Whether a function reaches a transform's wrapper around a tensor, likewise."""
    return any(map(_torch.is_wrapper, _tensors([function])))


def _tensors(found: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors in these objects, and in what they hold."""
    seen: set[int] = set()
    level = list(found)
    for _ in range(_DEPTH):
        deeper: list[Any] = []
        for one in level:
            if isinstance(one, Tensor):
                yield one
            elif id(one) not in seen:
                seen.add(id(one))
                deeper += _parts(one)
        level = deeper


def _parts(one: Any) -> Iterable[Any]:
    if isinstance(one, nn.Module):
        return [*one.parameters(), *one.buffers(), *vars(one).values()]
    if isinstance(one, dict):
        return one.values()
    if isinstance(one, (list, tuple, set, frozenset, deque)):
        return one
    if isinstance(one, np.ndarray):
        return one.ravel().tolist() if one.dtype == object else ()
    if isinstance(one, partial):
        return [one.func, one.args, one.keywords]
    if isinstance(one, MethodType):
        return [one.__self__, one.__func__]
    if isinstance(one, (staticmethod, classmethod)):
        return [one.__func__]
    if isinstance(one, FunctionType):
        named = (one.__globals__.get(name) for name in one.__code__.co_names)
        return [*_enclosed(one), *(one.__defaults__ or ()), *named, getattr(one, "__wrapped__", None)]
    # Of classes, modules of Python and torch's own objects nothing is searched.
    kind = type(one)
    own = kind.__module__ not in {"builtins", "types"} and not kind.__module__.startswith("torch")
    return vars(one).values() if own and hasattr(one, "__dict__") and not isinstance(one, type) else ()


def _enclosed(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not yet filled
            continue
