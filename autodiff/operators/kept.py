"""Operators of batches that were recorded once and are kept, as many as fit into memory. Imports `batches`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from autodiff import checks
from autodiff.core import memory, randomness, trees
from autodiff.operators.batches import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from autodiff.operators.batches import DataSet
    from autodiff.operators.operator import Operator
    from autodiff.operators.space import Leaves


class Part(NamedTuple):
    """The operator of a batch."""

    batch: Batch
    operator: Operator


class KeptParts:
    """The parts of an operator over a data set that are kept, from the first batch on, within so many bytes.

    What a batch takes is measured when it is recorded. Each has to leave room for the product with another one, unless
    it is the last. A data set of one batch is kept in any case.
    """

    def __init__(self, data: DataSet, limit: int, device: torch.device) -> None:
        self._data, self._device, self._room = data, device, limit
        self._parts: dict[int, Part] = {}
        self._full = False

    def through(self, what: str) -> Generator[Batch]:
        """The batches: those that are kept where all of them are, else from the data set."""
        if self.complete:
            return (self._parts[number].batch for number in range(len(self._parts)))
        return self._data.through(what)

    @property
    def complete(self) -> bool:
        """Whether all batches are kept."""
        return self._data.length is not None and len(self._parts) == self._data.length[0]

    def product(
        self, batch: Batch, make: Callable[[], Operator], multiply: Callable[[Operator], Leaves]
    ) -> Leaves:
        """A product with the part of a batch, which is recorded now unless it was kept."""
        kept = self._parts.get(batch.number)
        if kept is not None:
            if self._data.size is None and not _is_same(kept.batch, batch):
                checks.raise_other_batch(self._data.name, batch.number)
            return multiply(kept.operator)
        is_only = self._data.length is not None and self._data.length[0] == 1
        if not is_only and (self._full or batch.number != len(self._parts) or self._room <= 0):
            return multiply(make())
        before = randomness.random_state()
        with memory.Meter(self._device) as meter:
            operator = make()
            product = multiply(operator)
        taken = meter.remaining + _bytes_of(batch)
        is_last = self._data.length is not None and batch.number + 1 == self._data.length[0]
        # Kept, it would draw no random numbers, and others would draw what it has drawn.
        fits = taken + (0 if is_last else meter.peak) <= self._room and not randomness.has_drawn(before)
        if is_only or fits:
            self._parts[batch.number] = Part(batch, operator)
            self._room -= taken
        else:
            self._full = True
        return product


def _bytes_of(batch: Batch) -> int:
    return sum(leaf.nbytes for leaf in trees.leaves(batch.args) if isinstance(leaf, Tensor))


def _is_same(one: Batch, other: Batch) -> bool:
    leaves, spec = trees.flatten(one.args)
    others, other_spec = trees.flatten(other.args)
    return spec == other_spec and all(
        torch.equal(leaf, two) if isinstance(leaf, Tensor) and isinstance(two, Tensor) else leaf == two
        for leaf, two in zip(leaves, others, strict=True)
    )
