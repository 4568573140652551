"""A short text that changes when values do: tensors, modules, functions with what they capture, objects.

It tells whether the results in a file belong to the run that is to be resumed.
"""

from __future__ import annotations

import copyreg
import dis
import hashlib
import logging
import sys
import threading
import weakref
from collections import OrderedDict, deque
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from autodiff.core.chunks import Sizes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# A part of a value, and where it is, in words for messages.
Part: TypeAlias = tuple[str, Any]

# How the fingerprint of what cannot be compared begins; the rest names it.
OPAQUE = "opaque: "

_PLAIN = {
    *(bool, int, float, complex, str, bytes, type(None), type(...), type(NotImplemented)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
}
_CONTAINERS = {list, tuple, deque, dict, OrderedDict, set, frozenset, MappingProxyType}
# How many parts an outline has.
_OUTLINE = 500
_LOADS_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME"}


def fingerprint(value: Any, place: str = "value", *, outline: bool = False) -> str:
    """Equal for equal values, in another process too.

    Where a part cannot be read, the text says which; ``place`` is what messages call the value. With ``outline``, the
    lines before the last are about the first parts, so that `difference` can say which of them has changed.

    >>> fingerprint({"w": torch.ones(2)}) == fingerprint({"w": torch.ones(2)})
    True
    >>> fingerprint({"w": torch.ones(2)}) == fingerprint({"w": torch.zeros(2)})
    False
    >>> fingerprint([number for number in range(2)], "x") == fingerprint([0, 1])
    True
    >>> fingerprint({"w": (number for number in range(2))}, "x")
    "opaque: x['w'], a builtins.generator"
    """
    return _Hasher().fingerprint(value, place, _OUTLINE if outline else 0)


def difference(one: str, other: str) -> str | None:
    """The place of the first part in which two values differ, where their outlines tell.

    >>> one, other = (fingerprint({"a": 1, "b": number}, "x", outline=True) for number in (2, 3))
    >>> difference(one, other)
    "x['b']"
    """
    pairs = zip(one.splitlines()[:-1], other.splitlines()[:-1], strict=False)
    return next((line.rpartition(" ")[0] for line, known in pairs if line != known), None)


class _Hasher:
    """Feeds values to a hash, each object once, depth first.

    Of an object of a class that is not known here, what pickle would store is read, and all its attributes: what a
    method computes with may be anywhere.
    """

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no id is reused

    def fingerprint(self, value: Any, place: str, outline: int) -> str:
        lines: list[str] = []
        # Not by recursion: modules and lists may be nested deeply.
        remaining: list[Part] = [(place, value)]
        while remaining:
            place, value = remaining.pop()
            try:
                parts = self._read(place, value)
            except Exception:  # noqa: BLE001  whatever a class of somebody else's raises where it is not to be read
                return f"{OPAQUE}{place}, a {type(value).__module__}.{type(value).__qualname__}"
            self._feed(len(parts))
            remaining += reversed(parts)
            if len(lines) < outline:
                # The hash of everything up to here: the first line that differs is about what has changed.
                lines.append(f"{place} {self._hash.hexdigest()[:8]}")
        return "\n".join([*lines, self._hash.hexdigest()])

    def _feed(self, *words: object) -> None:
        for word in words:
            data = word if isinstance(word, bytes) else repr(word).encode()
            self._hash.update(len(data).to_bytes(8, "little") + data)

    def _read(self, place: str, value: Any) -> list[Part]:
        """Feed a value, and say which parts of it are to be read next."""
        kind = type(value)
        if kind in _PLAIN:
            self._feed(f"{kind.__qualname__} {value!r}")
            return []
        self._feed(kind.__module__, kind.__qualname__)
        if kind is not tuple:  # whether equal tuples are one object is for Python to decide
            if id(value) in self._seen:
                self._feed("again", self._seen[id(value)])
                return []
            self._seen[id(value)] = len(self._seen)
            self._kept.append(value)
        for classes, read in self._READERS:
            if isinstance(value, classes):
                return read(self, place, value)
        return self._object(place, value)

    def _list(self, place: str, value: Any) -> list[Part]:
        elements = [(f"{place}[{at}]", element) for at, element in enumerate(value)]
        return [*elements, *self._attributes(place, value)]

    def _dict(self, place: str, value: Any) -> list[Part]:
        default = getattr(value, "default_factory", None)
        return [(place, default), *_entries(place, value.items()), *self._attributes(place, value)]

    def _set(self, place: str, value: Any) -> list[Part]:
        self._feed(*sorted(_of_element(element, place) for element in value))
        return self._attributes(place, value)

    def _array(self, place: str, value: Any) -> list[Part]:
        self._feed(value.dtype, value.shape, value.tobytes())
        return self._attributes(place, value)

    def _builtin(self, place: str, value: Any) -> list[Part]:
        owner = value.__self__ if isinstance(value, BuiltinFunctionType) else None
        self._feed(getattr(value, "__module__", None), getattr(value, "__qualname__", str(value)))
        return [] if isinstance(owner, ModuleType) else [(f"{place}.__self__", owner)]

    def _name(self, place: str, value: Any) -> list[Part]:
        del place
        self._feed(getattr(value, "__name__", None), getattr(value, "name", None))
        return []

    def _object(self, place: str, value: Any) -> list[Part]:
        """What pickle would store of an object, and all its attributes."""
        kind = type(value)
        if hasattr(value, "__array_interface__") and hasattr(value, "tobytes") and not value.dtype.hasobject:
            return self._array(place, value)
        reduced = (
            copyreg.dispatch_table[kind](value) if kind in copyreg.dispatch_table else value.__reduce_ex__(4)
        )
        if isinstance(reduced, str):
            self._feed(reduced)
            return self._attributes(place, value)
        make, arguments, state, elements, entries = (*reduced, None, None, None)[:5]
        return [
            *self._attributes(place, value),
            (place, make),
            (place, arguments),
            (place, state),
            (place, list(elements or ())),
            *_entries(place, entries or ()),
        ]

    def _attributes(self, place: str, value: Any) -> list[Part]:
        """The class of an object, and what it has been given besides what it holds as a list, dict or number."""
        if type(value) in _CONTAINERS:
            return []
        attributes = sorted(getattr(value, "__dict__", {}).items())
        return [
            (f"{place}.__class__", type(value)),
            *((f"{place}.{name}", part) for name, part in attributes),
        ]

    def _tensor(self, place: str, tensor: Tensor) -> list[Part]:
        self._feed(tensor.dtype, tuple(tensor.shape), tensor.device.type, tensor.layout)
        dense = tensor.detach()
        dense = (dense.to_dense() if dense.layout is not torch.strided else dense).cpu()
        whole = dense.resolve_conj().resolve_neg().contiguous()
        self._hash.update(whole.reshape(-1).view(torch.uint8).numpy().data)
        plain = type(tensor) in (Tensor, nn.Parameter, nn.Buffer)
        return [] if plain else self._attributes(place, tensor)

    def _module(self, place: str, module: nn.Module) -> list[Part]:
        parts: list[Part] = [(f"{place}.__class__", type(module))]
        for name, value in sorted(vars(module).items()):
            # The keys of hooks count all hooks of the process.
            hooks = isinstance(value, dict) and name.startswith("_") and "hooks" in name
            parts.append((f"{place}.{name}", list(value.values()) if hooks else value))
        return parts

    def _function(self, place: str, function: FunctionType) -> list[Part]:
        self._feed(function.__module__, function.__qualname__)
        parts: list[Part] = [(place, function.__code__)]
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                parts.append((name, cell.cell_contents))
            except ValueError:
                parts.append((name, "empty"))
        parts += [(place, function.__defaults__), (place, function.__kwdefaults__)]
        parts += _entries(place, vars(function).items())
        if not _is_library(function.__module__):
            parts += _used_globals(function)
        return parts

    def _code(self, place: str, code: CodeType) -> list[Part]:
        self._feed(code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_exceptiontable)
        return [(place, constant) for constant in code.co_consts]

    def _class(self, _: str, cls: type) -> list[Part]:
        """Of a class of the user's, its methods, constants and bases."""
        self._feed(cls.__module__, cls.__qualname__)
        if _is_library(cls.__module__):
            return []
        members = [
            (f"{cls.__qualname__}.{name}", member)
            for name, member in vars(cls).items()
            if _counts(name, member)
        ]
        return [*members, (cls.__qualname__, cls.__bases__)]

    # The first that fits is taken.
    _READERS: ClassVar[list[tuple[Any, Callable[[_Hasher, str, Any], list[Part]]]]] = [
        (Tensor, _tensor),
        (nn.Module, _module),
        (FunctionType, _function),
        (CodeType, _code),
        (type, _class),
        (
            MethodType,
            lambda _, place, value: [(place, value.__func__), (f"{place}.__self__", value.__self__)],
        ),
        ((staticmethod, classmethod), lambda _, place, value: [(place, value.__func__)]),
        (property, lambda _, place, value: [(place, value.fget)]),
        (weakref.ReferenceType, lambda _, place, value: [(place, value())]),
        # What holds nothing that a function computes with.
        ((ModuleType, type(threading.Lock()), type(threading.RLock()), logging.Logger), _name),
        ((BuiltinFunctionType, MethodDescriptorType, WrapperDescriptorType), _builtin),
        ((GetSetDescriptorType, MemberDescriptorType), _builtin),
        ((type(torch.ops.aten.sin), type(torch.ops.aten.sin.default)), _builtin),
        ((list, tuple, deque), _list),
        ((dict, MappingProxyType), _dict),
        ((set, frozenset), _set),
    ]


def _entries(place: str, items: Iterable[tuple[Any, Any]]) -> list[Part]:
    """The keys and values of a dict, but for chunk sizes that a transform has learnt."""
    kept = [(key, value) for key, value in items if not isinstance(value, Sizes)]
    return [part for key, value in kept for part in ((place, key), (f"{place}[{key!r:.40}]", value))]


def _of_element(element: Any, place: str) -> str:
    """The fingerprint of an element of a set; its order tells nothing."""
    text = fingerprint(element, f"an element of {place}")
    if text.startswith(OPAQUE):
        raise TypeError(text)
    return text


def _counts(name: str, member: Any) -> bool:
    """Whether a member of a class may decide on what it computes, and is not there for the interpreter."""
    if name.startswith("__") and name.endswith("__"):
        return isinstance(member, FunctionType | staticmethod | classmethod | property)
    return name not in ("_abc_impl", "_backward_cls")


def _used_globals(function: FunctionType) -> list[Part]:
    """The globals that a function uses, and what it may use of the user's modules among them."""
    codes = [function.__code__]
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    names = {
        step.argval for code in codes for step in dis.get_instructions(code) if step.opname in _LOADS_GLOBAL
    }
    attributes = sorted({name for code in codes for name in code.co_names})
    found = [(name, function.__globals__[name]) for name in sorted(names & set(function.__globals__))]
    seen: set[str] = set()
    for place, module in found:
        if (
            isinstance(module, ModuleType)
            and not _is_library(module.__name__)
            and module.__name__ not in seen
        ):
            seen.add(module.__name__)
            found += [(f"{place}.{name}", vars(module)[name]) for name in attributes if name in vars(module)]
    return found


def _is_library(module: str | None) -> bool:
    """Whether the module is installed, so that its globals are not the user's values."""
    root = str(module).partition(".")[0]
    if root == "__main__":  # its file may be that of an installed program which runs the user's
        return False
    if root == "autodiff" or root in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(str(module)), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file
