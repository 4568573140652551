"""What Python objects refer to, as far as a call of a module may follow it.

Provides `leads_to` and what tells whether it is needed, and `fields`. Nothing here knows of clones. Imports no other
part of the package.
"""

from __future__ import annotations

import gc
import logging
import re
import sys
import types
import weakref
from collections import OrderedDict, deque
from contextvars import ContextVar
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# What a call cannot change, or what belongs to the world and not to a module.
IMMUTABLE: frozenset[type] = frozenset(
    {
        *(bool, int, float, complex, str, bytes, range, slice, re.Pattern, logging.Logger),
        *(type, type(None), type(Ellipsis), types.ModuleType, types.CodeType),
        *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, torch.Generator),
        torch.fx.Graph,  # generated code and its plan: it names the module's parts, and is not run
    }
)
CONTAINERS = (dict, list, set, tuple, frozenset, deque)
WITH_OWN_COPY: frozenset[type] = frozenset({dict, OrderedDict, list, set, deque})
_LEADING_NOWHERE = (type, Tensor, types.ModuleType, types.FrameType, types.TracebackType)

# Heuristics. A container with more items than this is data, unless a module is among the first of them.
_LARGE, _FIRST = 1000, 50
# Objects of these packages which the garbage collector does not look into hold no objects.
_TRANSPARENT = sys.stdlib_module_names | {"torch", "numpy", "pybind11_builtins"}
_HAS_REFERENTS = 1 << 14  # Py_TPFLAGS_HAVE_GC


def leads_to(value: Any) -> Sequence[Any] | None:
    """What an object refers to, also weakly, without classes and global names; None where that cannot be seen."""
    kind = type(value)
    if kind in weakref.ProxyTypes:
        return [referent(value)]
    if isinstance(value, weakref.WeakMethod):
        return gc.get_referents(value())
    if isinstance(value, weakref.ref):
        return [value(), value.__callback__]
    if isinstance(value, types.FunctionType):
        return [*(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__, *vars(value).values()]
    if isinstance(value, ContextVar):
        try:
            return [value.get()]
        except LookupError:
            return []
    if isinstance(value, CONTAINERS) or is_object_array(value):
        return contents(value)
    if kind.__flags__ & _HAS_REFERENTS:
        return gc.get_referents(value)
    # NumPy's records may hold objects in their fields.
    holds_objects = getattr(getattr(value, "dtype", None), "hasobject", False)
    return None if holds_objects or kind.__module__.partition(".")[0] not in _TRANSPARENT else []


def leads_nowhere(value: Any) -> bool:
    """Whether it is plain, without a search, that an object does not lead to a module."""
    kind = type(value)
    if kind is types.FunctionType:
        defaults = value.__defaults__ or ()
        return (
            value.__closure__ is None and is_plain(defaults) and not value.__kwdefaults__ and not vars(value)
        )
    if kind is types.BuiltinFunctionType:
        return isinstance(value.__self__, types.ModuleType | type | None)
    return issubclass(kind, _LEADING_NOWHERE)


def contents(container: Any) -> Sequence[Any] | None:
    """The items of a container, of a dict its keys and values; None if it is so large that it is data."""
    if is_object_array(container):
        container = container.ravel()
    if len(container) > _LARGE and not any(issubclass(type(item), nn.Module) for item in first(container)):
        # The collector does not track a dict in which nothing refers to anything, such as a vocabulary.
        untracked = isinstance(container, dict) and not gc.is_tracked(container)
        return [] if untracked and IMMUTABLE.issuperset(map(type, first(container))) else None
    if isinstance(container, dict):
        return [*dict.keys(container), *dict.values(container)]
    return [*container]


def is_plain(container: Any) -> bool:
    """Whether a builtin container is small, and nothing in it can be changed or leads anywhere."""
    if len(container) > _FIRST:
        return False
    return IMMUTABLE.issuperset(map(type, first(container) if isinstance(container, dict) else container))


def first(container: Any) -> Iterable[Any]:
    """Some items of a container, of a dict some keys and some values."""
    if isinstance(container, dict):
        return [*islice(container.keys(), _FIRST), *islice(container.values(), _FIRST)]
    return islice(container, _FIRST)


def is_object_array(value: Any) -> bool:
    """Whether it is an array of NumPy's that holds objects, which the garbage collector does not see."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray) and value.dtype == object


def referent(proxy: Any) -> Any:
    """The object behind a weak proxy."""
    try:
        return proxy.__init__.__self__
    except ReferenceError:
        return None


def fields(value: Any) -> dict[str, Any]:
    """All attributes that an object holds, in its __dict__ or in slots."""
    return {**getattr(value, "__dict__", {}), **slots(value)}


def slots(value: Any) -> dict[str, Any]:
    """The attributes that an object holds in slots."""
    state = object.__getstate__(value)
    return state[1] if isinstance(state, tuple) else {}


def assign(target: Any, name: str, value: Any, like: Any) -> None:
    """Set an attribute where ``like`` has it, in its __dict__ or in a slot, without the class's own __setattr__."""
    if name in getattr(like, "__dict__", ()):
        vars(target)[name] = value
    else:
        object.__setattr__(target, name, value)


class _Finalized:
    """Has a ``__del__`` that has run, and which Python does not run again, whatever the class becomes."""

    def __init__(self, revived: list[Any]) -> None:
        self.revived = revived

    def __del__(self) -> None:
        self.revived.append(self)


def blank(kind: type) -> Any:
    """An object without attributes. Its ``__del__`` never runs: what that closes, the original still uses."""
    if not hasattr(kind, "__del__"):
        return object.__new__(kind)
    revived: list[Any] = []
    _Finalized(revived)
    made = revived.pop()
    made.__class__ = kind
    del made.__dict__["revived"]
    return made
