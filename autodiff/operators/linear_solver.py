"""A solver as a value: what `solve` was asked for, to be used for a solution and again for its derivatives.

Provides `LinearSolver`. Imports the iterations, `implicit` and `checks`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from autodiff import checks
from autodiff._torch import fully_unwrapped, is_eager
from autodiff.core import trees
from autodiff.core.progress import Progress
from autodiff.core.rules import is_tracked
from autodiff.errors import ConvergenceWarning
from autodiff.operators.conjugate_gradient import conjugate_gradient
from autodiff.operators.gmres import gmres
from autodiff.operators.implicit import solved
from autodiff.operators.iteration import Solver, Steps, System, by_rows
from autodiff.operators.linear_map import tree_class
from autodiff.operators.lsmr import lsmr
from autodiff.operators.minres import minres
from autodiff.operators.operator import Adjoint, Operator, Wrapping
from autodiff.operators.refinement import Outcome, Tolerance, solve_in_rounds
from autodiff.operators.symmetry import acts_symmetric

if TYPE_CHECKING:
    from autodiff.operators.space import Leaves, Space

Method = Literal["cg", "minres", "gmres", "lsmr"]

# The iteration of each method, and what a round has to make of a residual so that another one follows. A round of GMRES
# is a cycle between restarts, which may make little of it.
ITERATIONS: dict[str, tuple[Solver, float]] = {
    "cg": (conjugate_gradient, 0.5),
    "minres": (minres, 0.5),
    "gmres": (gmres, 0.999),
    "lsmr": (lsmr, 0.5),
}


class Found(NamedTuple):
    """A solution that was found, and the steps that led to it."""

    outcome: Outcome
    steps: Steps


@dataclass
class LinearSolver:
    """Solves linear equations with an operator, or with its conjugate transpose; differentiated by `solution`."""

    name: str
    method: Method
    tolerance: Tolerance
    maxiter: int | None
    preconditioner: Operator | None
    restart: int
    progress: bool
    check: bool
    # The first solution is what was asked for; those after it are parts of derivatives.
    found: list[Found] = field(default_factory=list)

    def solution(self, A: Operator, B: Tensor, start: Tensor | None) -> Tensor:
        """The solution of A X = B, or that of least squares, with its derivatives.

        # B: [m, k], start: [n, k] -> [n, k]
        """
        rows, columns = A.shape
        if not rows * columns * B.shape[1]:
            self.found.append(_nothing_to_solve(self, B))
            return B.sum(0).expand(columns, -1) * 0
        if self.method != "lsmr":

            def solver(at: Operator, b: Tensor) -> Tensor:
                return self.find(at, b, None if self.found else start, adjoint=_is_adjoint(at, A))

            return solved(A, B, solver, name=self.name)
        return self._least_squares(A, B, start) if rows >= columns else self._least_norm(A, B, start)

    def _least_squares(self, A: Operator, B: Tensor, start: Tensor | None) -> Tensor:
        """The solution of the normal equations, which are never solved as such."""

        def solver(at: Operator, right: Tensor) -> Tensor:
            assert isinstance(at, Normal)
            if not self.found:
                return self.find(at.operand, B.detach(), start)
            # (A'A)^{-1} = A^+ (A^+)'
            return self.find(at.operand, self.find(at.operand.H, right, adjoint=True))

        return solved(Normal(A), A.H.matmat(B), solver, name=self.name)

    def _least_norm(self, A: Operator, B: Tensor, start: Tensor | None) -> Tensor:
        """A' y, for A A' y = B: the solution of least norm, or the nearest to the start."""
        if start is not None:
            B = B - A.matmat(start)
        with torch.no_grad():
            X = self.find(constant(A), B.detach()).detach()
        if not is_eager() or (torch.is_grad_enabled() and is_tracked(B + A.matmat(X))):

            def solver(at: Operator, right: Tensor) -> Tensor:
                assert isinstance(at, Normal)
                first = X if len(self.found) == 1 else self.find(at.operand.H, right)
                return self.find(at.operand, first, adjoint=True)

            X = A.H.matmat(solved(Normal(A.H), B, solver, name=self.name))
        return X if start is None else start + X

    def find(self, A: Operator, B: Tensor, start: Tensor | None = None, *, adjoint: bool = False) -> Tensor:
        """The solution of A X = B for constants; ``adjoint`` if A is the conjugate transpose of what was asked for.

        # B: [m, k], start: [n, k] -> [n, k]
        """
        first = not self.found
        symmetric = self.method in ("cg", "minres")
        if first and symmetric and self.check and not (A.symmetric or acts_symmetric(A)):
            checks.raise_not_symmetric_for(self.name, self.method, A.name)
        system = self._system(A, B.dtype, adjoint=adjoint)
        limit = self.maxiter or 10 * max(A.shape)
        shown = first and self.progress
        iterate, least = ITERATIONS[self.method]
        with Progress(f"{self.name}: {self.method}", limit, 0, unit="step", shown=shown) as bar:
            steps = Steps(self.name, self.method, limit, bar)
            rows = None if start is None else start.mT
            outcome = solve_in_rounds(iterate, system, B.mT, rows, self.tolerance, steps, least)
        self.found.append(Found(outcome, steps))
        if not first:
            self.warn(self.found[-1], "in a derivative, ", stacklevel=2)
        return outcome.solution.mT

    def _system(self, A: Operator, dtype: torch.dtype, *, adjoint: bool) -> System:
        M = self.preconditioner
        if self.method != "lsmr":
            # Of a symmetric method it is symmetric.
            M = M.H if M is not None and adjoint and self.method == "gmres" else M
            back = A.H
        else:
            # It is for A's domain.
            M = None if adjoint else M
            back = A.H if M is None else M.H @ A.H
        precondition = None if M is None else by_rows(M, dtype)
        slope = self.tolerance.relative if self.method == "lsmr" else 0.0
        return System(by_rows(A, dtype), by_rows(back, dtype), precondition, self.restart, slope)

    def warn(self, found: Found, where: str, stacklevel: int) -> None:
        """A warning if a right-hand side is not solved as exactly as was asked for."""
        _, residuals, converged, reason = found.outcome
        missing = ~fully_unwrapped(converged)
        if reason == "converged":
            return
        count, total = int(missing.sum()), missing.numel()
        worst = float(fully_unwrapped(residuals).max())
        of_many = f" for {count} of {total} right-hand sides" if total > 1 else ""
        advice = (
            "Raise maxiter, loosen rtol, or pass a preconditioner."
            if reason == "maxiter"
            else "More steps do not make it smaller: loosen rtol, compute in double precision, or take method='lsmr' "
            "if the operator is singular."
        )
        warnings.warn(
            f"{self.name}: {where}{self.method} has not converged after {found.steps.taken} of {found.steps.limit} "
            f"steps: the residual is {worst:.1e} of b{of_many}, where {self.tolerance.relative:.1e} was asked for. "
            f"{advice}",
            ConvergenceWarning,
            stacklevel=stacklevel + 1,
        )


@tree_class("operand")
@dataclass(eq=False, repr=False)
class Normal(Wrapping):
    """The normal operator A' A of an operator A."""

    operand: Operator
    symmetric = positive = True

    @property
    def name(self) -> str:
        return f"({self.operand.name}).H @ {self.operand.name}"

    @property
    def codomain(self) -> Space:
        return self.operand.domain

    @property
    def cost(self) -> float:
        return 2 * self.operand.cost

    def multiply(self, vectors: Leaves, *, adjoint: bool = False, count: int | None = None) -> Leaves:
        del adjoint
        return self.operand.multiply(self.operand.multiply(vectors, count=count), adjoint=True, count=count)


def constant(operator: Operator) -> Operator:
    """The operator without what its tensors are differentiated by; itself where that is nothing."""
    leaves, spec = trees.flatten(operator)
    if not any(isinstance(leaf, Tensor) and is_tracked(leaf) for leaf in leaves):
        return operator.prepared()
    constants = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    same: Operator = trees.unflatten(spec, constants)
    return same.prepared()


def _is_adjoint(one: Operator, other: Operator) -> bool:
    return isinstance(one, Adjoint) != isinstance(other, Adjoint)


def _nothing_to_solve(solver: LinearSolver, B: Tensor) -> Found:
    """What is said of a system without unknowns, equations or right-hand sides."""
    left = (B != 0).any(0).to(B.real.dtype if B.is_complex() else B.dtype)
    outcome = Outcome(B, left, torch.ones_like(left, dtype=torch.bool), "converged")
    return Found(outcome, Steps(solver.name, solver.method, 0, Progress("", 0, 0, unit="step", shown=False)))
