"""Floor 3: where results go in memory: new tensors, or tensors that the caller gives.

Hands on `Sink`, what every destination can do, and `MemorySink`. Files are in `files`.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autodiff.core import memory, trees
from autodiff.errors import BudgetError, OptionError, ShapeError
from autodiff.samples.results import with_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autodiff.samples.plan import Plan
    from autodiff.samples.results import Result, Rows, Template


class Sink(ABC):
    """A destination for the results of samples that come in order."""

    template: Template | None = None

    def open(self, template: Template) -> None:
        """Make room: the first results are there."""
        self.template = template

    @abstractmethod
    def put(self, start: int, stop: int, result: Result) -> None:
        """Keep the results of samples ``start`` to ``stop``."""

    @abstractmethod
    def put_rows(self, sample: int, rows: Rows) -> None:
        """Keep some rows of one sample's."""

    @abstractmethod
    def put_nan(self, sample: int) -> None:
        """Fill one sample's with NaN."""

    @abstractmethod
    def tree(self) -> Any:
        """Everything that was kept, with the samples in front."""


class MemorySink(Sink):
    """Tensors of all samples: those of the tree ``out``, or new ones.

    Where the number of samples is not known, it keeps pieces till the end.
    """

    def __init__(self, total: int | None, plan: Plan | None = None, out: Any = None) -> None:
        self._total, self._plan = total, plan
        self._given = None if out is None else _given_tensors(out)
        self._maps = [leaf.base for leaf in trees.leaves(out) if _is_mapped(leaf)]
        self._wholes: list[Tensor] = []
        self._pieces: list[list[Tensor]] = []

    def open(self, template: Template) -> None:
        super().open(template)
        kinds = template.kinds()
        if self._given is not None:
            _check_given(self._given, template, self._total)
            self._wholes = self._given
            return
        self._pieces = [[] for _ in kinds]
        if self._plan is not None and self._total is not None:
            size = self._total * template.bytes
            if size > self._plan.budget:
                raise BudgetError(
                    f"per_sample: the results of {self._total} samples take {memory.show(size)}, more than "
                    f"the {memory.show(self._plan.budget)} that memory allows. Write them to disk (out='file.npy'), "
                    f"take them chunk by chunk (.stream), reduce each (.map), or give memory=."
                )
            self._plan.reserve(size)

    def put(self, start: int, stop: int, result: Result) -> None:
        leaves = result.tensors()
        if stop - start == self._total and not self._wholes:
            self._wholes = [_own(leaf.tensor()) for leaf in leaves]
        elif self._total is None and self._given is None:
            for pieces, leaf in zip(self._pieces, leaves, strict=True):
                pieces.append(_own(leaf.tensor()))
        else:
            for whole, leaf in zip(self._room(), leaves, strict=True):
                leaf.copy_to(whole[start:stop])
        for mapped in self._maps:
            # What was written stays in the file, and is not counted as this process's memory any more.
            mapped.madvise(mmap.MADV_DONTNEED)

    def put_rows(self, sample: int, rows: Rows) -> None:
        for leaf, first, piece in rows.pieces:
            target = self._of_sample(sample, leaf).view(-1, *piece.shape[1:])
            target[first : first + len(piece)].copy_(piece)

    def put_nan(self, sample: int) -> None:
        assert self.template is not None
        for leaf, kind in enumerate(self.template.kinds()):
            self._of_sample(sample, leaf).copy_(kind.nan(sample))

    def tree(self) -> Any:
        assert self.template is not None
        if self._wholes or self._total is not None:
            return with_tensors(self.template, self._room())
        return with_tensors(self.template, [torch.cat(pieces) for pieces in self._pieces])

    def _room(self) -> list[Tensor]:
        if not self._wholes:
            assert self.template is not None
            assert self._total is not None
            self._wholes = [kind.empty(self._total) for kind in self.template.kinds()]
        return self._wholes

    def _of_sample(self, sample: int, leaf: int) -> Tensor:
        """The room of one sample; where the number of samples is not known, the last piece."""
        if self._total is not None or self._given is not None:
            return self._room()[leaf][sample]
        assert self.template is not None
        pieces = self._pieces[leaf]
        if sum(map(len, pieces)) <= sample:
            pieces.append(self.template.kinds()[leaf].empty(1))
        return pieces[-1][0]


def _given_tensors(out: Any) -> list[Tensor]:
    """The tensors of a tree of tensors and NumPy arrays that the caller wants filled."""
    leaves = trees.leaves(out)
    tensors = [torch.from_numpy(leaf) if hasattr(leaf, "__array_interface__") else leaf for leaf in leaves]
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise OptionError(
            f"per_sample: out is a tensor, a NumPy array or memmap, a tree of them like the result, or a path, got "
            f"{type(out)}. Make room by torch.empty([samples, *shape]), or name a file, as in out='hessians.npy'."
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
    kinds = template.kinds()
    wanted = [((total, *kind.shape), kind.dtype) for kind in kinds]
    came = [(tuple(tensor.shape), tensor.dtype) for tensor in given]
    fits = len(given) == len(kinds) and all(
        shape[1:] == kind.shape and dtype == kind.dtype and total in (None, shape[0])
        for (shape, dtype), kind in zip(came, kinds, strict=True)
    )
    if not fits:
        raise ShapeError(
            f"per_sample: out has {_listed(came)}, but the result is {_listed(wanted)}. Give one tensor for each "
            f"leaf of the result, in its order, with the samples in front."
        )


def _listed(pairs: Sequence[tuple[tuple[Any, ...], torch.dtype]]) -> str:
    return ", ".join(f"{list(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in pairs)


def _own(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where it is one sample's, expanded."""
    return tensor.clone() if 0 in tensor.stride() else tensor
