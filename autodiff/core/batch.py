"""Floor 1: the batching level, and work done in chunks.

Hands on `run`, a vmap level over flat leaves, and `Chunks`, which splits a batch and collects what
the pieces give. Never sees a tree; imports only `_torch`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from autodiff.core import _torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Randomness: TypeAlias = Literal["error", "different", "same"]


def run(
    func: Callable[[list[Any]], list[Any]],
    leaves: Sequence[Any],
    dims: Sequence[int | None],
    size: int,
    randomness: Randomness,
    out_dims: Callable[[list[Any], list[bool]], Sequence[int | None]],
) -> list[Any]:
    """Run ``func`` once on leaves that hide their dimension ``dims[i]`` as a batch of ``size``.

    ``out_dims`` is told the outputs, and which of them are batched, and says where each batch goes;
    None leaves an output as it is.
    """
    if _torch.compiling():
        return _run_traced(func, leaves, dims, randomness, out_dims)
    with _torch.batch_level(size, randomness) as level:
        entered = [
            leaf if dim is None else _torch.add_batch(leaf, dim, level)
            for leaf, dim in zip(leaves, dims, strict=True)
        ]
        outputs = func(entered)
        batched = [isinstance(output, Tensor) and _torch.is_batched_at(output, level) for output in outputs]
        return [
            output if dim is None else _torch.remove_batch(output, dim, size, level)
            for output, dim in zip(outputs, out_dims(outputs, batched), strict=True)
        ]


def _run_traced(
    func: Callable[[list[Any]], list[Any]],
    leaves: Sequence[Any],
    dims: Sequence[int | None],
    randomness: Randomness,
    out_dims: Callable[[list[Any], list[bool]], Sequence[int | None]],
) -> list[Any]:
    """torch.func.vmap, which torch.compile's tracer knows; it does not tell which outputs are batched."""
    kept: list[tuple[Any, int | None]] = []

    def of_samples(*samples: Tensor) -> tuple[Tensor, ...]:
        coming = iter(samples)
        outputs = func(
            [leaf if dim is None else next(coming) for leaf, dim in zip(leaves, dims, strict=True)]
        )
        destinations = out_dims(outputs, [False] * len(outputs))
        for output, dim in zip(outputs, destinations, strict=True):
            kept.append((output if dim is None else None, dim))
        return tuple(output for output, dim in zip(outputs, destinations, strict=True) if dim is not None)

    mapped = [leaf for leaf, dim in zip(leaves, dims, strict=True) if dim is not None]
    in_dims = tuple(dim for dim in dims if dim is not None)
    coming = iter(torch.func.vmap(of_samples, in_dims, randomness=randomness)(*mapped))
    return [output if dim is None else next(coming).movedim(0, dim) for output, dim in kept]


def over_rows(
    func: Callable[[list[Tensor]], list[Tensor | None]],
    rows: Sequence[Tensor],
    size: int,
    randomness: Randomness,
) -> list[Tensor | None]:
    """``func`` of each row of ``rows``, in one batch: what a Jacobian does to a basis."""

    def leading(outputs: list[Any], _: list[bool]) -> list[int | None]:
        return [None if output is None else 0 for output in outputs]

    return run(func, rows, [0] * len(rows), size, randomness, leading)


class Chunks:
    """A batch of ``total`` in pieces of at most ``size``, and their results put together.

    >>> [(start, stop) for start, stop in Chunks(5, 2)]
    [(0, 2), (2, 4), (4, 5)]
    """

    def __init__(self, total: int, size: int | None) -> None:
        self.total = total
        self.size = total if size is None else min(size, total)
        # A number stands for that many zeros.
        self._pieces: dict[int, list[Tensor | int]] = {}
        self._wholes: dict[int, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if self.total == 0:
            yield 0, 0
        for start in range(0, self.total, max(self.size, 1)):
            yield start, min(start + self.size, self.total)

    def is_last(self, stop: int) -> bool:
        """Whether the piece that ends at ``stop`` is the last."""
        return stop == self.total

    def add(self, key: int, start: int, piece: Tensor | None, dim: int = 0) -> None:
        """Keep a piece of result ``key``, which begins at ``start`` along ``dim``; None stands for zeros.

        Plain pieces go into one preallocated tensor, so that no second copy of the result is ever
        made; pieces that are watched, wrapped, sparse, or unlike the first are concatenated in the end.
        """
        kept = self._pieces.setdefault(key, [])
        if piece is None:
            self._give_up_whole(key, start, dim)
            kept.append(min(self.size, self.total - start))
            return
        if kept or piece.shape[dim] == self.total or not _is_plain(piece):
            self._give_up_whole(key, start, dim)
            kept.append(piece)
            return
        whole = self._wholes.get(key)
        if whole is None:
            shape = list(piece.shape)
            shape[dim] = self.total
            whole = self._wholes[key] = piece.new_empty(shape)
        if whole.dtype != piece.dtype or _without(whole, dim) != _without(piece, dim):
            self._give_up_whole(key, start, dim)
            kept.append(piece)
        else:
            whole.narrow(dim, start, piece.shape[dim]).copy_(piece)

    def _give_up_whole(self, key: int, filled: int, dim: int) -> None:
        """Go on with pieces: the part that is filled is the first of them."""
        whole = self._wholes.pop(key, None)
        if whole is not None and filled:
            self._pieces[key].append(whole.narrow(dim, 0, filled))

    def whole(self, key: int, dim: int = 0) -> Tensor | None:
        """Result ``key`` put together, None where every piece of it was."""
        if key in self._wholes:
            return self._wholes[key]
        pieces = self._pieces.get(key, [])
        model = next((piece for piece in pieces if isinstance(piece, Tensor)), None)
        if model is None or len(pieces) == 1:
            return model
        return torch.cat([p if isinstance(p, Tensor) else _zeros_like(model, dim, p) for p in pieces], dim)


def _without(tensor: Tensor, dim: int) -> list[int]:
    return [size for at, size in enumerate(tensor.shape) if at != dim]


def _zeros_like(model: Tensor, dim: int, length: int) -> Tensor:
    shape = list(model.shape)
    shape[dim] = length
    return model.new_zeros(shape)


def remember_randomness(leaves: Sequence[Any]) -> Callable[[], None]:
    """A function that takes the generators of the leaves' devices back to where they are now."""
    devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor) and leaf.device.type == "cuda"}
    cpu_state = torch.get_rng_state()
    states = {device: torch.cuda.get_rng_state(device) for device in devices}

    def rewind() -> None:
        torch.set_rng_state(cpu_state)
        for device, state in states.items():
            torch.cuda.set_rng_state(state, device)

    return rewind


def _is_plain(tensor: Tensor) -> bool:
    return (
        type(tensor) is Tensor
        and tensor.layout is torch.strided
        and not tensor.requires_grad
        and not _torch.is_wrapped(tensor)
    )
