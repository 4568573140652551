"""Eigenvalues and eigenvectors that were found as constants, with derivatives by the implicit function theorem.

Provides `Eigenpairs`. An eigenpair is the solution (v, l) of A v - l v = 0 and c^H v = 1, for a constant c, which is v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from autodiff import checks
from autodiff._torch import compiling, fully_unwrapped
from autodiff.core.progress import Progress
from autodiff.core.rules import attach
from autodiff.operators.implicit import ImplicitRules, LinearEquation, attached, captured
from autodiff.operators.iteration import Steps, System
from autodiff.operators.lazy import lazy
from autodiff.operators.linear_map import tree_class
from autodiff.operators.minres import minres
from autodiff.operators.operator import Adjoint, Operator, Wrapping
from autodiff.operators.refinement import Tolerance, solve_in_rounds
from autodiff.operators.space import Leaves, Space

if TYPE_CHECKING:
    from collections.abc import Sequence

# Eigenvalues that differ by less than so many rounding errors of the largest count as one that is repeated.
_APART = 100
# A derivative is solved for until its residual is so many rounding errors of the right-hand side, or for so many steps:
# at most so many for each unknown.
_EXACT = 100
_STEPS = 10_000
_STEPS_PER_UNKNOWN = 4
# With a residual of such a part of the right-hand side there is no solution, and with so many times as much as was
# asked for it is not one to rely on.
_SINGULAR = 0.1
_INEXACT = 100


class Eigenpairs:
    """Constant eigenpairs of an operator that is its own conjugate transpose, as they depend on it.

    # values: [k], vectors: [n, k]
    """

    def __init__(self, name: str, A: Operator, values: Tensor, vectors: Tensor) -> None:
        self._operator, self._values, self._vectors = A, values, vectors
        if compiling():
            return
        equation = EigenEquation(A, name, vectors)
        self._x = _joined(vectors, values.to(vectors.dtype))
        self._b = _joined(torch.zeros_like(vectors), torch.ones_like(values, dtype=vectors.dtype))
        constants = [tensor.detach() for tensor in equation.tensors]
        self._found = captured(equation, lambda: equation.image(constants, self._x), self._x)
        self._equation, self._solver = equation, Deflated(name)

    @property
    def values(self) -> Tensor:
        """The eigenvalues. Where the call is traced they have first derivatives alone."""
        if compiling():
            V = self._vectors
            AV = self._operator.matmat(V).to(V.dtype)
            quotients: Tensor = torch.linalg.vecdot(V, AV, dim=0).real
            return self._values + (quotients - quotients.detach())
        shown, tensors, tracked = [], [], set()
        if self._found is not None:
            shown, tensors, tracked = self._found.shown, self._found.tensors, self._found.tracked
        rules = _EigenvalueRules(self._equation, self._solver, tensors, tracked)
        tied: Tensor
        (tied,) = attach(rules, [self._values], [*self._equation.tensors, *shown, self._b, self._x])
        return tied

    @property
    def vectors(self) -> Tensor:
        """The eigenvectors. Forward mode solves for their derivatives here, reverse mode once these are asked for."""
        tied = attached(self._equation, self._x, self._b, self._found, self._solver)
        vectors, _ = _split(tied, self._vectors.shape)
        # The length of v is one, whatever c^H v = 1 leaves it.
        unit: Tensor = vectors / torch.linalg.vector_norm(vectors, dim=0)
        return unit


def _joined(vectors: Tensor, values: Tensor) -> Tensor:
    return torch.cat([vectors.reshape(-1), values])


def _split(x: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    n, k = shape
    vectors, values = x.split([n * k, k])
    return vectors.reshape(n, k), values


class EigenEquation(LinearEquation):
    """A v - l v = 0 and c^H v = 1 for k pairs (v, l) at once. ``tensors`` are A's, and the constants c, [n, k]."""

    def __init__(self, A: Operator, name: str, normals: Tensor) -> None:
        super().__init__(A, name)
        self.tensors = [*self.tensors, normals.detach()]

    def image(self, tensors: Sequence[Tensor], x: Tensor) -> Tensor:
        *of_operator, normals = tensors
        vectors, values = _split(x, normals.shape)
        product = self.at(of_operator).matmat(vectors).to(x.dtype)
        return _joined(product - vectors * values, torch.linalg.vecdot(normals, vectors, dim=0))

    def derivative(self, tensors: Sequence[Tensor], x: Tensor) -> Operator:
        *of_operator, normals = tensors
        vectors, values = _split(x, normals.shape)
        return Bordered(self.at(of_operator), normals, vectors, values)


@tree_class("operand", "normals", "eigenvectors", "eigenvalues")
@dataclass(eq=False, repr=False)
class Bordered(Wrapping):
    """(y, m) -> ((A - l) y - m v, c^H y) for each of k eigenpairs (v, l): how the equation depends on them."""

    operand: Operator
    normals: Tensor
    eigenvectors: Tensor
    eigenvalues: Tensor

    name = "A - lambda, bordered by its eigenvectors"

    symmetric = positive = False

    @lazy
    def domain(self) -> Space:
        n, k = self.eigenvectors.shape
        model = torch.zeros((n + 1) * k, dtype=self.eigenvectors.dtype, device=self.eigenvectors.device)
        return Space.of(model)

    @property
    def codomain(self) -> Space:
        return self.domain

    def multiply(self, vectors: Leaves, *, adjoint: bool = False, count: int | None = None) -> Leaves:
        (x,) = vectors
        if x is None:
            return [None]
        if count is not None:
            return [torch.stack([self._multiplied(row, adjoint) for row in x])]
        return [self._multiplied(x, adjoint)]

    def _multiplied(self, x: Tensor, adjoint: bool) -> Tensor:
        Y, m = _split(x, self.eigenvectors.shape)
        into, out_of, values = self.eigenvectors, self.normals, self.eigenvalues
        if adjoint:
            into, out_of, values = -self.normals, -self.eigenvectors, values.conj()
        image = self.operand.matmat(Y).to(x.dtype) - Y * values - into * m
        return _joined(image, torch.linalg.vecdot(out_of, Y, dim=0))


