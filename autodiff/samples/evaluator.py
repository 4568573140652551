"""The user's function, evaluated on a batch of samples or for some rows of one sample.

Provides `Evaluator`. Rows alone can be computed for autodiff's own Jacobians in reverse mode.
"""

from __future__ import annotations

import weakref
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autodiff import _torch
from autodiff.core import seeds, trees
from autodiff.core.call import wraps
from autodiff.core.randomness import random_state, set_random_state
from autodiff.core.specs import TensorSpec
from autodiff.errors import OptionError
from autodiff.samples.results import JacobianRows, Matrix, Plain, Result, Template
from autodiff.transforms.hessian import Hessian
from autodiff.transforms.jacobian import Jacobian
from autodiff.transforms.vmap import Mapped

if TYPE_CHECKING:
    from collections.abc import Callable

    from autodiff.core.call import Call
    from autodiff.types import Randomness


class Evaluator:
    """A function of one sample, and the form in which its results are wanted."""

    def __init__(
        self, func: Callable[..., Any], in_dims: Any, randomness: Randomness, *, as_matrix: bool
    ) -> None:
        self.func, self._in_dims, self._randomness, self._as_matrix = func, in_dims, randomness, as_matrix
        jacobian = func if isinstance(func, Jacobian) else None
        if as_matrix and (jacobian is None or jacobian.has_aux):
            raise OptionError(
                f"per_sample: as_matrix=True needs a function made by jacrev, jacfwd, jacobian or hessian, without "
                f"aux; got {name_of(func)}. Leave as_matrix out, or apply pytree.to_matrix inside the function."
            )
        self._jacobian = jacobian
        # Whether rows of one sample can be computed alone.
        self.splits = jacobian is not None and jacobian.mode != "forward" and not jacobian.has_aux
        self._start = random_state()
        # The last batch, and the memory of its arguments.
        self._batch: Callable[[], Mapped | None] = lambda: None
        self._inputs: set[int] = set()
        # What is run under vmap now, and what it returns besides tensors.
        self._current: Callable[..., Any] = func
        self._details: Any = None

    def batch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapped:
        """A batch of samples: arguments in which ``in_dims`` says where the samples are."""

        @wraps(self.func)
        def current(*args: Any, **kwargs: Any) -> Any:
            return self._current(*args, **kwargs)

        return Mapped(current, self._in_dims, 0, args, kwargs, name="per_sample")

    def samples(self, batch: Mapped, start: int, stop: int) -> Result:
        """The results of samples ``start`` to ``stop``."""
        self._current = self._blocks if self._as_matrix else self.func
        leaves = self._computed(batch, start, stop)
        if self._as_matrix:
            call, heights = self._details
            widths = [primal.numel() for primal in call.primals]
            blocks = [leaves[at : at + len(widths)] for at in range(0, len(leaves), len(widths))]
            return Result(trees.LEAF, [Matrix(blocks, heights, widths)])
        # A container that hid its batch is a tree of tensors with the samples in front.
        leaves, spec = trees.flatten(trees.unflatten(batch.out_spec, leaves))
        return Result(spec, [Plain(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves])

    def rows(self, batch: Mapped, sample: int, start: int, stop: int) -> JacobianRows:
        """Rows ``start`` to ``stop`` of one sample's Jacobian."""
        jacobian = self._jacobian
        assert jacobian is not None

        def some_rows(*args: Any, **kwargs: Any) -> list[list[Tensor]]:
            call = jacobian.call(args, kwargs)
            outputs, row_ranges = jacobian.some_rows(call, start, stop)
            shapes = [(tuple(output.shape), output.numel()) for output in outputs]
            self._details = call, shapes, [(row_range.output, row_range.first) for row_range in row_ranges]
            return [row_range.blocks for row_range in row_ranges]

        self._current = some_rows
        leaves = [leaf.squeeze(0) for leaf in self._computed(batch, sample, sample + 1)]
        call, shapes, row_ranges = self._details
        total, width = sum(size for _, size in shapes), len(call.primals)
        by_strip = [leaves[at : at + width] for at in range(0, len(leaves), width)]
        template, positions = self._template(call, shapes)
        pieces: list[tuple[int, int, Tensor]] = []
        above = [sum(size for _, size in shapes[:output]) for output in range(len(shapes))]
        for (output, first), blocks in zip(row_ranges, by_strip, strict=True):
            if self._as_matrix:
                dtype = template.leaves[0].dtype
                row_range = torch.cat([block.flatten(1).to(dtype) for block in blocks], dim=1)
                pieces.append((0, above[output] + first, row_range))
            else:
                columns = zip(positions[output], blocks, strict=True)
                pieces += [(position, first, block) for position, block in columns]
        return JacobianRows(template, total, pieces)

    def row_bytes(self, batch: Mapped) -> tuple[int, int] | None:
        """For a Hessian: the bytes of one row, and how many rows; None where that cannot be known before."""
        if not isinstance(self._jacobian, Hessian) or batch.size == 0:
            return None
        primals = self._jacobian.call(*batch.sample(0)).primals
        count = seeds.size_of(primals)
        return count * primals[0].element_size(), count

    def rows_in(self, batch: Mapped, template: Template) -> int:
        """How many rows one sample's Jacobian has."""
        assert self._jacobian is not None
        numbers = sum(prod(spec.shape) for spec in template.tensors())
        return numbers // max(seeds.size_of(self._jacobian.call(*batch.sample(0)).primals), 1)

    @property
    def random_state(self) -> Any:
        """The state of the generators for the next chunk, None where nothing may be random."""
        match self._randomness:
            case "error":
                return None
            case "same":
                return self._start
            case "different":
                return random_state()

    @random_state.setter
    def random_state(self, state: Any) -> None:
        if state is not None:
            self._start = state
            set_random_state(state)

    def _computed(self, batch: Mapped, start: int, stop: int) -> list[Any]:
        return _torch.under_guard(self._computed_under_guard, batch, start, stop)

    def _computed_under_guard(self, batch: Mapped, start: int, stop: int) -> list[Any]:
        if self._randomness == "same":
            set_random_state(self._start)
        # Results are constants: a graph would keep every chunk alive.
        with torch.no_grad():
            leaves = batch.of_samples(start, stop, self._randomness)
        # Results stay what they are when a loader writes the next batch to this one's memory.
        if batch is not self._batch():
            self._batch = weakref.ref(batch)
            self._inputs = {_memory(leaf) for leaf in batch.leaves if isinstance(leaf, Tensor)}
        return [
            leaf.clone() if isinstance(leaf, Tensor) and _memory(leaf) in self._inputs else leaf
            for leaf in leaves
        ]

    def _blocks(self, *args: Any, **kwargs: Any) -> list[list[Tensor]]:
        assert self._jacobian is not None
        call = self._jacobian.call(args, kwargs)
        blocks, _ = self._jacobian.blocks(call)
        # J[i][j]: [*out_i, *in_j]
        inner = call.primals[0].dim()
        self._details = call, [prod(row[0].shape[: row[0].dim() - inner]) for row in blocks]
        return blocks

    def _template(self, call: Call, shapes: list[tuple[Any, int]]) -> tuple[Template, list[list[int]]]:
        """One sample's whole result, and the position of each output's block for each primal."""
        primals = call.primals
        dtypes = [primal.dtype for primal in primals]
        if self._as_matrix:
            dtype = dtypes[0]
            for other in dtypes:
                dtype = torch.promote_types(dtype, other)
            shape = sum(size for _, size in shapes), seeds.size_of(primals)
            return Template(trees.LEAF, [TensorSpec(shape, dtype, primals[0].device)]), []
        assert self._jacobian is not None
        numbered = [
            [_BlockPosition(i, j, torch.Size((*shape, *primal.shape))) for j, primal in enumerate(primals)]
            for i, (shape, _) in enumerate(shapes)
        ]
        leaves, spec = trees.flatten(self._jacobian.nested(call, numbered))
        positions = [[0] * len(primals) for _ in shapes]
        tensors = 0
        for at, block in enumerate(leaves):
            if isinstance(block, _BlockPosition):
                primal = primals[block.primal]
                leaves[at] = TensorSpec(block.shape, primal.dtype, primal.device)
                positions[block.output][block.primal] = tensors
                tensors += 1
        return Template(spec, leaves), positions


def _memory(tensor: Tensor) -> int:
    """Where the numbers of a dense tensor and of its views are."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


class _BlockPosition:
    """A leaf that stands for a block of the Jacobian; a container of tensors may look at its shape."""

    def __init__(self, output: int, primal: int, shape: torch.Size) -> None:
        self.output, self.primal, self.shape = output, primal, shape


def name_of(func: object) -> str:
    """The function's name for messages, such as hessian(loss)."""
    if isinstance(func, Jacobian):
        return f"{func.name}({name_of(func.func)})"
    return getattr(func, "__name__", None) or type(func).__name__
