"""Work done in chunks, of sizes that are given or learnt, and what the chunks give put together.

Provides `Sizes` (how large the next chunk is) and `Chunks` (a batch in pieces, and their results in one
tensor). Never sees a tree; imports `_torch` and `memory`.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from autodiff import _torch
from autodiff.core import memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from autodiff.types import ChunkSize

R = TypeVar("R")

_CPU = torch.device("cpu")
# How much of a budget a chunk is meant to take: the meter does not see what operations need in between.
_BUDGET_FRACTION = 0.8
# On a CPU a chunk is large enough when its operations make so many bytes each, on the average: then what an
# operation costs in itself no longer counts. And it is too large, whatever the budget, when it takes more
# than this: allocations beyond 32 MiB come from the system page by page, each time anew. Larger chunks were
# up to 2 x slower in parameter Hessians of MLPs with 170, 433 and 1210 parameters and in a Hessian's rows.
_ENOUGH_PER_OPERATION = 384 * 2**10
_MAX_CPU_CHUNK = 64 * 2**20
# A chunk is at most this much larger than the one before.
_GROWTH = 32


class Sizes:
    """The size of the next chunk: one number, or learnt from what the chunks before took.

    Learning begins with a chunk of ``first``. What a chunk takes is thought to be linear in its size: one
    chunk of n items that took p bytes says that n b / p fit in b, or more, and two chunks determine the slope.
    Nothing but sizes decides, no clock, so that the same work is always done in the same chunks.

    >>> sizes = Sizes("auto", budget=1000)
    >>> sizes.learn(1, 10)
    >>> sizes.size, sizes.learning
    (32, True)
    >>> sizes.learn(32, 410)
    >>> sizes.size, sizes.learning
    (62, False)
    """

    def __init__(
        self, size: ChunkSize, budget: int = 0, *, device: torch.device = _CPU, first: int = 1
    ) -> None:
        self.adapts = self.learning = size == "auto"
        self.size: float = first if size == "auto" else float("inf") if size is None else size
        self.device = device
        self.budget = budget
        self._seen: list[int] | None = None

    @property
    def aim(self) -> float:
        """The peak that a chunk should have at most."""
        aim = _BUDGET_FRACTION * self.budget
        return aim if self.device.type != "cpu" else min(aim, _MAX_CPU_CHUNK)

    def reserve(self, size: int) -> None:
        """Take so many bytes out of the budget."""
        self.budget -= size
        if self.adapts and self._seen is not None:
            self.size = max(1, int(min(self.size, self._seen[0] * self.aim / max(self._seen[1], 1))))

    def learn(self, count: int, peak: int, produced: int = 0, operations: int = 0) -> None:
        """A chunk of ``count`` took ``peak`` bytes; its operations made ``produced`` bytes in all."""
        seen = [count, peak, produced]
        room = [self._room(seen, 1, self.aim)]
        if operations:
            room.append(self._room(seen, 2, _ENOUGH_PER_OPERATION * operations))
        self._seen = seen
        size = max(1, int(min(*room, _GROWTH * count)))
        # After learning, the size only shrinks.
        self.size = size if self.learning else min(size, self.size)
        self.learning = self.learning and size >= 2 * count

    def _room(self, seen: list[int], of: int, aim: float) -> float:
        """How many items may be in a chunk until entry ``of`` of ``seen`` reaches the aim."""
        count, took = seen[0], max(seen[of], 1)
        room = count * aim / took
        if self._seen is not None and count > self._seen[0] and took > self._seen[of]:
            slope = (took - self._seen[of]) / (count - self._seen[0])
            room = max(room, count + (aim - took) / slope)
        return room

    def take(self, remaining: int) -> int:
        """The size of the next chunk where so many items remain; learnt sizes are evened out."""
        if self.adapts and not self.learning and remaining > self.size:
            return ceil(remaining / ceil(remaining / self.size))
        return int(min(remaining, self.size))

    def measures(self, count: int) -> bool:
        """Whether a chunk of ``count`` would teach something."""
        return self.adapts and (self._seen is None or count > self._seen[0])

    def shrink(self, count: int) -> bool:
        """A chunk of ``count`` did not fit: whether half of it can be tried."""
        if not self.adapts or count <= 1:
            return False
        self.size = count // 2
        self.learning = False
        return True

    @property
    def state(self) -> list[Any]:
        """All that was learnt, in terms that a file can hold."""
        return [self.size, self.learning, self._seen, self.budget]

    @state.setter
    def state(self, state: list[Any]) -> None:
        self.size, self.learning, self._seen, self.budget = state


def sizes_for(chunk_size: ChunkSize, leaves: Iterable[Any]) -> Sizes:
    """Sizes for work on the leaves' device, within the share of its free memory that is ours."""
    if chunk_size != "auto":
        return Sizes(chunk_size)
    if _torch.compiling():
        return Sizes(None)  # a tracer allocates nothing, and knows no clock and no memory
    device = memory.device_of(leaves)
    return Sizes("auto", int(memory.SHARE * memory.free_bytes(device)), device=device)


