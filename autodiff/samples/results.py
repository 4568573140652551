"""The results of a chunk of samples: leaves with the samples in front.

A leaf is a tensor as it was computed, or the blocks of a matrix that is put together only at its destination.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from autodiff.core import trees
from autodiff.core.specs import TensorSpec
from autodiff.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from autodiff.core.trees import Spec


# Matrices that go to disk are put together in portions of this many bytes.
_PORTION = 8 * 2**20
# Dtypes that torch cannot sum, and those that hold all of their numbers.
_WITHOUT_SUM = {
    torch.complex32: torch.complex64,
    torch.float8_e4m3fn: torch.float32,
    torch.float8_e4m3fnuz: torch.float32,
    torch.float8_e5m2: torch.float32,
    torch.float8_e5m2fnuz: torch.float32,
}


def empty(spec: TensorSpec, samples: int) -> Tensor:
    """A tensor for this many samples."""
    return torch.empty((samples, *spec.shape), dtype=spec.dtype, device=spec.device)


def nan(spec: TensorSpec, sample: int) -> Tensor:
    """The NaN that marks a sample that failed."""
    if not (spec.dtype.is_floating_point or spec.dtype.is_complex):
        raise OptionError(
            f"per_sample: on_error='nan' cannot mark sample {sample} in a result of dtype {spec.dtype}, which has no "
            f"NaN. Expected a floating-point or complex result. Return one, or use on_error='raise'."
        )
    return torch.full((), float("nan"), dtype=spec.dtype, device=spec.device)


def is_finite(tensor: Tensor) -> bool:
    """Whether the tensor holds neither infinities nor NaN."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.dtype in _WITHOUT_SUM:
        return bool(_finite_numbers(tensor).all())
    # Where the sum is finite, so are all numbers; to look at each takes 25 x as long, and memory.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _finite_numbers(tensor: Tensor) -> Tensor:
    """Which numbers are finite, in a dtype that torch can hardly compute with, too."""
    return torch.isfinite(tensor.to(_WITHOUT_SUM.get(tensor.dtype, tensor.dtype)))


class Leaf(ABC):
    """One leaf of the result, for some samples: ``[samples, *spec.shape]``."""

    spec: TensorSpec

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample's."""
        return self.spec.shape

    @abstractmethod
    def parts(self) -> Sequence[Tensor]:
        """The tensors that it is made of, each with the samples in front."""

    @abstractmethod
    def tensor(self) -> Tensor:
        """The leaf as one tensor."""

    @abstractmethod
    def copy_to(self, target: Tensor) -> None:
        """Write the leaf into a tensor of its shape."""

    @abstractmethod
    def portions(self) -> Iterator[Tensor]:
        """The leaf as tensors of a few samples each, to use little memory."""

    def infinite(self) -> list[int]:
        """The samples, counted from the first of these, that hold infinities or NaN."""
        found: set[int] = set()
        for part in self.parts():
            if not is_finite(part):
                bad = ~_finite_numbers(part).reshape(len(part), -1).all(dim=1)
                found.update(bad.nonzero().flatten().tolist())
        return sorted(found)

    def with_nan(self, samples: Sequence[int], first: int) -> Leaf:
        """The leaf with NaN for some samples, counted from sample ``first``."""
        # A copy: the tensor may be an argument of the function, or expanded.
        tensor = self.tensor().clone()
        tensor[list(samples)] = nan(self.spec, first + samples[0])
        return Plain(tensor)


