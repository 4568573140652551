"""A clone of a module, with other tensors, which a call may change as it likes.

Provides `ModuleClone`. What belongs to the module is copied: modules and the containers in their attributes. What it
merely refers to (functions, objects of other classes) is shared, unless it leads back to the module: then that
part is rebuilt so that it leads to the clone. Tensors are shared but for those that are replaced. Imports `errors`
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
_IMMUTABLE: frozenset[type] = frozenset(
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
_WITH_OWN_COPY = frozenset({dict, OrderedDict, list, set, deque})
_LEADING_NOWHERE = (type, Tensor, types.ModuleType, types.FrameType, types.TracebackType)
_LRU_CACHE: type = type(functools.cache(len))
_BUILTIN_METHODS = types.BuiltinMethodType | types.MethodWrapperType
# A heuristic: at most this many objects are searched for a way back to the module, nearest first.
_MAX_SEARCHED = 10_000
_MISSING = object()


class ModuleClone:
    """The clone of a module and of all that leads back to it.

    Args:
        module: the module.
        replacements: by the ``id`` of a tensor of the module, the one that the clone has instead.
        copy_buffer: copies the buffers of modules outside the tree, to which no name leads.
    """

    def __init__(
        self, module: nn.Module, replacements: Mapping[int, Tensor], copy_buffer: Callable[[Tensor], Tensor]
    ) -> None:
        self._copy_buffer = copy_buffer
        self._place: tuple[type, str] = type(module), ""
        self._inside_objects = 0
        self._rebuilt_objects: list[tuple[Any, Any, dict[str, Any]]] = []
        self._own: set[int] = set()
        self._leading_back: set[int] = set()
        self._shared: list[Any] = []
        self._memo: dict[int, Any] = dict(replacements)
        self.root: nn.Module = self._copied(module)
        if self._shared:
            self._own = set(self._memo)
            self._leading_back = _leading_back(self._shared, self._own)
        if self._leading_back:
            # Few modules come here: one that has a closure or an object which leads back to it.
            self._memo = dict(replacements)
            self.root = self._copied(module)

    def counterpart(self, module: nn.Module) -> nn.Module:
        """The module of the clone that corresponds to one of the module's tree."""
        clone: nn.Module = self._memo[id(module)]
        return clone

    def write_back(self) -> None:
        """Assign to objects that had to be rebuilt, and belong to no module, what was assigned to their copies."""
        if not self._rebuilt_objects:
            return
        originals = {id(clone): original for original, clone, _ in self._rebuilt_objects}
        for original, clone, before in self._rebuilt_objects:
            for name, value in _fields(clone).items():
                if before.get(name, _MISSING) is not value:
                    _assign(original, name, originals.get(id(value), value), clone)

    def _copied(self, value: Any, *, owned: bool = True) -> Any:
        """The value for the clone. What is not ``owned`` by a module is shared if nothing in it leads back."""
        kind = type(value)
        if kind in _IMMUTABLE:
            return value
        key = id(value)
        known = self._memo.get(key, _MISSING)
        if known is not _MISSING:
            return known
        owned = owned or key in self._own
        if not owned and key not in self._leading_back:
            return value
        if kind not in weakref.ProxyTypes:  # isinstance sees through a proxy to the object behind it
            if isinstance(value, Tensor):
                return value
            if isinstance(value, nn.Module):
                return self._module(value)
            if isinstance(value, _CONTAINERS):
                return self._container(value, owned=owned)
        if key in self._leading_back:
            return self._rebuilt(value)
        if kind is weakref.ref and isinstance(value(), Tensor):
            # Recurrent layers have such references to their weights: no need to search where they lead.
            tensor = self._memo.get(id(value()))
            return value if tensor is None else weakref.ref(tensor)
        if not _leads_nowhere(value):
            self._shared.append(value)
        return value

    def _module(self, original: nn.Module) -> nn.Module:
        kind: Any = type(original)
        if isinstance(original, torch.jit.ScriptModule):
            return self._scripted(original)
        try:
            clone: nn.Module = object.__new__(kind)
        except TypeError:
            raise CloneError(
                f"functional_call: {kind.__name__} derives from nn.Module and from a class written in C, and cannot be "
                f"copied. Expected Python classes besides nn.Module. Make the other object an attribute of the module."
            ) from None
        memo = self._memo
        memo[id(original)] = clone
        fields = vars(clone)
        fields.update(vars(original))
        for buffer in original._buffers.values():
            if buffer is not None and id(buffer) not in memo:
                memo[id(buffer)] = self._copy_buffer(buffer)
        for name, value in [*fields.items()]:
            found = type(value)
            if found in _IMMUTABLE:
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
                object.__setattr__(clone, name, self._copied(value))
        return clone

    def _scripted(self, original: Any) -> nn.Module:
        """TorchScript's own shallow copy, whose slots are then filled."""
        clone: Any = copy_of_scripted(original)
        self._memo[id(original)] = clone
        for name, buffer in original._buffers.items():
            clone._c.setattr(name, self._memo.get(id(buffer), buffer))
        for name, parameter in original._parameters.items():
            clone._c.setattr(name, self._memo.get(id(parameter), parameter))
        for name, child in original._modules.items():
            clone._modules[name] = self._copied(child)
        return clone  # type: ignore[no-any-return]

    def _container(self, value: Any, *, owned: bool) -> Any:
        kind = type(value)
        if isinstance(value, tuple | frozenset):
            if _IMMUTABLE.issuperset(map(type, value)):
                return value
            items = [self._copied(item, owned=owned) for item in value]
            if all(item is old for item, old in zip(items, value, strict=True)):
                return value
            base = tuple if isinstance(value, tuple) else frozenset
            clone: Any = base.__new__(kind, items)
            self._memo[id(value)] = clone
            return clone
        clone = value.copy() if kind in _WITH_OWN_COPY else copy.copy(value)
        self._memo[id(value)] = clone
        contents = [*value.keys(), *value.values()] if isinstance(value, dict) else [*value]
        if _IMMUTABLE.issuperset(map(type, contents)):
            return clone
        items = [self._copied(item, owned=owned) for item in contents]
        if isinstance(value, dict):
            clone.clear()
            update = OrderedDict.update if isinstance(clone, OrderedDict) else dict.update
            update(clone, zip(items[: len(value)], items[len(value) :], strict=True))
        elif any(item is not old for item, old in zip(items, contents, strict=True)):
            clone.clear()
            (clone.update if isinstance(clone, set) else clone.extend)(items)
        return clone

    def _part(self, value: Any) -> Any:
        return self._copied(value, owned=False)

    def _rebuilt(self, value: Any) -> Any:
        """A function, a method, a reference or an object that leads back to the module; the copy leads to the clone."""
        kind = type(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if kind is types.MethodType:
            clone: Any = types.MethodType(self._part(value.__func__), self._part(value.__self__))
        elif isinstance(value, functools.partial):
            clone = kind(self._part(value.func), *map(self._part, value.args), **self._parts(value.keywords))
            vars(clone).update(self._parts(vars(value)))
        elif kind is _LRU_CACHE:
            # Its cached results were computed from other tensors.
            clone = functools.lru_cache(**value.cache_parameters())(self._part(value.__wrapped__))
        elif isinstance(value, _BUILTIN_METHODS):
            clone = getattr(self._part(value.__self__), value.__name__)
        elif kind in weakref.ProxyTypes:
            clone = weakref.proxy(self._part(_referent(value)))
        elif kind is weakref.WeakMethod:
            method = value()  # a new object for each call
            clone = weakref.WeakMethod(
                types.MethodType(self._part(method.__func__), self._part(method.__self__))
            )
        elif kind is weakref.ref:
            clone = weakref.ref(self._part(value()), self._part(value.__callback__))
        else:
            return self._object(value)
        self._memo[id(value)] = clone
        return clone

    def _parts(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self._part(value) for name, value in values.items()}

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        closure = value.__closure__ or ()
        leading = [cell for cell in closure if id(cell) in self._leading_back and id(cell) not in self._memo]
        # The cells are filled last: a function may lead to itself.
        self._memo.update((id(cell), types.CellType()) for cell in leading)
        cells = tuple(self._memo.get(id(cell), cell) for cell in closure)
        clone = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, cells or None)
        self._memo[id(value)] = clone
        for cell in leading:
            self._memo[id(cell)].cell_contents = self._part(cell.cell_contents)
        clone.__defaults__, clone.__kwdefaults__ = (
            self._part(value.__defaults__),
            self._part(value.__kwdefaults__),
        )
        for name in ("__doc__", "__module__", "__qualname__", "__annotations__"):
            setattr(clone, name, getattr(value, name))
        vars(clone).update(self._parts(vars(value)))
        return clone

    def _object(self, value: Any) -> Any:
        clone = self._blank(value)
        if clone is _MISSING and self._inside_objects:
            # A trainer holds the module, and it holds loaders and pools that lead back to the trainer.
            return value
        if clone is _MISSING:
            owner, name = self._place
            raise CloneError(
                f"functional_call: {owner.__name__}.{name} is, or holds, a {type(value).__name__} that leads back to "
                f"the module and cannot be copied. Expected functions, methods, containers, and objects of Python "
                f"classes. Make it in forward, or call the part of the module that does not need it."
            )
        self._memo[id(value)] = clone
        self._inside_objects += 1
        fields = self._parts(_fields(value))
        self._inside_objects -= 1
        for name, part in fields.items():
            _assign(clone, name, part, value)
        self._rebuilt_objects.append((value, clone, fields))
        return clone

    def _blank(self, value: Any) -> Any:
        """An object of the value's class, of which only the attributes are still to be set."""
        with contextlib.suppress(TypeError):
            return object.__new__(type(value))
        # What a class written in C keeps outside of attributes cannot be seen from here.
        seen = {id(part) for part in _fields(value).values()} | {id(getattr(value, "__dict__", None))}
        if any(
            id(part) in self._leading_back | self._own and id(part) not in seen
            for part in gc.get_referents(value)
        ):
            return _MISSING
        with contextlib.suppress(TypeError):
            return copy.copy(value)
        return _MISSING


