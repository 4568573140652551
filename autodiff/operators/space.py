"""The vectors that an operator takes or gives: trees with a tensor at some leaves, or all their numbers in one tensor.

Provides `Space`, which reads vectors in each of their forms and writes them again. Imports `core` and `checks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from math import prod
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from autodiff import checks
from autodiff.core import trees
from autodiff.core.call import is_differentiable, spread
from autodiff.core.specs import TensorSpec
from autodiff.operators.lazy import lazy

if TYPE_CHECKING:
    from autodiff.core.call import Call

# One tensor for each leaf of a space; None stands for zero. Rows have the vectors' dimension in front.
Leaves: TypeAlias = Sequence[Tensor | None]
Form: TypeAlias = Literal["tree", "vector", "matrix"]


class Vectors(NamedTuple):
    """Vectors of a space as leaves, and the form in which they came; ``count`` of them where they are a matrix."""

    form: Form
    leaves: Leaves
    count: int  # type: ignore[assignment]  # tuple.count, which nobody needs here


@dataclass(frozen=True)
class Space:
    """All trees of one structure, with tensors of given shapes and dtypes at ``positions``, None at other leaves.

    ``leaves`` are the specs of these tensors. A vector of the space can also be written as one tensor of shape
    ``[size]``, its numbers in tree order, and k vectors as ``[size, k]``; both have the dtype ``dtype``.

    >>> import torch
    >>> space = Space.of({"w": torch.zeros(2), "b": torch.zeros(())})
    >>> space.size
    3
    >>> space.unravel(torch.tensor([1.0, 2.0, 3.0]))
    {'w': tensor([1., 2.]), 'b': tensor(3.)}
    """

    spec: trees.Spec
    positions: tuple[int, ...]
    leaves: tuple[TensorSpec, ...]
    is_leaf: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Whether a tree is one tensor: torch.compile cannot ask a structure from outside.
        self.__dict__["is_leaf"] = self.spec.is_leaf()

    @staticmethod
    def of(tree: Any, name: str = "operators", root: str = "tree") -> Space:
        """The space of trees like this one, which has at least one floating or complex tensor."""
        leaves, spec = trees.flatten(tree)
        where = tuple(i for i, leaf in enumerate(leaves) if is_differentiable(leaf))
        if not where:
            checks.raise_no_differentiable_leaf(name, spec, leaves, root)
        return Space(spec, where, tuple(_spec_of(leaves[i]) for i in where))

    @staticmethod
    def of_arguments(call: Call) -> Space:
        """The space of what a call is differentiated in."""
        specs = tuple(_spec_of(primal) for primal in call.primals)
        return Space(call.spec, tuple(call.primal_positions), specs)

    @staticmethod
    def of_outputs(call: Call, outputs: Sequence[Tensor]) -> Space:
        """The space of a call's output."""
        specs = tuple(_spec_of(output) for output in outputs)
        return Space(call.out_spec, tuple(call.output_positions), specs)

    @lazy
    def sizes(self) -> list[int]:
        """How many numbers each leaf holds."""
        return [prod(leaf.shape) for leaf in self.leaves]

    @lazy
    def size(self) -> int:
        """The dimension of the space, which is how many numbers a vector has."""
        return sum(self.sizes)

    @lazy
    def dtype(self) -> torch.dtype:
        """The leaves' common dtype."""
        return reduce(torch.promote_types, (leaf.dtype for leaf in self.leaves))

    @lazy
    def device(self) -> torch.device:
        """The device of the first leaf."""
        return self.leaves[0].device

    @property
    def paths(self) -> list[str]:
        """The place of each leaf as ``wrt`` names it, such as ``layers.0.weight``."""
        dotted = trees.dotted_paths(self.spec)
        return [dotted[i] for i in self.positions]

    # Between leaves and trees.

    def tree(self, leaves: Sequence[Any]) -> Any:
        """A tree with one value for each leaf of the space, None elsewhere."""
        if self.is_leaf:
            return leaves[0]
        return trees.unflatten(self.spec, spread(leaves, self.positions, self.spec.num_leaves))

    def dense(self, leaves: Leaves, count: int | None = None) -> list[Tensor]:
        """The leaves with zeros for None, in ``count`` rows where that is given."""
        rows = () if count is None else (count,)
        return [
            spec._replace(shape=(*rows, *spec.shape)).full(0.0) if leaf is None else leaf
            for leaf, spec in zip(leaves, self.leaves, strict=True)
        ]

    def zeros(self) -> Any:
        """The zero vector, as a tree."""
        return self.tree([spec.full(0.0) for spec in self.leaves])

    def part(self, which: Sequence[int]) -> Space:
        """The space of some of the leaves, by number."""
        return Space(self.spec, tuple(self.positions[i] for i in which), tuple(self.leaves[i] for i in which))

    # Between leaves and one tensor.

    def split(self, vector: Tensor) -> list[Tensor]:
        """The leaves of a vector.

        # vector: [size] -> leaf: [*shape]
        """
        return [
            part.reshape(spec.shape).to(spec.dtype)
            for part, spec in zip(vector.split(self.sizes), self.leaves, strict=True)
        ]

    def split_columns(self, matrix: Tensor) -> list[Tensor]:
        """The rows of each leaf for the columns of a matrix.

        # matrix: [size, k] -> leaf: [k, *shape]
        """
        count = matrix.shape[1]
        # Each vector in one piece: products of strided ones take 1.4 x as long.
        parts = matrix.mT.contiguous().split(self.sizes, 1)
        pairs = zip(parts, self.leaves, strict=True)
        return [part.reshape((count, *spec.shape)).to(spec.dtype) for part, spec in pairs]

    def joined(self, leaves: Leaves) -> Tensor:
        """The leaves as one vector.

        # leaf: [*shape] -> [size]
        """
        flat = [leaf.reshape(-1).to(self.dtype) for leaf in self.dense(leaves)]
        return flat[0] if len(flat) == 1 else torch.cat(flat)

    def joined_columns(self, rows: Leaves, count: int) -> Tensor:
        """Rows of each leaf as the columns of one matrix.

        # leaf: [k, *shape] -> [size, k]
        """
        flat = [
            leaf.reshape((count, size)).to(self.dtype)
            for leaf, size in zip(self.dense(rows, count), self.sizes, strict=True)
        ]
        return (flat[0] if len(flat) == 1 else torch.cat(flat, 1)).mT

    def ravel(self, tree: Any) -> Tensor:
        """A vector given as a tree, as one tensor of shape ``[size]``."""
        return self.joined(self.read("ravel", tree, "tree", only_trees=True).leaves)

    def unravel(self, vector: Tensor) -> Any:
        """A vector given as one tensor of shape ``[size]``, as a tree."""
        checks.shape("unravel", "vector", vector, (self.size,), "one number for each number of the space")
        return self.tree(self.split(vector))

    # What users give, and what they get.

    def read(self, name: str, vectors: Any, root: str = "v", *, only_trees: bool = False) -> Vectors:
        """Vectors in any form, or ``only_trees``; a tensor that is a whole tree of the space counts as a tree.

        Raises:
            StructureError, ShapeError, DtypeError, LeafError: they are not of this space.
        """
        if isinstance(vectors, Tensor) and not (only_trees or self.is_only_leaf(vectors)):
            checks.flat_vectors(name, root, vectors, self.size, self.dtype, self.spec)
            if self.dtype.is_complex:
                checks.real_or_complex(name, "a space of flat vectors", self.leaves)
            if vectors.dim() == 1:
                return Vectors("vector", self.split(vectors), 1)
            return Vectors("matrix", self.split_columns(vectors), vectors.shape[1])
        if self.is_leaf and isinstance(vectors, Tensor):
            found = [vectors]
        else:
            found = checks.matching_structure(name, root, self.spec, vectors, "the operator's space")
        leaves = [found[i] for i in self.positions]
        for leaf, spec, position in zip(leaves, self.leaves, self.positions, strict=True):
            if type(leaf) is not Tensor or leaf.shape != spec.shape or leaf.dtype != spec.dtype:
                path, home = (trees.paths(self.spec, one)[position] for one in (root, "space"))
                checks.matching_vector(name, path, leaf, home, spec)
        return Vectors("tree", leaves, 1)

    def write(self, form: Form, leaves: Leaves, count: int) -> Any:
        """Vectors of this space in the form of others: a tree, ``[size]`` or ``[size, k]``."""
        match form:
            case "tree":
                return self.tree(self.dense(leaves))
            case "vector":
                return self.joined(leaves)
            case "matrix":
                return self.joined_columns(leaves, count)

    def is_only_leaf(self, vector: Tensor) -> bool:
        """Whether a tensor is a whole tree of the space."""
        return self.is_leaf and vector.shape == self.leaves[0].shape

    def __repr__(self) -> str:
        shapes = [f"{list(leaf.shape)}" for leaf in self.leaves]
        shown = self.spec.unflatten(spread(list(map(_Shown, shapes)), self.positions, self.spec.num_leaves))
        return f"Space({shown}, size={self.size}, dtype={self.dtype})"


def added(parts: Sequence[Leaves]) -> list[Tensor | None]:
    """The sum of vectors, leaf by leaf; None stands for zero."""
    total = list(parts[0])
    for part in parts[1:]:
        pairs = zip(total, part, strict=True)
        total = [two if one is None else one if two is None else one + two for one, two in pairs]
    return total


class _Shown(str):
    """A text whose repr is itself."""

    __slots__ = ()

    __repr__ = str.__str__


def _spec_of(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.dtype, tensor.device)
