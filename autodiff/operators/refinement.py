"""Iterations in rounds, each of which begins at the true residual: what is reported is what the solution has.

The residual that an iteration updates drifts away from b - A x by rounding. So that is computed at the end of a round,
by one product, and where it is too large another round solves for it. Imports `iteration` and `checks`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch

from autodiff import checks
from autodiff.operators.iteration import Solver, Steps, System, any_of, inverse, norm

if TYPE_CHECKING:
    from torch import Tensor

Reason: TypeAlias = Literal["converged", "maxiter", "stagnated"]

# A round aims a little lower than it has to, so that rounding takes it over the target seldom.
_AIM = 0.95
# The last digits of a residual that does not become smaller any more.
_SAME = 1e-3


class Tolerance(NamedTuple):
    """The residual's norm is at most ``relative`` times that of the right-hand side, or ``absolute``."""

    relative: float
    absolute: float


class Outcome(NamedTuple):
    """A solution, the residuals that it has, and why there is no better one.

    # solution: [k, n], residuals (as parts of the right-hand sides' norms), converged: [k]
    """

    solution: Tensor
    residuals: Tensor
    converged: Tensor
    reason: Reason


def solve_in_rounds(
    solver: Solver,
    system: System,
    B: Tensor,
    start: Tensor | None,
    tolerance: Tolerance,
    steps: Steps,
    least: float,
) -> Outcome:
    """The solution of A X = B from a start, or from zero.

    A round that does not make one of the residuals smaller by the factor ``least`` is the last one. Where a round makes
    a residual larger, its right-hand side keeps the solution from before.

    # B: [k, m], start: [k, n] -> solution: [k, n]
    """
    R, X = (B, None) if start is None else (B - system.multiply(start), start)
    (of_b, _), (norms, scale) = _norm_and_scale(B), _norm_and_scale(R)
    if any_of(~(of_b.isfinite() & norms.isfinite())):
        checks.raise_right_side_not_finite(steps.name)
    # The solution is zero where b is.
    norms = torch.where(of_b == 0, 0, norms)
    if X is not None:
        X = torch.where(of_b[:, None] == 0, 0, X)
    targets = (tolerance.relative * of_b).clamp_min(tolerance.absolute)
    measure, before = norms, torch.full_like(norms, torch.inf)
    converged = norms <= targets
    units = _Units()
    scaled = units.of(system)
    lowest = 10 * torch.finfo(B.dtype).eps  # below that, a recurrence has rounding alone
    while True:
        reason = _reason_to_stop(converged, measure, before, least, steps)
        if reason is not None:
            break
        steps.scale = scale * inverse(of_b)
        goals = (_AIM * targets * inverse(scale)).clamp_min(lowest)
        goals = torch.where(converged, torch.inf, goals)
        step = solver(scaled, _scaled(R, inverse(scale)), goals, steps)
        step = units.divided(_scaled(step, torch.where(converged, 0, scale)))
        step = step if X is None else X + step
        left = B - system.multiply(step)
        came, scale_of_step = _norm_and_scale(left)
        if any_of(~came.isfinite()):
            checks.raise_not_finite(steps.name, steps.method, steps.taken)
        better = came <= (1 + _SAME) * norms
        zero = 0 if X is None else X
        X = torch.where(better[:, None], step, zero)
        R = torch.where(better[:, None], left, R)
        norms, scale = torch.where(better, came, norms), torch.where(better, scale_of_step, scale)
        before, (measure, converged) = measure, _judged(scaled, R, norms, scale, targets)
    if X is None:
        # A product of zeros has the width of the solution, and is batched where the operator is.
        X = torch.zeros_like(system.multiply_adjoint(R)) if system.slope else torch.zeros_like(R)
    return Outcome(X, norms * inverse(of_b), converged, reason)


class _Units:
    """What an operator's products are divided by, so that their squares neither overflow nor underflow.

    The first product tells, or the first one with the preconditioner: a number for each row, since inside vmap each
    sample has an operator of its own; None where no row needs it.
    """

    def __init__(self) -> None:
        self._known = False
        self._units: Tensor | None = None

    def of(self, system: System) -> System:
        """The system with the operator divided by its unit, and the preconditioner, its inverse, multiplied."""

        def multiply(rows: Tensor) -> Tensor:
            images = system.multiply(rows)
            self._learn(images, rows)
            return self.divided(images)

        def multiply_adjoint(rows: Tensor) -> Tensor:
            images = system.multiply_adjoint(rows)
            self._learn(images, rows)
            return self.divided(images)

        def precondition(rows: Tensor) -> Tensor:
            assert system.precondition is not None
            images = system.precondition(rows)
            self._learn(rows, images)
            return images if self._units is None else _scaled(images, self._units)

        # A preconditioner on the right maps the operator's domain to itself, and is a part of its adjoint.
        with_operator = system.precondition is None or system.slope > 0
        return replace(
            system,
            multiply=multiply,
            multiply_adjoint=multiply_adjoint,
            precondition=system.precondition if with_operator else precondition,
        )

    def divided(self, rows: Tensor) -> Tensor:
        return rows if self._units is None else _scaled(rows, 1 / self._units)

    def _learn(self, images: Tensor, rows: Tensor) -> None:
        if self._known:
            return
        self._known = True
        largest, limit = _largest(images) * inverse(_largest(rows)), torch.finfo(rows.dtype).max ** (1 / 3)
        unusual = largest.isfinite() & ((largest > limit) | ((largest < 1 / limit) & (largest > 0)))
        if any_of(unusual):
            self._units = torch.where(unusual, largest, 1)


def _largest(rows: Tensor) -> Tensor:
    """The largest number of each row."""
    largest: Tensor = torch.linalg.vector_norm(rows, torch.inf, dim=-1)
    return largest


def _reason_to_stop(
    converged: Tensor, measure: Tensor, before: Tensor, least: float, steps: Steps
) -> Reason | None:
    if not any_of(~converged):
        return "converged"
    if steps.taken >= steps.limit:
        return "maxiter"
    if not any_of(~converged & (measure <= least * before)):
        return "stagnated"
    return None


def _judged(
    system: System, R: Tensor, norms: Tensor, scale: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """By what a round is measured, and which right-hand sides are solved, exactly or by least squares."""
    converged = norms <= targets
    if system.size is None:
        return norms, converged
    unit = _scaled(R, inverse(scale))
    slopes = norm(system.multiply_adjoint(unit))
    return slopes * scale, converged | (slopes <= system.slope * system.size * norm(unit))


def _norm_and_scale(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of each row, and its largest number, without overflow or underflow.

    # rows: [k, n] -> [k], [k]
    """
    scale = _largest(rows)
    return scale * norm(_scaled(rows, inverse(scale))), scale


def _scaled(rows: Tensor, factors: Tensor) -> Tensor:
    return rows * factors[:, None].to(rows.dtype)