class _EigenvalueRules(ImplicitRules):
    """The rules of the eigenvalues alone, whose first derivatives take no solution: v^H dA v."""

    def _at(self, saved: Sequence[Tensor]) -> tuple[Tensor, Operator]:
        rules = ImplicitRules(self.equation, self.solver, self.captured, self.tracked)
        return rules._at(saved)  # noqa: SLF001  the eigenvectors have rules of their own

    def solve(self, A: Operator, right: Tensor) -> Tensor:
        bordered, is_adjoint = _bordered(A)
        V = bordered.eigenvectors
        squares = torch.linalg.vecdot(V, V, dim=0)
        if is_adjoint:
            # right: [k], the cotangents of the eigenvalues -> [(n + 1) k]
            return _joined(-V * (right / squares), torch.zeros_like(squares))
        image, _ = _split(right, V.shape)
        moved: Tensor = (-torch.linalg.vecdot(V, image, dim=0) / squares).real
        return moved


def _bordered(A: Operator) -> tuple[Bordered, bool]:
    """The operator of which this is it or its adjoint, and whether it is the adjoint."""
    is_adjoint = isinstance(A, Adjoint)
    bordered = A.operand if isinstance(A, Adjoint) else A
    assert isinstance(bordered, Bordered)
    return bordered, is_adjoint


@dataclass(frozen=True)
class Deflated:
    """The solver of equations with `Bordered` operators at eigenpairs of A.

    The parts of f along the known eigenvectors are divided by differences of eigenvalues. On what is orthogonal to
    these A - l is not singular, and MINRES solves for the rest.
    """

    name: str

    def __call__(self, A: Operator, b: Tensor) -> Tensor:
        bordered, is_adjoint = _bordered(A)
        V, values = bordered.eigenvectors, bordered.eigenvalues.real
        F, g = _split(b, V.shape)
        sign = -1 if is_adjoint else 1
        # components: [k, k], of each right-hand side along each eigenvector
        components = V.mH @ F
        own = components.diagonal()
        rest = F - V @ components
        rest = rest - V @ (V.mH @ rest)
        Y = (
            sign * V * g
            + V @ self._divided(components, values)
            + self._outside(bordered.operand, V, values, rest)
        )
        return _joined(Y, -sign * own)

    def _divided(self, components: Tensor, values: Tensor) -> Tensor:
        """The components along the other known eigenvectors, by the differences of eigenvalues."""
        gaps = values[:, None] - values
        others = components - components.diagonal().diag()
        close = gaps.abs() <= _APART * torch.finfo(values.dtype).eps * values.abs().amax()
        scale = components.abs().amax()
        matters = close & (others.abs() > _APART * torch.finfo(values.dtype).eps * scale)
        if bool(fully_unwrapped(matters).any()):
            checks.raise_degenerate(self.name, "two are the same to rounding errors")
        return torch.where(close, 0, others / torch.where(close, 1, gaps))

    def _outside(self, A: Operator, V: Tensor, values: Tensor, rest: Tensor) -> Tensor:
        """The solution of (A - l) z = r for r and z orthogonal to the known eigenvectors."""

        def multiply(rows: Tensor) -> Tensor:
            columns = rows.mT
            image = A.matmat(columns).to(V.dtype) - columns * values
            return (image - V @ (V.mH @ image)).mT

        with Progress(self.name, None, 0, unit="product", shown=False) as progress:
            limit = min(_STEPS, _STEPS_PER_UNKNOWN * len(V))
            steps = Steps(self.name, "minres", limit, progress)
            tolerance = Tolerance(_EXACT * torch.finfo(A.dtype).eps, 0.0)
            system = System(multiply, multiply, None, 1)
            found = solve_in_rounds(minres, system, rest.mT, None, tolerance, steps, 0.5)
        residual = float(fully_unwrapped(found.residuals).max())
        # Where the equation is nearly singular, its solution is as much larger as the eigenvalues are closer.
        nearest = _APART * torch.finfo(A.dtype).eps * values.abs().amax()
        lengths = torch.linalg.vector_norm(rest, dim=0)
        singular = torch.linalg.vector_norm(found.solution, dim=-1) * nearest > lengths
        if residual > _SINGULAR or bool(fully_unwrapped(singular).any()):
            checks.raise_degenerate(
                self.name, "an eigenvalue that was not asked for is the same to rounding errors"
            )
        if residual > _INEXACT * tolerance.relative:
            checks.warn_not_converged(
                self.name,
                "a derivative has",
                f"{steps.taken} products: the residual of its equation is {residual:.2g} of the right-hand side",
                "Its eigenvalues may lie close to others: pass a larger k, so that these are found as well.",
            )
        Z = found.solution
        Z = Z.mT
        return Z - V @ (V.mH @ Z)
