"""Operators that come near to the inverse of another, for solvers: `jacobi`, `block_jacobi` and `nystrom`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autodiff import checks
from autodiff.core.call import matching
from autodiff.operators.given import Diagonal
from autodiff.operators.iteration import any_of
from autodiff.operators.linear_map import tree_class
from autodiff.operators.operator import Block, Operator
from autodiff.operators.space import Leaves, Space
from autodiff.types import Wrt


def jacobi(A: Operator, diagonal: Any = None, *, damping: float = 0.0) -> Operator:
    r"""The Jacobi preconditioner: the inverse of an operator's diagonal.

    .. math:: M = (\operatorname{diag}(A) + \mu I)^{-1}

    >>> import torch
    >>> from autodiff import operators
    >>> A = operators.from_matrix(torch.tensor([[4.0, 1.0], [1.0, 2.0]]))
    >>> operators.jacobi(A).to_matrix()
    tensor([[0.2500, 0.0000],
            [0.0000, 0.5000]])

    Args:
        A: a square operator.
        diagonal: a tree like ``A.domain`` with its diagonal, or what that is taken for, such as an estimate; None for
            ``A.diagonal()``, which takes a product for each unknown.
        damping: :math:`\mu`, for a solution with ``A + damping``.

    Returns:
        A diagonal operator on A's space, known to be positive where all its numbers are; a constant.

    Raises:
        SolverError: the diagonal holds zero, NaN or infinities.
        ShapeError: A is not square.
        StructureError, ShapeError, DtypeError, LeafError: ``diagonal`` is not a tree like the domain.
    """
    name = "operators.jacobi"
    checks.square_operator(name, A.name, A.domain, A.codomain)
    with torch.no_grad():
        tree = A.diagonal() if diagonal is None else diagonal
        found = A.domain.read(name, tree, "diagonal", only_trees=True).leaves
        leaves = [leaf.detach() + damping for leaf in A.domain.dense(found)]
        if any(any_of(~leaf.isfinite() | (leaf == 0)) for leaf in leaves):
            checks.raise_no_inverse(name, "a diagonal")
        positive = not any(leaf.is_complex() or any_of(leaf < 0) for leaf in leaves)
        return InverseDiagonal(A.domain.tree([1 / leaf for leaf in leaves]), positive)


@tree_class("tree")
@dataclass(eq=False, repr=False)
class InverseDiagonal(Diagonal):
    """A diagonal operator whose numbers may be known to be positive."""

    is_positive: bool = False

    name = "jacobi"

    @property
    def positive(self) -> bool:
        return self.is_positive


def block_jacobi(A: Operator, blocks: Sequence[Wrt] | None = None, *, damping: float = 0.0) -> Operator:
    r"""The block Jacobi preconditioner: the inverse of the blocks on an operator's diagonal.

    .. math:: M = \operatorname{blockdiag}(A_{11} + \mu I, \ldots, A_{ll} + \mu I)^{-1}

    Each block is formed, by a product for each of its columns, and factored: p numbers in a block take the memory of
    :math:`p^2`.

    >>> import torch
    >>> from autodiff import operators
    >>> like = {"w": torch.zeros(2), "b": torch.zeros(1)}
    >>> matrix = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 4.0]])
    >>> operators.block_jacobi(operators.from_matrix(matrix, like)).to_matrix()
    tensor([[ 1.0000, -1.0000,  0.0000],
            [-1.0000,  2.0000,  0.0000],
            [ 0.0000,  0.0000,  0.2500]])

    Args:
        A: a square operator.
        blocks: which leaves form a block, for each: a pattern of places or a tuple of patterns, as in ``wrt``
            (``["layer1.*", "layer2.*"]``). No leaf is in two of them, and those in none stay as they are. None makes
            a block of each leaf.
        damping: :math:`\mu`, for a solution with ``A + damping``.

    Returns:
        An operator on A's space, known to be positive where each block is symmetric and positive definite; a
        constant.

    Raises:
        SolverError: a block is singular, or not finite.
        ShapeError: A is not square.
        ArgnumsError: a pattern matches no leaf, or two blocks the same one.
    """
    name = "operators.block_jacobi"
    checks.square_operator(name, A.name, A.domain, A.codomain)
    paths = A.domain.paths
    groups = (
        [(i,) for i in range(len(paths))]
        if blocks is None
        else [tuple(matching(name, block, paths)) for block in blocks]
    )
    checks.disjoint_blocks(name, groups, paths)
    with torch.no_grad():
        factors = [_factored(A, group, damping) for group in groups]
    return InverseBlocks(
        [factor for factor, _ in factors], A.domain, tuple(groups), all(p for _, p in factors)
    )


def _factored(A: Operator, group: tuple[int, ...], damping: float) -> tuple[tuple[Tensor, ...], bool]:
    """The factors of a block, and whether it is symmetric and positive: one factor of Cholesky, or two of LU."""
    paths = tuple(A.domain.paths[i] for i in group)
    block = Block(A, group, group).to_matrix().detach()
    block = block + damping * torch.eye(block.shape[0], dtype=block.dtype, device=block.device)
    if any_of(~block.isfinite()):
        checks.raise_no_inverse("operators.block_jacobi", f"the block of {', '.join(paths)}")
    eps = torch.finfo(block.dtype).eps
    # A leaf may have no number.
    largest = block.abs().amax() if block.numel() else 0
    if not any_of((block - block.mH).abs() > 100 * eps**0.5 * largest):
        factor, failed = torch.linalg.cholesky_ex((block + block.mH) / 2)
        if not any_of(failed != 0):
            return (factor,), True
    factor, pivots, failed = torch.linalg.lu_factor_ex(block)
    if any_of(failed != 0):
        checks.raise_no_inverse("operators.block_jacobi", f"the block of {', '.join(paths)}")
    return (factor, pivots), False


@tree_class("factors")
@dataclass(eq=False, repr=False)
class InverseBlocks(Operator):
    """The inverse of blocks that are factored."""

    factors: list[tuple[Tensor, ...]]
    space: Space
    groups: tuple[tuple[int, ...], ...]
    is_positive: bool

    name = "block_jacobi"

    @property
    def domain(self) -> Space:
        return self.space

    codomain = domain

    @property
    def symmetric(self) -> bool:
        return self.is_positive

    @property
    def positive(self) -> bool:
        return self.is_positive

    def multiply(self, vectors: Leaves, *, adjoint: bool = False, count: int | None = None) -> Leaves:
        solved = list(vectors)
        for group, factor in zip(self.groups, self.factors, strict=True):
            part = self.space.part(group)
            given = [vectors[i] for i in group]
            right = part.joined(given)[:, None] if count is None else part.joined_columns(given, count)
            if len(factor) == 1:
                left = torch.cholesky_solve(right, factor[0])
            else:
                left = torch.linalg.lu_solve(factor[0], factor[1], right, adjoint=adjoint)
            leaves = part.split(left[:, 0]) if count is None else part.split_columns(left)
            for i, leaf in zip(group, leaves, strict=True):
                solved[i] = leaf
        return solved


def nystrom(A: Operator, rank: int, *, damping: float, generator: torch.Generator | None = None) -> Operator:
    r"""The randomised Nyström preconditioner of a positive operator with damping.

    .. math::

        M = (\hat\lambda_r + \mu)\, U (\hat\Lambda + \mu I)^{-1} U^{\mathsf H} + (I - U U^{\mathsf H}),
        \qquad A \approx U \hat\Lambda U^{\mathsf H}

    It is for a solution with ``A + damping``, where A's eigenvalues fall quickly: with a rank somewhat above twice the
    number of eigenvalues that are larger than the damping, the condition number comes down to a constant. Z.
    Frangella, J. A. Tropp and M. Udell, "Randomized Nyström preconditioning" (2021).

    >>> import torch
    >>> from autodiff import operators
    >>> A = operators.diagonal(torch.tensor([9.0, 4.0, 1.0]))
    >>> M = operators.nystrom(A, 3, damping=1.0)
    >>> (M @ (A + 1.0)).to_matrix().diagonal()
    tensor([2.0000, 2.0000, 2.0000])

    Args:
        A: a positive semidefinite operator, without the damping.
        rank: how many vectors A is multiplied by, in one batch; at most the number of unknowns. The memory is that of
            so many vectors.
        damping: :math:`\mu`, positive.
        generator: what the random numbers are drawn from; None for torch's own.

    Returns:
        A positive operator on A's space; a constant.

    Raises:
        OptionError: ``rank`` or ``damping`` has a value that is not allowed.
        SolverError: A is not positive.
        ShapeError: A is not square.
    """
    name = "operators.nystrom"
    checks.square_operator(name, A.name, A.domain, A.codomain)
    checks.rank(name, rank, A.domain.size)
    checks.positive_number(name, "damping", damping)
    checks.solver_dtypes(name, [spec.dtype for spec in A.domain.leaves])
    with torch.no_grad():
        U, eigenvalues = _nystrom_approximation(A, rank, generator, name)
        shrunk = (eigenvalues[..., -1:] + damping) / (eigenvalues + damping) - 1
    return LowRankUpdate(U, shrunk, A.domain)


def _nystrom_approximation(
    A: Operator, rank: int, generator: torch.Generator | None, name: str
) -> tuple[Tensor, Tensor]:
    """The eigenvectors and eigenvalues of A's approximation, from the largest down.

    # [n, rank], [rank]
    """
    device = A.device if generator is None else generator.device
    test = torch.randn(A.domain.size, rank, dtype=A.dtype, device=device, generator=generator)
    test, _ = torch.linalg.qr(test.to(A.device))
    Y = A.matmat(test).detach()
    if any_of(~Y.isfinite()):
        checks.raise_not_finite(name, "nystrom", 0)
    # A shift that makes the small matrix positive in spite of rounding; it is taken off again.
    shift = torch.finfo(Y.dtype).eps * torch.linalg.matrix_norm(Y) * A.domain.size**0.5
    Y = Y + shift.to(Y.dtype) * test
    small = test.mH @ Y
    factor, failed = torch.linalg.cholesky_ex((small + small.mH) / 2)
    if any_of(failed != 0):
        checks.raise_not_positive_for(name, A.name)
    # B = Y C^{-H} for small = C C^H, so that B B^H = Y small^{-1} Y^H.
    B = torch.linalg.solve_triangular(factor, Y.mH, upper=False).mH
    U, singular, _ = torch.linalg.svd(B, full_matrices=False)
    return U, (singular**2 - shift).clamp_min(0)


@tree_class("vectors", "weights")
@dataclass(eq=False, repr=False)
class LowRankUpdate(Operator):
    """I + U diag(w) U' for orthonormal columns U and weights above -1.

    # vectors: [n, rank], weights: [rank]
    """

    vectors: Tensor
    weights: Tensor
    space: Space

    name = "nystrom"
    symmetric = positive = True

    @property
    def domain(self) -> Space:
        return self.space

    codomain = domain

    def multiply(self, vectors: Leaves, *, adjoint: bool = False, count: int | None = None) -> Leaves:
        del adjoint
        U, weights = self.vectors, self.weights[:, None].to(self.vectors.dtype)
        given = (
            self.space.joined(vectors)[:, None]
            if count is None
            else self.space.joined_columns(vectors, count)
        )
        product = given + U @ (weights * (U.mH @ given))
        return self.space.split(product[:, 0]) if count is None else self.space.split_columns(product)
