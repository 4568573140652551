"""What a function writes to tensors that it did not make. Imports `_torch` and the hooks of `core`."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autodiff._torch import DispatchMode
from autodiff.core import hooks

if TYPE_CHECKING:
    from collections.abc import Iterator


class OutsideWrites(DispatchMode):
    """Tensors that operations inside write to and that were made outside, with what they held.

    It is noticed by torch's names: ``add_`` writes to its first argument, ``out=`` is written, and so are the running
    statistics of a batch norm in training mode.
    """

    def __init__(self) -> None:
        super().__init__()
        # Storages that are alive, by id: whether they were made inside, and what tells of their end.
        self._seen: dict[int, tuple[bool, Any]] = {}
        self.written: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        self._see((args, list(kwargs.values())), made=False)
        for tensor in _written(str(func.__name__), args, kwargs):
            if id(tensor) not in self.written and not self._seen[id(tensor.untyped_storage())][0]:
                self.written[id(tensor)] = tensor, tensor.clone()
        override = hooks.dispatch_overrides.get(func)
        result = func(*args, **kwargs) if override is None else override(func, args, kwargs)
        self._see(result, made=True)
        return result

    def _see(self, value: Any, *, made: bool) -> None:
        for tensor in _tensors(value):
            storage = tensor.untyped_storage()
            key = id(storage)
            if key not in self._seen:
                self._seen[key] = made, weakref.ref(storage, partial(self._forget, key))

    def _forget(self, key: int, _: object) -> None:
        del self._seen[key]

    def put_back(self) -> None:
        """Give the tensors what they held."""
        with torch.no_grad():
            for tensor, before in self.written.values():
                tensor.copy_(before)


def _written(name: str, args: Any, kwargs: Any) -> Iterator[Tensor]:
    operation = name.partition(".")[0]
    if operation.endswith("_") and not operation.endswith("__"):
        yield from _tensors(args[:1])
    yield from _tensors(kwargs.get("out"))
    # (input, weight, bias, running_mean, running_var, training, ...)
    if "batch_norm" in operation and "backward" not in operation and len(args) > 5:
        is_training = args[5] is True or "with_update" in operation
        yield from _tensors(args[3:5] if is_training else ())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.layout is torch.strided:
            yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
