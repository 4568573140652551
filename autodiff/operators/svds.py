"""The largest singular values of an operator and their vectors, by the eigenpairs of a product with its adjoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from autodiff import checks
from autodiff._torch import traced_inline_only
from autodiff.operators.eigenpairs import Eigenpairs
from autodiff.operators.eigsh import Problem
from autodiff.operators.lazy import lazy
from autodiff.operators.linear_map import tree_class
from autodiff.operators.operator import Operator, Wrapping
from autodiff.operators.space import Leaves, Space

if TYPE_CHECKING:
    pass


@overload
def svds(
    A: Operator,
    k: int = 6,
    *,
    tol: float | None = None,
    maxiter: int | None = None,
    ncv: int | None = None,
    block: int | None = None,
    v0: Any = None,
    residuals: Literal[False] = False,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def svds(
    A: Operator,
    k: int = 6,
    *,
    tol: float | None = None,
    maxiter: int | None = None,
    ncv: int | None = None,
    block: int | None = None,
    v0: Any = None,
    residuals: Literal[True],
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
@traced_inline_only
def svds(
    A: Operator,
    k: int = 6,
    *,
    tol: float | None = None,
    maxiter: int | None = None,
    ncv: int | None = None,
    block: int | None = None,
    v0: Any = None,
    residuals: bool = False,
    generator: torch.Generator | None = None,
) -> Any:
    r"""The ``k`` largest singular values of an operator and their singular vectors.

    .. math:: A v_i = \sigma_i u_i, \qquad A^{\mathsf H} u_i = \sigma_i v_i, \qquad \sigma_1 \ge \sigma_2 \ge \cdots

    The vectors on the side with fewer numbers are eigenvectors of :math:`A^{\mathsf H} A` or
    :math:`A A^{\mathsf H}`, as :func:`eigsh` finds them, and the others come from the singular values of A on their
    span. So what is below :math:`\sqrt\varepsilon\, \sigma_1` is not resolved.

    >>> import torch
    >>> from autodiff import operators
    >>> A = operators.jacobian(lambda x: torch.cat([3 * x[:2], x[2:].sum()[None]]))(torch.zeros(6))
    >>> U, S, Vh = operators.svds(A, 3)
    >>> S.round(decimals=5)
    tensor([3., 3., 2.])
    >>> U.shape, Vh.shape
    (torch.Size([3, 3]), torch.Size([3, 6]))

    It has the derivatives that :func:`eigsh` has, where the singular values are simple and not zero.

    Args:
        A: an operator of shape ``[m, n]``.
        k: how many singular values, from 1 to the smaller of m and n.
        tol: the iterations end when the residuals are at most ``tol sigma``, or rounding errors do not let them get
            smaller; None takes eps^(2/3).
        maxiter: the most products with a block; None takes 1000.
        ncv: the most vectors in the basis; None takes three times ``k``, and no fewer than ``k`` and 16 blocks.
        block: how many vectors are multiplied at once; None takes 2.
        v0: vectors to start from, of the space with fewer numbers, or of the domain where they have the same: a tree,
            ``[n]``, or ``[n, b]``.
        residuals: whether to return the norms of ``A v - sigma u`` and ``A^H u - sigma v`` together, too.
        generator: draws the vectors to start from.

    Returns:
        ``(U, S, Vh)`` or ``(U, S, Vh, residuals)``: ``[m, k]``, real numbers ``[k]`` in descending order, ``[k, n]``,
        and numbers ``[k]``, as torch.linalg.svd gives them.

    Raises:
        OptionError: ``k`` is not an int from 1 to the smaller of m and n, or another number not positive.
        ShapeError: ``v0`` is not of its space.
        SolverError: products are not finite.
        ConvergenceWarning: the residuals are larger than they should be after ``maxiter`` products.
        DegeneracyError: the derivative of a singular vector whose singular value is repeated, when it is computed.
    """
    name = "operators.svds"
    checks.operator(name, "A", A, Operator)
    checks.untraced_iteration(name)
    checks.positive_int(name, "k", k, "Ask for at least one singular value.")
    checks.pair_count(name, k, A.shape, "singular values")
    checks.iteration_options(name, tol=tol, maxiter=maxiter, ncv=ncv, block=block)
    tall = A.shape[0] >= A.shape[1]
    narrow = A if tall else A.H
    problem = Problem(name, narrow.H @ narrow, k, "LA")
    dimensions = problem.dimensions(ncv, block)
    if problem.worth_forming(dimensions):
        left, S, right = torch.linalg.svd(problem.formed(narrow), full_matrices=False)
        U, S, V = left[:, :k], S[:k], right[:k].mH
    else:
        until = problem.until(tol, maxiter)
        ritz = problem.solved(problem.start(dimensions.block, v0, generator), dimensions, until)
        problem.warn(ritz, until)
        U, S, V = _on_span(narrow, ritz.vectors)
        if problem.tracked:
            U, S, V = _with_derivatives(name, narrow, U, S, V)
    if residuals:
        to_left = narrow.matmat(V.to(A.dtype)) - U * S
        to_right = narrow.H.matmat(U.to(A.dtype)) - V * S
        norms = torch.hypot(to_left.norm(dim=0), to_right.norm(dim=0))
    if not tall:
        U, V = V, U
    found = U.to(A.dtype), S.to(problem.real_dtype), V.mH.to(A.dtype)
    return (*found, norms.to(problem.real_dtype)) if residuals else found


def _on_span(A: Operator, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular values and vectors of an operator on the span of orthonormal vectors, as constants."""
    with torch.no_grad():
        U, S, rotation = torch.linalg.svd(A.matmat(vectors).to(vectors.dtype).detach(), full_matrices=False)
        return U, S, vectors @ rotation.mH


def _with_derivatives(
    name: str, A: Operator, U: Tensor, S: Tensor, V: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A triple (u, s, v) is the eigenpair s, (u, v) of the operator with A and its adjoint off the diagonal."""
    root = 2**0.5
    pairs = Eigenpairs(name, Augmented(A), S, torch.cat([U, V]) / root)
    left, right = (root * pairs.vectors).split([U.shape[0], V.shape[0]])
    return left, pairs.values, right


@tree_class("operand")
@dataclass(eq=False, repr=False)
class Augmented(Wrapping):
    """The symmetric operator (u, v) -> (A v, A^H u)."""

    operand: Operator

    symmetric = True
    positive = False

    @property
    def name(self) -> str:
        return f"{self.operand.name} and its adjoint"

    @lazy
    def domain(self) -> Space:
        left, right = self.operand.codomain, self.operand.domain
        return Space.of((left.zeros(), right.zeros()))

    @property
    def codomain(self) -> Space:
        return self.domain

    @property
    def cost(self) -> float:
        return 2 * self.operand.cost

    def multiply(self, vectors: Leaves, *, adjoint: bool = False, count: int | None = None) -> Leaves:
        del adjoint
        split = len(self.operand.codomain.leaves)
        left, right = vectors[:split], vectors[split:]
        return [
            *self.operand.multiply(right, count=count),
            *self.operand.multiply(left, adjoint=True, count=count),
        ]