def _leads_nowhere(value: Any) -> bool:
    """Whether it is plain, without a search, that the value does not lead to a module."""
    if isinstance(value, type):
        return True
    if isinstance(value, types.FunctionType):
        plain = _IMMUTABLE.issuperset(map(type, value.__defaults__ or ()))
        return value.__closure__ is None and plain and not value.__kwdefaults__ and not vars(value)
    return isinstance(value, types.BuiltinFunctionType) and isinstance(
        value.__self__, types.ModuleType | type | None
    )


def _leading_back(roots: Iterable[Any], own: set[int]) -> set[int]:
    """The ids of everything on a path from the roots to one of ``own``."""
    parents: dict[int, list[int]] = {}
    seen = {id(root): root for root in roots}
    coming = deque(seen.values())
    found = set()
    while coming and len(seen) < _MAX_SEARCHED:
        value = coming.popleft()
        for part in _leads_to(value):
            key = id(part)
            if type(part) in _IMMUTABLE:
                continue
            parents.setdefault(key, []).append(id(value))
            if key in own:
                found.add(key)
            elif key not in seen:
                seen[key] = part
                coming.append(part)
    leading_back: set[int] = set()
    while found:
        new = {parent for key in found for parent in parents.get(key, ())} - leading_back
        leading_back |= new
        found = new
    return leading_back


def _leads_to(value: Any) -> list[Any]:
    """What an object refers to, also weakly, without a function's global names and without classes."""
    kind = type(value)
    if kind in weakref.ProxyTypes:
        return [_referent(value)]
    if isinstance(value, weakref.WeakMethod):
        return gc.get_referents(value())
    if isinstance(value, weakref.ref):
        return [value(), value.__callback__]
    if isinstance(value, types.FunctionType):
        return [*(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__, *vars(value).values()]
    if isinstance(value, _LEADING_NOWHERE):
        return []
    return gc.get_referents(value)


def _referent(proxy: Any) -> Any:
    """The object behind a weak proxy."""
    try:
        return proxy.__init__.__self__
    except ReferenceError:
        return None


def _fields(value: Any) -> dict[str, Any]:
    """All attributes that an object holds, in its __dict__ or in slots."""
    return {**getattr(value, "__dict__", {}), **_slots(value)}


def _assign(target: Any, name: str, value: Any, like: Any) -> None:
    """Set an attribute where ``like`` has it, in its __dict__ or in a slot, without the class's own __setattr__."""
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
