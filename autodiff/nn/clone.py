"""A clone of a module, with other tensors, which a call may change as it likes.

Provides `ModuleClone`. What belongs to the module is copied: modules, and containers in their attributes. What it
merely refers to (functions, objects of other classes) is shared, unless it leads back to the module: then that part is
rebuilt so that it leads to the clone. Tensors are shared but for those that are replaced. How far is searched is
bounded by the number of modules; where something lies further away, or cannot be seen, a call of a layer that was not
cloned is an error. Imports `errors`, `_torch`, `references` and `refusal`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import types
import weakref
from collections import OrderedDict, deque
from contextvars import ContextVar
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autodiff._torch import copy_of_scripted
from autodiff.errors import CloneError
from autodiff.nn import references
from autodiff.nn.references import CONTAINERS, IMMUTABLE, WITH_OWN_COPY
from autodiff.nn.refusal import call_refusing, found_by_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_LRU_CACHE: type = type(functools.cache(len))
_BUILTIN_METHODS = types.BuiltinMethodType | types.MethodWrapperType

# The attributes that every module has, and those among them that are hooks or a set.
_NEW = vars(nn.Module())
_NAMES = [*_NEW]
_STANDARD = tuple(name for name, value in _NEW.items() if isinstance(value, OrderedDict | set))
_standard_of = itemgetter(*_STANDARD)
_PER_MODULE = ("_backward_pre_hooks", "_backward_hooks", "_forward_pre_hooks", "_forward_hooks")
_SHARED = [(name, type(_NEW[name])) for name in _STANDARD if name not in _PER_MODULE]

# A heuristic: so many references are followed in search of a way back, nearest first, and so many more for each module.
_FOLLOWED, _FOLLOWED_PER_MODULE = 1000, 50
_MISSING = object()


class ModuleClone:
    """The clone of a module and of all that leads back to it.

    Args:
        module: the module.
        replacements: by the ``id`` of a tensor of the module, the one that the clone has instead.
        copy_buffer: gives what the clone has for a buffer that is not replaced: for its owner, its name, and it.
    """

    def __init__(
        self,
        module: nn.Module,
        replacements: Mapping[int, Tensor],
        copy_buffer: Callable[[nn.Module, str, Tensor], Tensor],
    ) -> None:
        self._copy_buffer = copy_buffer
        self._memo: dict[int, Any] = dict(replacements)
        # The modules that were cloned, of which the first so many clones are filled; what their attributes are.
        self.originals: list[nn.Module] = []
        self._filled = 0
        self._attributes: list[tuple[nn.Module, str, Any]] = []
        self._simple: set[type] = set()
        self._nothing = {name: kind() for name, kind in _SHARED}
        # The search.
        self._coming: deque[tuple[Any, bool]] = deque()
        self._own: set[int] = set()
        self._seen: dict[int, Any] = {}
        self._parents: dict[int, list[int]] = {}
        self._code: set[Any] = set()
        self._followed = 0
        self._out_of_sight = False
        self._leading_back: set[int] = set()
        # What is rebuilt.
        self._place: tuple[type, str] | None = None
        self._hollow: deque[tuple[Any, Any, tuple[type, str] | None]] = deque()
        self._rebuilt_objects: list[tuple[Any, Any, dict[str, Any]]] = []

        self.root = self._clone(module)
        self._explore()
        if self._parents:
            self._find_ways_back()
        for owner, name, value in self._attributes:
            self._place = type(owner), name
            references.assign(self._memo[id(owner)], name, self._copied(value), owner)
            while self._hollow:
                self._fill_hollow(*self._hollow.pop())

    def counterpart(self, module: nn.Module) -> nn.Module:
        """The module of the clone that corresponds to one of the module's tree."""
        clone: nn.Module = self._memo[id(module)]
        return clone

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Call the clone. What is assigned to objects that had to be rebuilt, and belong to no module, is kept."""
        try:
            if not (self._out_of_sight or (self._code and self._found_by_name())):
                return self.root(*args, **kwargs)
            return call_refusing(self.originals, self.root, args, kwargs)
        finally:
            self._write_back()

    def _found_by_name(self) -> bool:
        """Whether users' code may find a module that was cloned by a name, which means the same to the clone."""
        return any(id(module) in self._memo for module in found_by_name(self._code))

    def _write_back(self) -> None:
        originals = {id(clone): original for original, clone, _ in self._rebuilt_objects}
        for original, clone, before in self._rebuilt_objects:
            for name, value in references.fields(clone).items():
                if before.get(name, _MISSING) is not value:
                    references.assign(original, name, originals.get(id(value), value), clone)

    # Modules.

    def _clone(self, original: Any) -> nn.Module:
        """The clone of a module, which is filled later: so that no depth of nesting is too deep."""
        clone: Any = self._memo.get(id(original))
        if clone is None:
            kind = type(original)
            if kind in weakref.ProxyTypes:
                clone = weakref.proxy(self._clone(references.referent(original)))
            else:
                clone = object.__new__(kind) if kind in self._simple else self._empty_clone(original, kind)
                self.originals.append(original)
            self._memo[id(original)] = clone
        return clone  # type: ignore[no-any-return]

    def _empty_clone(self, original: nn.Module, kind: type) -> Any:
        if not kind.__module__.startswith("torch."):
            self._code.add(kind)
        if isinstance(original, torch.jit.ScriptModule):
            return copy_of_scripted(original)  # TorchScript's own shallow copy
        if kind.__basicsize__ == nn.Module.__basicsize__ and not hasattr(kind, "__del__"):
            self._simple.add(kind)
        try:
            return references.blank(kind)
        except TypeError:
            raise CloneError(
                f"functional_call: {kind.__name__} derives from nn.Module and from a class written in C, or has both "
                f"__slots__ and __del__, and cannot be copied. Expected Python classes besides nn.Module. Make the "
                f"other object an attribute of the module."
            ) from None

    def _fill(self, original: nn.Module) -> None:
        memo, clone, simple = self._memo, self._memo[id(original)], type(original) in self._simple
        if not simple and isinstance(original, torch.jit.ScriptModule):
            self._fill_scripted(original, clone)
            return
        own, fields = original.__dict__, clone.__dict__
        fields.update(own)
        # What may be shared while it is empty: hooks whose keys are unique, and those of saving and loading.
        fields.update(self._nothing)
        fields["_backward_pre_hooks"], fields["_backward_hooks"] = OrderedDict(), OrderedDict()
        fields["_forward_pre_hooks"], fields["_forward_hooks"] = OrderedDict(), OrderedDict()
        buffers, tensors, children = own["_buffers"], own["_parameters"], own["_modules"]
        if buffers:
            self._copy_buffers(original, buffers)
        fields["_buffers"] = {name: memo.get(id(t), t) for name, t in buffers.items()} if buffers else {}
        fields["_parameters"] = {name: memo.get(id(t), t) for name, t in tensors.items()} if tensors else {}
        fields["_modules"] = table = {}
        for name, child in children.items():
            table[name] = None if child is None else self._clone(child)
        if any(_standard_of(own)):
            for name in _STANDARD:
                if own[name]:
                    self._attribute(original, name, own[name])
        if len(own) > len(_NEW):
            names = [*own]
            for name in names[len(_NEW) :] if names[: len(_NEW)] == _NAMES else own.keys() - _NEW.keys():
                value = own[name]
                kind = type(value)
                if kind not in IMMUTABLE and not (kind is tuple and references.is_plain(value)):
                    self._attribute(original, name, value)
        if not simple:
            for name, value in references.slots(original).items():
                self._attribute(original, name, value)

    def _copy_buffers(self, owner: nn.Module, buffers: Mapping[str, Tensor | None]) -> None:
        for name, buffer in buffers.items():
            if buffer is not None and id(buffer) not in self._memo:
                copied = self._copy_buffer(owner, name, buffer)
                if copied is not buffer:
                    self._memo[id(buffer)] = copied

    def _fill_scripted(self, original: Any, clone: Any) -> None:
        self._copy_buffers(original, original._buffers)
        for name, tensor in [*original._buffers.items(), *original._parameters.items()]:
            clone._c.setattr(name, self._memo.get(id(tensor), tensor))
        for name, child in original._modules.items():
            clone._modules[name] = self._clone(child)

    def _attribute(self, owner: nn.Module, name: str, value: Any) -> None:
        self._attributes.append((owner, name, value))
        self._meet(value, owned=True)

    # The search: what belongs to the modules, and what leads back to them.

    def _meet(self, value: Any, *, owned: bool) -> None:
        """Take note of an object. A module's own containers, and what may lead back, are explored later."""
        kind, key = type(value), id(value)
        if kind in IMMUTABLE or key in self._memo or key in self._own:
            return
        if kind is nn.Parameter:
            return
        if kind is weakref.ref and isinstance(value(), Tensor):
            # Recurrent layers have such references to their weights.
            tensor = self._memo.get(id(value()))
            self._memo[key] = value if tensor is None else weakref.ref(tensor)
            return
        if kind is types.FunctionType and not (value.__module__ or "").startswith("torch."):
            self._code.add(value)
        if owned and issubclass(kind, nn.Module):
            self._clone(value)
        elif owned and kind in WITH_OWN_COPY and references.is_plain(value):
            self._memo[key] = value.copy()
        elif owned and issubclass(kind, CONTAINERS):
            self._own.add(key)
            self._coming.append((value, True))
        elif key not in self._seen and not references.leads_nowhere(value):
            self._seen[key] = value
            self._coming.append((value, False))

    def _explore(self) -> None:
        """Fill all modules, and look into what they hold."""
        while True:
            while self._filled < len(self.originals):
                self._filled += 1
                self._fill(self.originals[self._filled - 1])
            if not self._coming:
                return
            value, owned = self._coming.popleft()
            near = self._followed <= _FOLLOWED + _FOLLOWED_PER_MODULE * len(self.originals)
            parts = references.leads_to(value) if near else None
            if parts is None or (owned and len(parts) < len(value)):
                # Data, which is shared.
                self._out_of_sight |= parts is None
                self._own.discard(id(value))
                continue
            self._followed += len(parts)
            for part in parts:
                if type(part) not in IMMUTABLE:
                    if not owned:
                        self._parents.setdefault(id(part), []).append(id(value))
                    self._meet(part, owned=owned)

    def _find_ways_back(self) -> None:
        """Find what leads back to the module. Modules among it are cloned as well, which may show more."""
        known = -1
        while known != len(self.originals):
            known = len(self.originals)
            found = self._memo.keys() | self._own
            self._leading_back = set()
            while found:
                found = {
                    parent for key in found for parent in self._parents.get(key, ())
                } - self._leading_back
                self._leading_back |= found
            for key in self._leading_back:
                if issubclass(type(self._seen[key]), nn.Module):
                    self._clone(self._seen[key])
            self._explore()

    # What the clone has instead.

    def _copied(self, value: Any) -> Any:
        key = id(value)
        known = self._memo.get(key, _MISSING)
        if known is not _MISSING:
            return known
        if key not in self._own and key not in self._leading_back:
            return value
        kind = type(value)
        if issubclass(kind, tuple | frozenset):
            return self._immutable_container(value)
        if issubclass(kind, CONTAINERS):
            clone = self._memo[key] = value.copy() if kind in WITH_OWN_COPY else copy.copy(value)
            # Objects are filled before containers, which may need their hash.
            self._hollow.appendleft((value, clone, self._place))
        else:
            clone = self._memo[key] = self._rebuilt(value)
        return clone

    def _immutable_container(self, value: Any) -> Any:
        items = [self._copied(item) for item in value]
        if all(item is old for item, old in zip(items, value, strict=True)):
            return value
        base = tuple if isinstance(value, tuple) else frozenset
        clone: Any = base.__new__(type(value), items)
        self._memo[id(value)] = clone
        return clone

    def _fill_hollow(self, value: Any, clone: Any, place: tuple[type, str] | None) -> None:
        """Fill a container or object, which no depth of nesting makes too deep either."""
        if issubclass(type(value), CONTAINERS):
            self._place = place
            self._fill_container(value, clone)
            return
        self._place = None
        fields = self._parts(references.fields(value))
        for name, part in fields.items():
            references.assign(clone, name, part, value)
        self._rebuilt_objects.append((value, clone, fields))

    def _fill_container(self, value: Any, clone: Any) -> None:
        is_dict = isinstance(value, dict)
        contents = [*dict.keys(value), *dict.values(value)] if is_dict else [*value]
        items = [self._copied(item) for item in contents]
        if all(item is old for item, old in zip(items, contents, strict=True)):
            return
        clone.clear()
        if is_dict:
            update = OrderedDict.update if isinstance(clone, OrderedDict) else dict.update
            update(clone, zip(items[: len(value)], items[len(value) :], strict=True))
        else:
            (clone.update if isinstance(clone, set) else clone.extend)(items)

    def _rebuilt(self, value: Any) -> Any:
        """A function, a method, a reference or an object that leads back to the module; the copy leads to the clone."""
        kind = type(value)
        if issubclass(kind, types.FunctionType):
            return self._function(value)
        if kind is types.MethodType:
            return types.MethodType(self._copied(value.__func__), self._copied(value.__self__))
        if issubclass(kind, functools.partial):
            clone = kind(
                self._copied(value.func), *map(self._copied, value.args), **self._parts(value.keywords)
            )
            vars(clone).update(self._parts(vars(value)))
            return clone
        if kind is _LRU_CACHE:
            # Its cached results were computed from other tensors.
            return functools.lru_cache(**value.cache_parameters())(self._copied(value.__wrapped__))
        if issubclass(kind, _BUILTIN_METHODS):
            return getattr(self._copied(value.__self__), value.__name__)
        if kind in weakref.ProxyTypes:
            return weakref.proxy(self._copied(references.referent(value)))
        if kind is weakref.WeakMethod:
            method = value()  # a new object for each call
            return weakref.WeakMethod(
                types.MethodType(self._copied(method.__func__), self._copied(method.__self__))
            )
        if kind is weakref.KeyedRef:
            return kind(self._copied(value()), self._copied(value.__callback__), value.key)
        if kind is weakref.ref:
            return kind(self._copied(value()), self._copied(value.__callback__))
        if kind is ContextVar:
            found = self._copied(value.get())
            return ContextVar(value.name, default=found)
        if references.is_object_array(value):
            clone = value.copy()
            clone.flat = [self._copied(item) for item in value.flat]
            return clone
        return self._object(value)

    def _parts(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self._copied(value) for name, value in values.items()}

    def _function(self, value: types.FunctionType) -> types.FunctionType:
        closure = value.__closure__ or ()
        leading = [cell for cell in closure if id(cell) in self._leading_back and id(cell) not in self._memo]
        # The cells are filled last: a function may lead to itself.
        self._memo.update((id(cell), types.CellType()) for cell in leading)
        cells = tuple(self._memo.get(id(cell), cell) for cell in closure)
        clone = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, cells or None)
        self._memo[id(value)] = clone
        for cell in leading:
            self._memo[id(cell)].cell_contents = self._copied(cell.cell_contents)
        clone.__defaults__, clone.__kwdefaults__ = (
            self._copied(value.__defaults__),
            self._copied(value.__kwdefaults__),
        )
        for name in ("__doc__", "__module__", "__qualname__", "__annotations__"):
            setattr(clone, name, getattr(value, name))
        vars(clone).update(self._parts(vars(value)))
        return clone

    def _object(self, value: Any) -> Any:
        clone = self._blank(value)
        if clone is not _MISSING:
            self._hollow.append((value, clone, None))
            return clone
        if self._place is not None:
            owner, name = self._place
            raise CloneError(
                f"functional_call: {owner.__name__}.{name} is, or holds, a {type(value).__name__} that leads back to "
                f"the module and cannot be copied. Expected functions, methods, containers, and objects of Python "
                f"classes. Make it in forward, or call the part of the module that does not need it."
            )
        # A trainer holds the module, and it holds loaders and pools that lead back to the trainer.
        self._out_of_sight = True
        return value

    def _blank(self, value: Any) -> Any:
        """An object of the value's class, of which only the attributes are still to be set."""
        kind = type(value)
        with contextlib.suppress(TypeError):
            return _MISSING if issubclass(kind, type) else references.blank(kind)
        if hasattr(kind, "__del__"):
            return _MISSING
        # What a class written in C keeps outside of attributes cannot be seen from here.
        seen = {id(part) for part in references.fields(value).values()} | {
            id(getattr(value, "__dict__", None))
        }
        cloned = self._leading_back | self._own | self._memo.keys()
        if any(id(part) in cloned and id(part) not in seen for part in gc.get_referents(value)):
            return _MISSING
        with contextlib.suppress(TypeError):
            return copy.copy(value)
        return _MISSING