class Plain(Leaf):
    """A tensor as the function gave it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.spec = TensorSpec(tensor.shape[1:], tensor.dtype, tensor.device)

    def parts(self) -> Sequence[Tensor]:
        return [self._tensor]

    def tensor(self) -> Tensor:
        return self._tensor

    def copy_to(self, target: Tensor) -> None:
        target.copy_(self._tensor)

    def portions(self) -> Iterator[Tensor]:
        yield self._tensor


class Matrix(Leaf):
    """A Jacobian's blocks, to be one matrix: ``blocks[i][j]`` is ``[samples, *out_i, *in_j]``.

    ``heights`` and ``widths`` are the sizes of the outputs and of the primals.
    """

    def __init__(self, blocks: list[list[Tensor]], heights: Sequence[int], widths: Sequence[int]) -> None:
        self._blocks, self._heights, self._widths = blocks, heights, widths
        flat = self.parts()
        dtype = flat[0].dtype
        for part in flat:
            dtype = torch.promote_types(dtype, part.dtype)
        self.spec = TensorSpec((sum(heights), sum(widths)), dtype, flat[0].device)

    def parts(self) -> Sequence[Tensor]:
        return [block for row in self._blocks for block in row]

    def tensor(self) -> Tensor:
        target = empty(self.spec, len(self._blocks[0][0]))
        self.copy_to(target)
        return target

    def copy_to(self, target: Tensor) -> None:
        strips = target.split(list(self._heights), dim=1)
        for row, strip, height in zip(self._blocks, strips, self._heights, strict=True):
            places = strip.split(list(self._widths), dim=2)
            for block, place, width in zip(row, places, self._widths, strict=True):
                place.copy_(block.reshape(len(block), height, width))

    def portions(self) -> Iterator[Tensor]:
        at_once = max(1, _PORTION // max(self.spec.nbytes, 1))
        for start in range(0, len(self._blocks[0][0]), at_once):
            some = [[block[start : start + at_once] for block in row] for row in self._blocks]
            yield Matrix(some, self._heights, self._widths).tensor()


class Result(NamedTuple):
    """The results of some samples: a leaf, or a constant, for each place of the tree."""

    spec: Spec
    leaves: list[Any]

    def tensors(self) -> list[Leaf]:
        """The leaves that are not constants."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Leaf)]

    def tree(self) -> Any:
        """The results, with the samples in front of every tensor."""
        return with_tensors(self, [leaf.tensor() for leaf in self.tensors()])


class Template(NamedTuple):
    """The tree of one sample's result: a `TensorSpec`, or a constant, for each place."""

    spec: Spec
    leaves: list[Any]

    def tensors(self) -> list[TensorSpec]:
        """The leaves that are not constants."""
        return [leaf for leaf in self.leaves if isinstance(leaf, TensorSpec)]

    @property
    def nbytes(self) -> int:
        """The size of one sample's result."""
        return sum(spec.nbytes for spec in self.tensors())

    def constants(self) -> list[Any]:
        """The leaves that are not tensors."""
        return [leaf for leaf in self.leaves if not isinstance(leaf, TensorSpec)]

    def places(self) -> list[str]:
        """The places of the tensors, written as code: ``result['w'][0]``."""
        return self._of_tensors(trees.paths(self.spec, "result"))

    def names(self) -> list[str]:
        """The places of the tensors, written with dots; empty for one that is the whole result."""
        return self._of_tensors(trees.dotted_paths(self.spec))

    def _of_tensors(self, texts: list[str]) -> list[str]:
        return [text for text, leaf in zip(texts, self.leaves, strict=True) if isinstance(leaf, TensorSpec)]


def template_of(result: Result) -> Template:
    """What one sample's result looks like."""
    return Template(result.spec, [leaf.spec if isinstance(leaf, Leaf) else leaf for leaf in result.leaves])


def with_tensors(like: Result | Template, tensors: Sequence[Tensor]) -> Any:
    """The tree with these tensors, in order, and its constants."""
    remaining = iter(tensors)
    filled = [next(remaining) if isinstance(leaf, Leaf | TensorSpec) else leaf for leaf in like.leaves]
    return trees.unflatten(like.spec, filled)


class JacobianRows(NamedTuple):
    """Some rows of one sample's Jacobian: pieces of leaves, and how many rows there are in all.

    A piece is ``(leaf, first, tensor)``: the tensor is ``[rows, *rest]``, and goes to rows ``first`` on of the
    leaf, seen as ``[-1, *rest]``.
    """

    template: Template
    total: int
    pieces: list[tuple[int, int, Tensor]]
