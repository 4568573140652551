"""Floor 1: a twin of a module, with other tensors, which a call may change as it likes.

Hands on `Twins`. What belongs to the module is copied: modules and the containers in their attributes. What it
merely refers to (functions, objects of other classes) is shared, unless it leads back to the module: then that
part is rebuilt so that it leads to the twin. Tensors are shared but for those that are replaced. Imports `errors`
and `_torch`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import logging
import re
import types
import weakref
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autodiff._torch import copy_of_scripted
from autodiff.errors import CloneError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

# What a call cannot change, or what belongs to the world and not to a module.
_ATOMS: frozenset[type] = frozenset(
    {
        *(bool, int, float, complex, str, bytes, range, slice, re.Pattern, logging.Logger),
        *(type, type(None), type(Ellipsis), types.ModuleType, types.CodeType),
        *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, torch.Generator),
        torch.fx.Graph,  # generated code and its plan: it names the module's parts, and is not run
    }
)
_CONTAINERS = (dict, list, set, tuple, frozenset, deque)
_TABLES = ("_parameters", "_buffers")
_EMPTY = frozenset({dict, OrderedDict, list, set})
_COPIED_AS_THEY_ARE = frozenset({dict, OrderedDict, list, set, deque})
_LEADING_NOWHERE = (type, Tensor, types.ModuleType, types.FrameType, types.TracebackType)
_CACHES: type = type(functools.cache(len))
_METHODS_OF_C = types.BuiltinMethodType | types.MethodWrapperType
# A heuristic: objects are searched for a way back to the module, nearest first, and no more than so many.
_SEARCHED = 10_000
_NOTHING = object()


class Twins:
    """The twin of a module and of all that leads back to it.

    Args:
        module: the module.
        tensors: by the ``id`` of a tensor that the module holds, the one that the twin holds instead.
        private: makes a buffer that stands for one of a module outside the tree, which no name leads to.
    """

    def __init__(
        self, module: nn.Module, tensors: Mapping[int, Tensor], private: Callable[[Tensor], Tensor]
    ) -> None:
        self._private = private
        self._place: tuple[type, str] = type(module), ""
        self._inside_objects = 0
        self._rebuilt_objects: list[tuple[Any, Any, dict[str, Any]]] = []
        self._own: set[int] = set()
        self._holders: set[int] = set()
        self._met: list[Any] = []
        self._memo: dict[int, Any] = dict(tensors)
        self.root: nn.Module = self._copied(module)
        if self._met:
            self._own = set(self._memo)
            self._holders = _holders(self._met, self._own)
        if self._holders:
            # Few modules come here: one that has a closure or an object which leads back to it.
            self._memo = dict(tensors)
            self.root = self._copied(module)

    def of(self, module: nn.Module) -> nn.Module:
        """The twin of a module in the tree."""
        twin: nn.Module = self._memo[id(module)]
        return twin

    def carry_back(self) -> None:
        """Assign to objects that had to be rebuilt, and belong to no module, what was assigned to their copies."""
        if not self._rebuilt_objects:
            return
        originals = {id(twin): original for original, twin, _ in self._rebuilt_objects}
        for original, twin, before in self._rebuilt_objects:
            for name, value in _fields(twin).items():
                if before.get(name, _NOTHING) is not value:
                    _assign(original, name, originals.get(id(value), value), twin)

    def _copied(self, value: Any, *, owned: bool = True) -> Any:
        """The value for the twin. What is not ``owned`` by a module is shared if nothing in it leads back."""
        kind = type(value)
        if kind in _ATOMS:
            return value
        key = id(value)
        known = self._memo.get(key, _NOTHING)
        if known is not _NOTHING:
            return known
        owned = owned or key in self._own
        if not owned and key not in self._holders:
            return value
        if kind not in weakref.ProxyTypes:  # such a one says that it is of the class behind it
            if isinstance(value, Tensor):
                return value
            if isinstance(value, nn.Module):
                return self._module(value)
            if isinstance(value, _CONTAINERS):
                return self._container(value, owned=owned)
        if key in self._holders:
            return self._rebuilt(value)
        if kind is weakref.ref and isinstance(value(), Tensor):
            # Recurrent layers have such references to their weights: no need to search where they lead.
            tensor = self._memo.get(id(value()))
            return value if tensor is None else weakref.ref(tensor)
        if not _leads_nowhere(value):
            self._met.append(value)
        return value

    def _module(self, original: nn.Module) -> nn.Module:
        kind: Any = type(original)
        if isinstance(original, torch.jit.ScriptModule):
            return self._scripted(original)
        try:
            twin: nn.Module = object.__new__(kind)
        except TypeError:
            raise CloneError(
                f"functional_call: {kind.__name__} is a module and of a class of C's at once, and cannot be copied. "
                f"Expected a class that derives from nn.Module and Python's classes. Hold the other as an attribute."
            ) from None
        memo = self._memo
        memo[id(original)] = twin
        fields = vars(twin)
        fields.update(vars(original))
        for buffer in original._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                memo[id(buffer)] = self._private(buffer)
        for name, value in [*fields.items()]:
            found = type(value)
            if found in _ATOMS:
                continue
            if found in _EMPTY and not value:
                fields[name] = found()
            elif found is dict and name in _TABLES:
                fields[name] = {key: memo.get(id(tensor), tensor) for key, tensor in value.items()}
            else:
                self._place = kind, name
                fields[name] = self._copied(value)
        if _has_slots(kind):
            for name, value in _slots(original).items():
                self._place = kind, name
                object.__setattr__(twin, name, self._copied(value))
        return twin

    def _scripted(self, original: Any) -> nn.Module:
        """TorchScript's own shallow copy, whose slots are then filled."""
        twin: Any = copy_of_scripted(original)
        self._memo[id(original)] = twin
        for name, buffer in original._buffers.items():
            twin._c.setattr(name, self._memo.get(id(buffer), buffer))
        for name, parameter in original._parameters.items():
            twin._c.setattr(name, self._memo.get(id(parameter), parameter))
        for name, child in original._modules.items():
            twin._modules[name] = self._copied(child)
        return twin  # type: ignore[no-any-return]

    def _container(self, value: Any, *, owned: bool) -> Any:
        kind = type(value)
        if isinstance(value, tuple | frozenset):
            if _ATOMS.issuperset(map(type, value)):
                return value
            items = [self._copied(item, owned=owned) for item in value]
            if all(item is old for item, old in zip(items, value, strict=True)):
                return value
            base = tuple if isinstance(value, tuple) else frozenset
            twin: Any = base.__new__(kind, items)
            self._memo[id(value)] = twin
            return twin
        twin = value.copy() if kind in _COPIED_AS_THEY_ARE else copy.copy(value)
        self._memo[id(value)] = twin
        contents = [*value.keys(), *value.values()] if isinstance(value, dict) else [*value]
        if _ATOMS.issuperset(map(type, contents)):
            return twin
        items = [self._copied(item, owned=owned) for item in contents]
        if isinstance(value, dict):
            twin.clear()
            update = OrderedDict.update if isinstance(twin, OrderedDict) else dict.update
            update(twin, zip(items[: len(value)], items[len(value) :], strict=True))
        elif any(item is not old for item, old in zip(items, contents, strict=True)):
            twin.clear()
            (twin.update if isinstance(twin, set) else twin.extend)(items)
        return twin

    def _part(self, value: Any) -> Any:
        return self._copied(value, owned=False)

    def _rebuilt(self, value: Any) -> Any:
        """A function, a method, a reference or an object that leads back to the module; leading to the twin."""
        kind = type(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if kind is types.MethodType:
            twin: Any = types.MethodType(self._part(value.__func__), self._part(value.__self__))
        elif isinstance(value, functools.partial):
            twin = kind(self._part(value.func), *map(self._part, value.args), **self._parts(value.keywords))
            vars(twin).update(self._parts(vars(value)))
        elif kind is _CACHES:
            # What it remembers was computed from other tensors.
            twin = functools.lru_cache(**value.cache_parameters())(self._part(value.__wrapped__))
        elif isinstance(value, _METHODS_OF_C):
            twin = getattr(self._part(value.__self__), value.__name__)
        elif kind in weakref.ProxyTypes:
            twin = weakref.proxy(self._part(_behind(value)))
        elif kind is weakref.WeakMethod:
            method = value()  # made anew each time that it is asked for
            twin = weakref.WeakMethod(
                types.MethodType(self._part(method.__func__), self._part(method.__self__))
            )
        elif kind is weakref.ref:
            twin = weakref.ref(self._part(value()), self._part(value.__callback__))
        else:
            return self._object(value)
        self._memo[id(value)] = twin
        return twin

    def _parts(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self._part(value) for name, value in values.items()}

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        closure = value.__closure__ or ()
        leading = [cell for cell in closure if id(cell) in self._holders and id(cell) not in self._memo]
        # The cells are filled last: a function may lead to itself.
        self._memo.update((id(cell), types.CellType()) for cell in leading)
        cells = tuple(self._memo.get(id(cell), cell) for cell in closure)
        twin = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, cells or None)
        self._memo[id(value)] = twin
        for cell in leading:
            self._memo[id(cell)].cell_contents = self._part(cell.cell_contents)
        twin.__defaults__, twin.__kwdefaults__ = (
            self._part(value.__defaults__),
            self._part(value.__kwdefaults__),
        )
        for name in ("__doc__", "__module__", "__qualname__", "__annotations__"):
            setattr(twin, name, getattr(value, name))
        vars(twin).update(self._parts(vars(value)))
        return twin

    def _object(self, value: Any) -> Any:
        twin = self._blank(value)
        if twin is _NOTHING and self._inside_objects:
            # A trainer holds the module, and it holds loaders and pools that lead back to the trainer.
            return value
        if twin is _NOTHING:
            owner, name = self._place
            raise CloneError(
                f"functional_call: {owner.__name__}.{name} is, or holds, a {type(value).__name__} that leads back to "
                f"the module and cannot be copied. Expected functions, methods, containers, and objects of Python's "
                f"classes. Make it in forward, or call the part of the module that does without it."
            )
        self._memo[id(value)] = twin
        self._inside_objects += 1
        fields = self._parts(_fields(value))
        self._inside_objects -= 1
        for name, part in fields.items():
            _assign(twin, name, part, value)
        self._rebuilt_objects.append((value, twin, fields))
        return twin

    def _blank(self, value: Any) -> Any:
        """An object of the value's class, of which only the attributes are still to be set."""
        with contextlib.suppress(TypeError):
            return object.__new__(type(value))
        # What a class of C's keeps elsewhere than in attributes is not seen from here.
        seen = {id(part) for part in _fields(value).values()} | {id(getattr(value, "__dict__", None))}
        if any(
            id(part) in self._holders | self._own and id(part) not in seen for part in gc.get_referents(value)
        ):
            return _NOTHING
        with contextlib.suppress(TypeError):
            return copy.copy(value)
        return _NOTHING


