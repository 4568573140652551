"""Destinations of results in memory: new tensors, or tensors of the caller.

Provides `Sink`, the interface of every destination, and `MemorySink`. Files are in `files`.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autodiff.core import memory, trees
from autodiff.errors import BudgetError, OptionError, ShapeError
from autodiff.samples.results import empty, nan, with_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    """Tensors of all samples: those of the tree ``out``, or new ones.

    Where the number of samples is not known, it keeps pieces until the end.
    """

    def __init__(self, total: int | None, plan: Plan | None = None, out: Any = None) -> None:
        self._total, self._plan = total, plan
        self._given = None if out is None else _given_tensors(out)
        self._memmaps = [leaf.base for leaf in trees.leaves(out) if _is_mapped(leaf)]
        self._tensors: list[Tensor] = []
        self._pieces: list[list[Tensor]] = []

    def open(self, template: Template) -> None:
        super().open(template)
        if self._given is not None:
            _check_given(self._given, template, self._total)
            self._tensors = self._given
            return
        self._pieces = [[] for _ in template.tensors()]
        if self._plan is not None and self._total is not None:
            size = self._total * template.nbytes
            if size > self._plan.budget:
                raise BudgetError(
                    f"per_sample: the results of {self._total} samples take {memory.format_bytes(size)}, more than "
                    f"the {memory.format_bytes(self._plan.budget)} that memory allows. Write them to "
                    f"disk (out='file.npy'), "
                    f"take them chunk by chunk (.stream), reduce each (.map), or give memory=."
                )
            self._plan.reserve(size)

    def put(self, start: int, stop: int, result: Result) -> None:
        leaves = result.tensors()
        if stop - start == self._total and not self._tensors:
            self._tensors = [_unexpanded(leaf.tensor()) for leaf in leaves]
        elif self._total is None and self._given is None:
            for pieces, leaf in zip(self._pieces, leaves, strict=True):
                pieces.append(_unexpanded(leaf.tensor()))
        else:
            for whole, leaf in zip(self._allocated(), leaves, strict=True):
                leaf.copy_to(whole[start:stop])
        for mapped in self._memmaps:
            # What was written stays in the file, but no longer counts as memory of this process.
            mapped.madvise(mmap.MADV_DONTNEED)

    def put_rows(self, sample: int, rows: JacobianRows) -> None:
        for leaf, first, piece in rows.pieces:
            target = self._of_sample(sample, leaf).view(-1, *piece.shape[1:])
            target[first : first + len(piece)].copy_(piece)

    def put_nan(self, sample: int) -> None:
        assert self.template is not None
        for leaf, spec in enumerate(self.template.tensors()):
            self._of_sample(sample, leaf).copy_(nan(spec, sample))

    def tree(self) -> Any:
        assert self.template is not None
        if self._tensors or self._total is not None:
            return with_tensors(self.template, self._allocated())
        return with_tensors(self.template, [torch.cat(pieces) for pieces in self._pieces])

    def _allocated(self) -> list[Tensor]:
        if not self._tensors:
            assert self.template is not None
            assert self._total is not None
            self._tensors = [empty(spec, self._total) for spec in self.template.tensors()]
        return self._tensors

    def _of_sample(self, sample: int, leaf: int) -> Tensor:
        """The tensor of one sample; where the number of samples is not known, it is the last piece."""
        if self._total is not None or self._given is not None:
            return self._allocated()[leaf][sample]
        assert self.template is not None
        pieces = self._pieces[leaf]
        if sum(map(len, pieces)) <= sample:
            pieces.append(empty(self.template.tensors()[leaf], 1))
        return pieces[-1][0]


def _given_tensors(out: Any) -> list[Tensor]:
    """The tensors of a tree of tensors and NumPy arrays that the caller wants filled."""
    leaves = trees.leaves(out)
    tensors = [torch.from_numpy(leaf) if hasattr(leaf, "__array_interface__") else leaf for leaf in leaves]
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise OptionError(
            f"per_sample: out is a tensor, a NumPy array or memmap, a tree of them like the result, or a path, got "
            f"{type(out)}. Allocate it by torch.empty([samples, *shape]), or name a file, as in out='hessians.npy'."
        )
    return tensors


def _is_mapped(leaf: Any) -> bool:
    """Whether the leaf is a NumPy memmap that shares its file."""
    return (
        isinstance(getattr(leaf, "base", None), mmap.mmap)
        and getattr(leaf, "mode", None) in ("r+", "w+")
        and hasattr(mmap, "MADV_DONTNEED")
    )


def _check_given(given: Sequence[Tensor], template: Template, total: int | None) -> None:
    specs = template.tensors()
    wanted = [((total, *spec.shape), spec.dtype) for spec in specs]
    came = [(tuple(tensor.shape), tensor.dtype) for tensor in given]
    fits = len(given) == len(specs) and all(
        shape[1:] == spec.shape and dtype == spec.dtype and total in (None, shape[0])
        for (shape, dtype), spec in zip(came, specs, strict=True)
    )
    if not fits:
        raise ShapeError(
            f"per_sample: out has {_listed(came)}, but the result is {_listed(wanted)}. Give one tensor for each "
            f"leaf of the result, in its order, with the samples in front."
        )


def _listed(pairs: Sequence[tuple[tuple[Any, ...], torch.dtype]]) -> str:
    return ", ".join(f"{list(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in pairs)


def _unexpanded(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is expanded, so that samples share memory."""
    return tensor.clone() if 0 in tensor.stride() else tensor
