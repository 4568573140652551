"""What the iterations of solvers have in common: rows, masks, and one look at the device in each step.

A solver works on several right-hand sides at once. They are the rows of a tensor, whose numbers lie side by side; what
belongs to one of them, such as a step length, is a tensor ``[k]``. Imports `_torch`, `checks` and `core.progress`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from autodiff import checks
from autodiff._torch import fully_unwrapped, functorch_active

if TYPE_CHECKING:
    from collections.abc import Callable

    from autodiff.core.progress import Progress
    from autodiff.operators.linear_map import LinearMap

# Rows of so many numbers are worth a call each: a heuristic.
_LONG = 4096
# What a right-hand side's iteration came to in a step. The largest of all decides.
DONE, ACTIVE, INDEFINITE, BAD_PRECONDITIONER, NOT_FINITE = range(5)


@dataclass
class System:
    """The equations to solve, as products with rows.

    # multiply: [k, n] -> [k, m]
    # multiply_adjoint: [k, m] -> [k, n]
    # precondition: [k, m] -> [k, n]
    """

    multiply: Callable[[Tensor], Tensor]
    multiply_adjoint: Callable[[Tensor], Tensor]
    precondition: Callable[[Tensor], Tensor] | None
    restart: int
    # For least squares: the norm of A'r that is small enough, as a part of those of A and r; and the norm of A from
    # below, as LSMR learns it.
    slope: float = 0.0
    size: Tensor | None = None


class Solver(Protocol):
    """An iteration that begins at zero.

    # residuals: [k, m], targets: [k] -> [k, n]
    """

    def __call__(self, system: System, residuals: Tensor, targets: Tensor, steps: Steps, /) -> Tensor:
        """Solve until the norm of each residual is at most its target, or ``steps`` end."""


def by_rows(operator: LinearMap, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The product with each row.

    # [k, n] -> [k, m]
    """

    def multiply(rows: Tensor) -> Tensor:
        if rows.shape[0] == 1:
            return operator.matvec(rows[0]).to(dtype)[None]
        return operator.matmat(rows.mT).mT.to(dtype)

    return multiply


@dataclass
class Steps:
    """The steps of an iteration, counted over all its rounds."""

    name: str
    method: str
    limit: int
    progress: Progress
    taken: int = 0
    # What the norms of this round are multiplied by, to be parts of the right-hand sides'.
    scale: Tensor | None = None
    # The norm of each residual before each step, as such a part.
    history: list[Tensor] = field(default_factory=list)
    # How many steps each right-hand side took.
    counts: Tensor | None = None

    def goes_on(self, state: Tensor, norms: Tensor, certain: Callable[[], Tensor] | None = None) -> bool:
        """Whether another step is taken; ``norms`` are those of the residuals. It waits for the device, once.

        Before an operator is called indefinite, ``certain`` looks again, and returns the state.

        # state, norms: [k]

        Raises:
            SolverError: the method cannot go on.
        """
        state = torch.where(norms.isfinite(), state, NOT_FINITE)
        came = int(fully_unwrapped(state).max())
        if came == INDEFINITE and certain is not None:
            state = certain()
            came = int(fully_unwrapped(state).max())
        match came:
            case _ if came == INDEFINITE:
                checks.raise_indefinite(self.name, self.taken)
            case _ if came == BAD_PRECONDITIONER:
                checks.raise_preconditioner_not_positive(self.name, self.method, self.taken)
            case _ if came == NOT_FINITE:
                checks.raise_not_finite(self.name, self.method, self.taken)
        if came == DONE or self.taken >= self.limit:
            return False
        self.taken += 1
        norms = norms if self.scale is None else norms * self.scale
        self.history.append(norms)
        active = (state == ACTIVE).to(torch.int64)
        self.counts = active if self.counts is None else self.counts + active
        if self.progress.shown:
            self.progress.advance(1, f"residual {float(fully_unwrapped(norms).max()):.1e}")
        return True


def inner(one: Tensor, other: Tensor) -> Tensor:
    """The real part of the inner product of each row with the other's.

    # [k, n], [k, n] -> [k]
    """
    product = inner_products(one, other)
    return product.real if product.is_complex() else product


def inner_products(one: Tensor, other: Tensor) -> Tensor:
    """The inner product of each row with the other's.

    # [k, n], [k, n] -> [k]
    """
    if one.is_cpu and one.shape[1] >= _LONG and not functorch_active():
        # BLAS, row by row: torch multiplies into a tensor as large as the rows, and sums that in 2 to 4 x the time.
        return torch.stack([torch.vdot(u, v) for u, v in zip(one, other, strict=True)])
    products: Tensor = torch.linalg.vecdot(one, other)
    return products


def norm(rows: Tensor) -> Tensor:
    """The norm of each row.

    # [k, n] -> [k]
    """
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return norms


def add(rows: Tensor, factor: Tensor, others: Tensor) -> Tensor:
    """``rows + factor * others``, written into ``rows`` in one pass, except inside transforms.

    # rows, others: [k, n], factor: [k]
    """
    factor = factor[:, None].to(rows.dtype)
    if functorch_active():
        return torch.addcmul(rows, factor, others)
    return rows.addcmul_(factor, others)


def add_to_multiple(rows: Tensor, factor: Tensor, others: Tensor) -> Tensor:
    """``factor * rows + others``, written into ``rows`` in one pass, except inside transforms.

    # rows, others: [k, n], factor: [k]
    """
    factor = factor[:, None].to(rows.dtype)
    if functorch_active():
        return torch.addcmul(others, factor, rows)
    return torch.addcmul(others, factor, rows, out=rows)


def divided(rows: Tensor, norms: Tensor) -> Tensor:
    """Each row divided by its norm; zero where that is zero.

    # rows: [k, n], norms: [k]
    """
    return rows * inverse(norms)[:, None].to(rows.dtype)


def inverse(numbers: Tensor) -> Tensor:
    """The inverse of each number; zero where that is zero."""
    zero = numbers == 0
    return torch.where(zero, 0, 1 / torch.where(zero, 1, numbers))


def rounding(rows: Tensor) -> float:
    """Below so much, as a part of the largest, a number of a product may be rounding alone."""
    return 100 * torch.finfo(rows.dtype).eps


def any_of(flags: Tensor) -> bool:
    """Whether one of the flags is set, in any sample of the batches around. It waits for the device."""
    return bool(fully_unwrapped(flags).any())
