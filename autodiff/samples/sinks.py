"""Destinations of results: the interface of all, and new tensors in memory.

Provides `Sink` and `MemorySink`. Tensors of the caller's are in `given`, files in `files`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autodiff.core import memory
from autodiff.errors import BudgetError
from autodiff.samples.results import empty, nan, with_tensors

if TYPE_CHECKING:
    from autodiff.samples.plan import Plan
    from autodiff.samples.results import JacobianRows, Result, Template


class Sink(ABC):
    """A destination for the results of samples that come in order."""

    template: Template | None = None

    def open(self, template: Template) -> None:
        """Allocate: the first results are there."""
        self.template = template

    @abstractmethod
    def put(self, start: int, stop: int, result: Result) -> None:
        """Keep the results of samples ``start`` to ``stop``."""

    @abstractmethod
    def put_rows(self, sample: int, rows: JacobianRows) -> None:
        """Keep some rows of one sample's."""

    @abstractmethod
    def put_nan(self, sample: int) -> None:
        """Fill one sample's with NaN."""

    @abstractmethod
    def tree(self) -> Any:
        """Everything that was kept, with the samples in front."""


class MemorySink(Sink):
    """New tensors, for as many samples as are expected.

    What comes beyond these is kept in pieces, which are put together in the end.
    """

    def __init__(self, expected: int, plan: Plan | None = None) -> None:
        self._expected, self._plan = expected, plan
        self._whole: list[Tensor] = []
        self._filled = 0  # samples in them
        self._pieces: list[list[Tensor]] = []  # of each tensor
        self._stop = 0  # after the last sample
        self._bytes = 0  # of pieces

    def open(self, template: Template) -> None:
        super().open(template)
        self._pieces = [[] for _ in template.tensors()]
        size = self._expected * template.nbytes
        self._reserve(size, size, f"the results of {self._expected} samples take")

    def _reserve(self, size: int, needed: int, what: str) -> None:
        """Leave so many bytes less for chunks, where ``needed`` bytes in all are no more than memory allows."""
        if self._plan is None:
            return
        if needed > self._plan.budget:
            raise BudgetError(
                f"per_sample: {what} {memory.format_bytes(needed)}, more than the "
                f"{memory.format_bytes(self._plan.budget)} that memory allows. Write them to disk (out='file.npy'), "
                f"take them chunk by chunk (.stream), reduce each (.map), or give memory=."
            )
        self._plan.reserve(size)

    def put(self, start: int, stop: int, result: Result) -> None:
        leaves = result.tensors()
        if stop > self._expected:
            # Copies: a captured tensor that is returned may be written to before the next batch.
            self._add_piece(stop, [leaf.tensor().clone() for leaf in leaves])
        elif stop - start == self._expected:
            self._whole = [_unexpanded(leaf.tensor()) for leaf in leaves]
            self._filled = self._stop = stop
        else:
            for whole, leaf in zip(self._allocated(), leaves, strict=True):
                leaf.copy_to(whole[start:stop])
            self._filled = self._stop = stop

    def _add_piece(self, stop: int, tensors: list[Tensor]) -> None:
        assert self.template is not None
        size = (stop - self._stop) * self.template.nbytes
        self._bytes += size
        needed = self._filled * self.template.nbytes + self._bytes
        what = f"the results of {stop} samples, kept in pieces as their number is not known, and put together, take"
        self._reserve(size, 2 * needed, what)
        self._stop = stop
        for pieces, tensor in zip(self._pieces, tensors, strict=True):
            pieces.append(tensor)

    def put_rows(self, sample: int, rows: JacobianRows) -> None:
        targets = self._of_sample(sample)
        for leaf, first, piece in rows.pieces:
            write_rows(targets[leaf], first, piece)

    def put_nan(self, sample: int) -> None:
        assert self.template is not None
        for target, spec in zip(self._of_sample(sample), self.template.tensors(), strict=True):
            target.copy_(nan(spec, sample))

    def tree(self) -> Any:
        assert self.template is not None
        tensors = self._allocated()
        if self._stop != self._expected:
            # Each leaf's pieces die before those of the next are put together.
            for leaf in range(len(tensors)):
                tensors[leaf] = torch.cat([tensors[leaf][: self._filled], *self._pieces[leaf]])
                self._pieces[leaf] = []
        return with_tensors(self.template, tensors)

    def _allocated(self) -> list[Tensor]:
        if not self._whole:
            assert self.template is not None
            self._whole = [empty(spec, self._expected) for spec in self.template.tensors()]
        return self._whole

    def _of_sample(self, sample: int) -> list[Tensor]:
        """The tensors of one sample, the last one or the next."""
        if sample < self._expected:
            self._filled = self._stop = sample + 1
            return [tensor[sample] for tensor in self._allocated()]
        if sample == self._stop:
            assert self.template is not None
            self._add_piece(sample + 1, [empty(spec, 1) for spec in self.template.tensors()])
        return [pieces[-1][0] for pieces in self._pieces]


def _unexpanded(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is expanded, so that samples share memory."""
    return tensor.clone() if 0 in tensor.stride() else tensor


def write_rows(target: Tensor, first: int, rows: Tensor) -> None:
    """Write rows ``first`` on of ``target``, seen as ``[-1, *rest]``."""
    shape = target.shape[: target.dim() - rows.dim() + 1]
    if len(shape) == 1 or target.is_contiguous():
        target.view(-1, *rows.shape[1:])[first : first + len(rows)].copy_(rows)
        return
    indices = torch.unravel_index(torch.arange(first, first + len(rows)), shape)
    target[indices] = rows.to(target.device)
