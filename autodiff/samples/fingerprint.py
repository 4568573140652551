"""A short text that changes when values do: tensors, modules, functions with what they capture.

It tells whether the results in a file belong to the run that is to be resumed.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import hashlib
import sys
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from autodiff.core import trees

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)

# The members of an object of an unknown class that are read.
_READ = (Tensor, nn.Module, FunctionType)


def fingerprint(value: Any) -> str:
    """Equal for equal values, in another process too.

    >>> fingerprint({"w": torch.ones(2)}) == fingerprint({"w": torch.ones(2)})
    True
    >>> fingerprint({"w": torch.ones(2)}) == fingerprint({"w": torch.zeros(2)})
    False
    """
    reader = _Hasher()
    reader.read(value)
    return reader.digest()


class _Hasher:
    """Feeds values to a hash, each object once.

    Of an object of an unknown class, only tensors, modules and functions are read: a counter, a clock or an open file
    would make every run a different one.
    """

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # so that no id is reused

    def digest(self) -> str:
        return self._hash.hexdigest()

    def _feed(self, *words: object) -> None:
        for word in words:
            data = word if isinstance(word, bytes) else repr(word).encode()
            self._hash.update(len(data).to_bytes(8, "little") + data)

    def read(self, value: Any) -> None:
        """Feed a value."""
        if isinstance(value, _PLAIN):
            self._feed(type(value).__qualname__, value)
            return
        if id(value) in self._seen:
            self._feed("again", self._seen[id(value)])
            return
        self._seen[id(value)] = len(self._seen)
        self._kept.append(value)
        match value:
            case Tensor():
                self._tensor(value)
            case nn.Module():
                self._module(value)
            case FunctionType():
                self._function(value)
            case MethodType():
                self._feed("method")
                self._read_all(value.__func__, value.__self__)
            case functools.partial():
                self._feed("partial")
                self._read_all(value.func, value.args, value.keywords)
            case ModuleType():
                self._feed("package", value.__name__)
            case BuiltinFunctionType() | type():
                self._feed("builtin", getattr(value, "__module__", ""), value.__qualname__)
            case CodeType():
                self._code(value)
            case set() | frozenset():
                self._feed("set", sorted(map(repr, value)))
            case _:
                self._object(value)

    def _object(self, value: Any) -> None:
        if hasattr(value, "__array_interface__"):
            self._tensor(torch.as_tensor(value))
        elif dataclasses.is_dataclass(value):
            self._feed(type(value).__qualname__)
            self._read_all(*(getattr(value, field.name) for field in dataclasses.fields(value)))
        elif not trees.is_leaf(value):
            leaves, spec = trees.flatten(value)
            self._feed("tree", str(spec))
            self._read_all(*leaves)
        else:
            self._feed("object", type(value).__module__, type(value).__qualname__)
            members = sorted(getattr(value, "__dict__", {}).items())
            self._read_all(*(member for _, member in members if isinstance(member, _READ)))

    def _read_all(self, *values: Any) -> None:
        self._feed(len(values))
        for value in values:
            self.read(value)

    def _tensor(self, tensor: Tensor) -> None:
        self._feed("tensor", tensor.dtype, tuple(tensor.shape))
        dense = tensor.detach()
        dense = (dense.to_dense() if dense.layout is not torch.strided else dense).cpu()
        whole = dense.resolve_conj().resolve_neg().contiguous()
        self._hash.update(whole.reshape(-1).view(torch.uint8).numpy().data)

    def _module(self, module: nn.Module) -> None:
        self._feed("module", repr(module))
        for part in module.modules():
            self._feed(type(part).__module__, type(part).__qualname__, part.training)
            own = sorted((name, value) for name, value in vars(part).items() if not name.startswith("_"))
            self._read_all(
                type(part).forward, *(value for _, value in own if isinstance(value, (*_PLAIN, *_READ)))
            )
        self._read_all(dict(module.named_parameters()), dict(module.named_buffers()))

    def _function(self, function: FunctionType) -> None:
        self._feed("function", function.__module__, function.__qualname__)
        self._code(function.__code__)
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        self._read_all(function.__defaults__, function.__kwdefaults__, *cells)
        if not _is_library(function.__module__):
            used = sorted(_names(function.__code__) & set(function.__globals__))
            self._read_all(*(function.__globals__[name] for name in used))

    def _code(self, code: CodeType) -> None:
        self._feed("code", code.co_code, code.co_names)
        for constant in code.co_consts:
            self.read(constant)


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def _names(code: CodeType) -> set[str]:
    """The global names that a function, or one inside it, uses."""
    own = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return own.union(*(_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)))


def _is_library(module: str | None) -> bool:
    """Whether the module is installed, so that its globals are not the user's values."""
    root = str(module).partition(".")[0]
    if root == "autodiff" or root in sys.stdlib_module_names - {"__main__"}:
        return True
    file = getattr(sys.modules.get(str(module)), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file