def _leads_nowhere(value: Any) -> bool:
    """Whether a glance tells that the value does not lead to a module."""
    if isinstance(value, type):
        return True
    if isinstance(value, types.FunctionType):
        plain = _ATOMS.issuperset(map(type, value.__defaults__ or ()))
        return value.__closure__ is None and plain and not value.__kwdefaults__ and not vars(value)
    return isinstance(value, types.BuiltinFunctionType) and isinstance(
        value.__self__, types.ModuleType | type | None
    )


def _holders(roots: Iterable[Any], own: set[int]) -> set[int]:
    """The ids of everything on a way from the roots to one of ``own``."""
    parents: dict[int, list[int]] = {}
    seen = {id(root): root for root in roots}
    coming = deque(seen.values())
    found = set()
    while coming and len(seen) < _SEARCHED:
        value = coming.popleft()
        for part in _leads_to(value):
            key = id(part)
            if type(part) in _ATOMS:
                continue
            parents.setdefault(key, []).append(id(value))
            if key in own:
                found.add(key)
            elif key not in seen:
                seen[key] = part
                coming.append(part)
    holders: set[int] = set()
    while found:
        new = {parent for key in found for parent in parents.get(key, ())} - holders
        holders |= new
        found = new
    return holders


def _leads_to(value: Any) -> list[Any]:
    """What an object refers to, also weakly, without a function's global names and without classes."""
    kind = type(value)
    if kind in weakref.ProxyTypes:
        return [_behind(value)]
    if isinstance(value, weakref.WeakMethod):
        return gc.get_referents(value())
    if isinstance(value, weakref.ref):
        return [value(), value.__callback__]
    if isinstance(value, types.FunctionType):
        return [*(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__, *vars(value).values()]
    if isinstance(value, _LEADING_NOWHERE):
        return []
    return gc.get_referents(value)


def _behind(proxy: Any) -> Any:
    """The object behind a weak proxy."""
    try:
        return proxy.__init__.__self__
    except ReferenceError:
        return None


def _fields(value: Any) -> dict[str, Any]:
    """All attributes that an object holds, in its __dict__ or in slots."""
    return {**getattr(value, "__dict__", {}), **_slots(value)}


def _assign(target: Any, name: str, value: Any, like: Any) -> None:
    """Set an attribute where ``like`` has it, in its __dict__ or in a slot, without asking the class."""
    if name in getattr(like, "__dict__", ()):
        vars(target)[name] = value
    else:
        object.__setattr__(target, name, value)


def _slots(value: Any) -> dict[str, Any]:
    state = object.__getstate__(value)
    return state[1] if isinstance(state, tuple) else {}


@functools.cache
def _has_slots(kind: type) -> bool:
    return any(vars(base).get("__slots__") for base in kind.__mro__)
