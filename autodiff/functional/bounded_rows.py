"""Jacobians and Hessians whose rows take about the memory of single rows, as legacy's loop over rows does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autodiff._torch import StopRecomputation, compiling, silenced_fallback_warning
from autodiff.core.chunks import Sizes
from autodiff.core.linearization import gradient
from autodiff.core.products import blocks_from_rows, products, restricted_to_outputs
from autodiff.core.seeds import StandardBasis
from autodiff.transforms.hessian import Hessian
from autodiff.transforms.jacobian import Jacobian

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from autodiff.core.call import Call
    from autodiff.core.linearization import Linearization
    from autodiff.core.products import Blocks
    from autodiff.core.tape import Tape

# So many bytes more or less do not matter, and rows of tiny functions all go into one batch.
_NEGLIGIBLE = 2**16


@dataclass(kw_only=True, eq=False)
class BoundedJacobian(Jacobian):
    """A Jacobian whose rows are pulled in batches that take about the memory of single rows.

    Where the function registers a hook, they are pulled one by one: it would be shown a batch. ``bounded=False`` pulls
    all rows in one batch. ``in_output_dtype`` gives blocks the dtype of their output, as forward mode does.
    """

    bounded: bool = False
    in_output_dtype: bool = False

    def by_rows(self, call: Call, linearized: Linearization) -> Blocks:
        """Rows of one output after the other, in batches where a batched pull is possible.

        A pull never runs the user's function again, so a batch that fails costs only its own time.
        """
        if not self.bounded or compiling():
            return super().by_rows(call, linearized)
        blocks: Blocks = []
        pull = self.puller(linearized)
        count = len(linearized.outputs)
        chunk_sizes = [1] * count if linearized.has_hooks() else _chunk_sizes(linearized, call.primals)
        for position, (output, chunk_size) in enumerate(zip(linearized.outputs, chunk_sizes, strict=True)):
            pull_one = restricted_to_outputs(pull, slice(position, position + 1), count, is_last=False)
            try:
                with silenced_fallback_warning:
                    rows = products(pull_one, StandardBasis([output]), Sizes(chunk_size))
            except StopRecomputation:
                raise  # a checkpoint around has seen what it needs
            except Exception:
                # Some backward passes cannot be batched: they read a value, or write in place. What they
                # raise then is up to them.
                if chunk_size == 1:
                    raise
                rows = products(pull_one, StandardBasis([output]), Sizes(1))
            (row,) = blocks_from_rows(rows, [output], call.primals)
            blocks.append([block.to(output.dtype) for block in row] if self.in_output_dtype else row)
        return blocks


@dataclass(kw_only=True, eq=False)
class BoundedHessian(BoundedJacobian, Hessian):
    """The Hessian of a scalar function; ``check_gradient`` is shown its gradient."""

    check_gradient: Callable[[list[Tensor]], None]

    def first_derivative(self, call: Call, tape: Tape) -> list[Tensor]:
        """The gradient."""
        slope = gradient(call)(tape)
        self.check_gradient(slope)
        return slope


def _chunk_sizes(linearized: Linearization, primals: Sequence[Tensor]) -> list[int]:
    """How many rows of each output keep the peak within about half of what single rows need.

    Single rows need the graph, and the result twice: as rows and stacked. A batched pull has about
    three of its largest cotangents alive at a time (a heuristic).
    """
    if linearized.batchable(Sizes(None)).size == 1:
        return [1] * len(linearized.outputs)
    total, largest = linearized.bytes_of_a_pull()
    row = sum(primal.numel() * primal.element_size() for primal in primals)
    budgets = [max((total + 2 * row * output.numel()) // 2, _NEGLIGIBLE) for output in linearized.outputs]
    return [max(1, budget // max(3 * largest + row, 1)) for budget in budgets]