class Chunks:
    """A batch of ``total`` in pieces, and their results put together.

    >>> chunks = Chunks(5, Sizes(2))
    >>> seen = []
    >>> chunks.each(lambda start, stop: None, lambda start, stop, _: seen.append((start, stop)))
    >>> seen
    [(0, 2), (2, 4), (4, 5)]
    """

    def __init__(self, total: int, sizes: Sizes) -> None:
        self.total, self._sizes = total, sizes
        # A number stands for that many zeros.
        self._pieces: dict[int, list[Tensor | int]] = {}
        self._buffers: dict[int, Tensor] = {}

    @property
    def in_one_chunk(self) -> bool:
        """Whether the next chunk is everything."""
        return self._sizes.size >= self.total

    def each(self, compute: Callable[[int, int], R], keep: Callable[[int, int, R], None]) -> None:
        """Show ``keep`` the ``start`` and ``stop`` of each chunk, and what ``compute`` makes of it.

        Of an empty batch there is one chunk, from 0 to 0. While sizes are learnt, chunks are measured. Where
        memory runs out, a learnt size is halved and the chunk repeated. No generator: it would turn a StopIteration
        of the user's into another error.
        """
        sizes, start = self._sizes, 0
        while True:
            stop = start + sizes.take(self.total - start)
            try:
                if sizes.learning and stop < self.total:
                    with memory.Meter(sizes.device) as meter:
                        result = compute(start, stop)
                    sizes.learn(stop - start, meter.peak, meter.produced, meter.operations)
                else:
                    result = compute(start, stop)
            except Exception as error:
                if not memory.is_out_of_memory(error) or not sizes.shrink(stop - start):
                    raise
                continue
            keep(start, stop, result)
            del result
            start = stop
            if start >= self.total:
                return

    def add(self, key: int, start: int, stop: int, piece: Tensor | None, dim: int = 0) -> None:
        """Keep a piece of result ``key``, for ``start`` to ``stop`` along ``dim``; None stands for zeros.

        Plain pieces go into one preallocated tensor, so that no second copy of the result is ever
        made; pieces that are tracked, wrapped, sparse, or unlike the first are concatenated in the end.
        """
        kept = self._pieces.setdefault(key, [])
        if piece is None:
            self._spill_buffer(key, start, dim)
            kept.append(stop - start)
            return
        if kept or stop - start == self.total or not _is_plain(piece):
            self._spill_buffer(key, start, dim)
            kept.append(piece)
            return
        whole = self._buffers.get(key)
        if whole is None:
            shape = list(piece.shape)
            shape[dim] = self.total
            whole = self._buffers[key] = piece.new_empty(shape)
        if whole.dtype != piece.dtype or _without(whole, dim) != _without(piece, dim):
            self._spill_buffer(key, start, dim)
            kept.append(piece)
        else:
            whole.narrow(dim, start, stop - start).copy_(piece)

    def _spill_buffer(self, key: int, filled: int, dim: int) -> None:
        """Go on with pieces: the part that is filled is the first of them."""
        whole = self._buffers.pop(key, None)
        if whole is not None and filled:
            self._pieces[key].append(whole.narrow(dim, 0, filled))

    def assembled(self, key: int, dim: int = 0) -> Tensor | None:
        """Result ``key`` put together, None where every piece of it was."""
        if key in self._buffers:
            return self._buffers[key]
        pieces = self._pieces.get(key, [])
        model = next((piece for piece in pieces if not isinstance(piece, int)), None)
        if model is None or len(pieces) == 1:
            return model
        return torch.cat([_zeros_like(model, dim, p) if isinstance(p, int) else p for p in pieces], dim)


def _without(tensor: Tensor, dim: int) -> list[int]:
    return [size for at, size in enumerate(tensor.shape) if at != dim]


def _zeros_like(model: Tensor, dim: int, length: int) -> Tensor:
    shape = list(model.shape)
    shape[dim] = length
    return model.new_zeros(shape)


def _is_plain(tensor: Tensor) -> bool:
    # A tracer can see no wrapper, and writes into no tensor either.
    return (
        not _torch.compiling()
        and type(tensor) is Tensor
        and tensor.layout is torch.strided
        and not tensor.requires_grad
        and not _torch.is_wrapper(tensor)
    )
