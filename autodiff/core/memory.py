"""How much memory there is, and how much a piece of work takes.

Provides budgets in bytes, `free`, and `Meter`, which measures the peak of what runs inside it. Never
sees a tree of the user's; imports `_torch` and `errors`.
"""

from __future__ import annotations

import re
import weakref
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from autodiff._torch import DispatchMode, WithoutFunctionModes, says
from autodiff.core import hooks
from autodiff.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterable

# What a run may take where nobody says: this share of the memory that is free when it starts.
SHARE = 0.5

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?)(i?)B\s*", re.IGNORECASE)


def parse_bytes(name: str, memory: object, left_out: str = f"use {SHARE:.0%} of what is free") -> int:
    """A quantity of memory in bytes; ``left_out`` says in an error what it means to give none.

    >>> [parse_bytes("per_sample", text) for text in ("1.5GiB", "2 kB", 10)]
    [1610612736, 2000, 10]
    """
    quantity = None
    if isinstance(memory, int) and not isinstance(memory, bool):
        quantity = memory
    elif isinstance(memory, str) and (match := _QUANTITY.fullmatch(memory)):
        number, prefix, binary = match.groups()
        quantity = int(float(number) * (_BINARY if binary else _UNITS)[prefix.upper()])
    if quantity is None or quantity <= 0:
        raise OptionError(
            f"{name}: memory is a positive number of bytes, or a text such as '512MiB' or '2GB', got "
            f"{memory!r}. Leave it out to {left_out}."
        )
    return quantity


def format_bytes(size: float) -> str:
    """Bytes as a person reads them.

    >>> format_bytes(2**29), format_bytes(1210)
    ('512.0 MiB', '1.2 KiB')
    """
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f} {unit}" if unit != "B" else f"{size:.0f} B"
        size /= 1024
    return f"{size:.1f} GiB"


def free_bytes(device: torch.device) -> int:
    """The bytes that may still be allocated on the device, as far as the system tells."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    import psutil  # noqa: PLC0415  takes 10 ms, and few need it

    available: int = psutil.virtual_memory().available
    return min([available, *_free_in_container()])


def _free_in_container(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What the control group of this process leaves, which psutil does not ask; empty where it has no limit."""
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            return [max(0, int((root / limit).read_text()) - int((root / usage).read_text()))]
        except (OSError, ValueError):
            continue  # no such file, or "max"
    return []


def device_of(leaves: Iterable[Any]) -> torch.device:
    """Where the leaves' work is done: on their first accelerator, else on the CPU."""
    devices = [leaf.device for leaf in leaves if isinstance(leaf, Tensor)]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and says(error, "out of memory")


class Meter:
    """The most bytes that were allocated at one time inside ``with``, beyond those from before.

    On CUDA the allocator tells (its own peak statistics start anew); elsewhere every operation's
    results are counted for as long as they live, whatever an operation needs in between left out. There
    ``operations`` says how many there were, and ``produced`` how many bytes they made in all. ``remaining`` are the
    bytes that still live at the end.

    >>> with Meter(torch.device("cpu")) as meter:
    ...     for _ in range(3):
    ...         x = torch.ones(1000) + 1.0
    >>> meter.peak, meter.produced  # two at a time, besides the result of the time before
    (12000, 24000)
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counter = None if device.type == "cuda" else _LiveBytes()
        self.peak = self.produced = self.operations = self.remaining = 0

    def __enter__(self) -> Self:
        if self._counter is None:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._counter.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._counter is None:
            torch.cuda.synchronize(self._device)
            self.peak = torch.cuda.max_memory_allocated(self._device) - self._before
            self.remaining = torch.cuda.memory_allocated(self._device) - self._before
        else:
            self._counter.__exit__(None, None, None)
            self.peak, self.produced = self._counter.peak, self._counter.produced
            self.operations, self.remaining = self._counter.operations, self._counter.total


class _LiveBytes(DispatchMode):
    """Counts the storages that operations make, beneath every transform, until they die."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.produced = self.operations = self.total = 0
        # By storage: its size, 0 for one from before, and what tells of its end.
        self._alive: dict[int, tuple[int, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.operations += 1
        # Function modes have seen the operation. A checkpoint around would take what it finds here for captured.
        with WithoutFunctionModes():
            self._see((args, kwargs), new=False)
            override = hooks.dispatch_overrides.get(func)
            kwargs = kwargs or {}
            result = func(*args, **kwargs) if override is None else override(func, args, kwargs)
            self._see(result, new=True)
        return result

    def _see(self, tree: Any, *, new: bool) -> None:
        for storage in _storages(tree):
            key = id(storage)
            if key not in self._alive:
                size = storage.nbytes() if new else 0
                self._alive[key] = size, weakref.ref(storage, partial(self._forget, key))
                self.total += size
                self.produced += size
        self.peak = max(self.peak, self.total)

    def _forget(self, key: int, _: object) -> None:
        size, _ = self._alive.pop(key)
        self.total -= size


def _storages(tree: Any) -> Iterable[Any]:
    """The storages of the dense tensors in an operation's arguments or results."""
    if isinstance(tree, Tensor):
        if tree.layout is torch.strided:
            yield tree.untyped_storage()
    elif isinstance(tree, list | tuple):
        for child in tree:
            yield from _storages(child)
    elif isinstance(tree, dict):
        yield from _storages(list(tree.values()))
