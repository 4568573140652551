"""Outermost eigenvalues and eigenvectors of a symmetric operator: the public function, and what it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from autodiff import checks
from autodiff._torch import compiling, fully_unwrapped, traced_inline_only
from autodiff.core.progress import Progress
from autodiff.core.rules import is_tracked
from autodiff.operators.eigenpairs import Eigenpairs
from autodiff.operators.lanczos import (
    Dimensions,
    Ritz,
    Until,
    from_outermost,
    lanczos,
    pseudorandom,
)
from autodiff.operators.operator import Operator
from autodiff.operators.symmetry import acts_symmetric
from autodiff.types import Which

# Vectors in a block. Two take a tenth to a quarter more products than one, and half as many evaluations of
# what is differentiated over a data set; and an eigenvalue is found as often as it is repeated, up to the width.
BLOCK = 2
# The basis holds three times as many vectors as eigenvalues are wanted, and restarts from half of the others. With
# twice as many, as in ARPACK, blocks of 4 take up to 1.5 x as many products; with four times as many, 0.97 x.
_TIMES = 3
# So many blocks fit beside the wanted vectors at least.
_BLOCKS = 16
# The matrix is formed where it has at most so many times as many rows as the basis: it takes about as many products.
_WORTH_FORMING = 2
# A heuristic: after so many products with a block something else should be tried.
_MOST_PRODUCTS = 1000
# Rounding errors of a product and of what is orthogonalised, in units of the matrix' norm.
_ROUNDING = 10


@overload
def eigsh(
    A: Operator,
    k: int = 6,
    which: Which = "LA",
    *,
    tol: float | None = None,
    maxiter: int | None = None,
    ncv: int | None = None,
    block: int | None = None,
    v0: Any = None,
    residuals: Literal[False] = False,
    generator: torch.Generator | None = None,
    check: bool = True,
    progress: bool = False,
) -> tuple[Tensor, Tensor]: ...
@overload
def eigsh(
    A: Operator,
    k: int = 6,
    which: Which = "LA",
    *,
    tol: float | None = None,
    maxiter: int | None = None,
    ncv: int | None = None,
    block: int | None = None,
    v0: Any = None,
    residuals: Literal[True],
    generator: torch.Generator | None = None,
    check: bool = True,
    progress: bool = False,
) -> tuple[Tensor, Tensor, Tensor]: ...
@traced_inline_only
def eigsh(
    A: Operator,
    k: int = 6,
    which: Which = "LA",
    *,
    tol: float | None = None,
    maxiter: int | None = None,
    ncv: int | None = None,
    block: int | None = None,
    v0: Any = None,
    residuals: bool = False,
    generator: torch.Generator | None = None,
    check: bool = True,
    progress: bool = False,
) -> Any:
    r"""The ``k`` outermost eigenvalues of a symmetric operator and their eigenvectors.

    .. math:: A v_i = \lambda_i v_i, \qquad v_i^{\mathsf H} v_j = \delta_{ij}

    The operator is only multiplied, by blocks of vectors. Their Krylov space, whose basis is orthonormal, is restarted
    from its best eigenvectors when it is full. An operator of at most twice as many rows as that basis is formed
    instead, and the result exact.

    An eigenvalue that is repeated more often than a block has vectors may be found less often than it is repeated:
    pass a larger ``block`` where that matters. Every call starts from the same vectors unless there is a ``generator``.

    >>> import torch
    >>> from autodiff import operators
    >>> A = operators.diagonal(torch.arange(1000.0, dtype=torch.float64) ** 2)
    >>> values, vectors = operators.eigsh(A, 2)
    >>> values.round(decimals=6)
    tensor([998001., 996004.], dtype=torch.float64)
    >>> vectors.abs().argmax(0)
    tensor([999, 998])

    It has derivatives in the tensors that the operator was made of. Those of eigenvalues are right at every order
    where these are simple, and the first ones of sums over all copies of one that is repeated as well; those of
    eigenvectors, and second ones of eigenvalues, take solutions with :math:`A - \lambda_i`.

    Args:
        A: an operator that equals its conjugate transpose, of shape ``[n, n]``.
        k: how many eigenvalues, from 1 to n.
        which: ``"LA"`` for the largest, descending; ``"SA"`` for the smallest, ascending; ``"LM"`` for the largest in
            magnitude, descending in it; ``"BE"`` for half from each end, ascending. These are SciPy's names.
        tol: the iterations end when each ``|A v - lambda v|`` is at most ``tol |lambda|``, or rounding errors do
            not let it get smaller; the error of an eigenvalue is of the order of its square. None takes eps^(2/3).
        maxiter: the most products with a block; None takes 1000.
        ncv: the most vectors in the basis, which is what takes memory; None takes three times ``k``, and no fewer than
            ``k`` and 16 blocks.
        block: how many vectors are multiplied at once; None takes 2.
        v0: vectors to start from, as many as there are: a tree like ``A.domain``, ``[n]``, or ``[n, b]``.
        residuals: whether to return the norms of ``A v - lambda v`` too, by one product more for each vector.
        generator: draws the vectors to start from.
        check: whether to see if an operator that is not known to be symmetric is so for two vectors.
        progress: show a bar with the number of products, and the largest residual (needs tqdm).

    Returns:
        ``(values, vectors)`` or ``(values, vectors, residuals)``: real numbers ``[k]``; the vectors as columns
        ``[n, k]``, of which ``A.domain.unravel(vectors[:, i])`` makes trees; and numbers ``[k]``.

    Raises:
        ShapeError: the operator's domain and codomain differ, or ``v0`` is not of its space.
        SolverError: the operator is not symmetric, or its products are not finite.
        OptionError: ``k`` is not an int from 1 to n, ``which`` unknown, or another number not positive.
        ConvergenceWarning: the residuals are larger than they should be after ``maxiter`` products.
        DegeneracyError: the derivative of an eigenvector whose eigenvalue is repeated, when it is computed.

    K. Wu and H. Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix Anal.
    Appl. 22 (2000).
    """
    name = "operators.eigsh"
    problem = Problem(name, A, k, which, progress=progress)
    problem.check(symmetric=check)
    checks.iteration_options(name, tol=tol, maxiter=maxiter, ncv=ncv, block=block)
    if problem.worth_forming(problem.dimensions(ncv, block)):
        values, vectors = problem.dense()
    else:
        dimensions = problem.dimensions(ncv, block)
        start = problem.start(dimensions.block, v0, generator)
        limit = problem.until(tol, maxiter)
        ritz = problem.solved(start, dimensions, limit)
        problem.warn(ritz, limit)
        values, vectors = ritz.values, ritz.vectors
        if problem.tracked:
            pairs = Eigenpairs(name, A, values, vectors)
            values, vectors = pairs.values, pairs.vectors
    if not residuals:
        return values.to(problem.real_dtype), vectors.to(A.dtype)
    norms = (problem.multiply(vectors) - vectors * values).norm(dim=0)
    return values.to(problem.real_dtype), vectors.to(A.dtype), norms.to(problem.real_dtype)


@dataclass
class Problem:
    """Some eigenvalues of an operator that equals its conjugate transpose."""

    name: str
    A: Operator
    k: int
    which: Which
    # Whether the operator is differentiated, once this is known.
    tracked: bool | None = None
    progress: bool = False

    def check(self, *, symmetric: bool) -> None:
        """Raise where the operator or the numbers do not fit."""
        name, A = self.name, self.A
        checks.operator(name, "A", A, Operator)
        checks.untraced_iteration(name)
        if self.progress:
            Progress.check(name)
        checks.square_operator(name, A.name, A.domain, A.codomain)
        checks.positive_int(name, "k", self.k, "Ask for at least one eigenvalue.")
        checks.choice(name, "which", self.which, ("LA", "SA", "LM", "BE"))
        checks.pair_count(name, self.k, A.shape, "eigenvalues")
        if symmetric and not A.symmetric and not acts_symmetric(A):
            checks.raise_not_hermitian(name, A.name)

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: torch has no factorisations in half precision."""
        return torch.promote_types(self.A.dtype, torch.float32)

    @property
    def real_dtype(self) -> torch.dtype:
        return self.A.dtype.to_real()

    def multiply(self, block: Tensor) -> Tensor:
        """The product with a block of vectors."""
        return self.A.matmat(block).to(self.dtype)

    def dimensions(self, ncv: int | None, block: int | None) -> Dimensions:
        width = min(BLOCK if block is None else block, self.A.shape[0])
        smallest = self.k + 2 * width
        basis = max(_TIMES * self.k, self.k + _BLOCKS * width) if ncv is None else max(ncv, smallest)
        kept = self.k + (basis - self.k - width) // 2
        return Dimensions(width, basis, min(kept, basis - width))

    def worth_forming(self, dimensions: Dimensions) -> bool:
        """Whether the matrix is small."""
        return self.A.shape[0] <= _WORTH_FORMING * dimensions.basis

    def dense(self) -> tuple[Tensor, Tensor]:
        """The eigenpairs of the matrix itself, with torch's derivatives."""
        matrix = self.formed(self.A)
        values, vectors = torch.linalg.eigh((matrix + matrix.mH) / 2)
        return self.picked_pairs(values, vectors)

    def formed(self, A: Operator) -> Tensor:
        """The matrix of an operator."""
        matrix = A.to_matrix().to(self.dtype)
        self.refuse_not_finite(matrix)
        return matrix

    def refuse_not_finite(self, products: Tensor) -> None:
        """Refuse products that torch has no decomposition of."""
        if not compiling() and not bool(fully_unwrapped(products.isfinite()).all()):
            checks.raise_products_not_finite(self.name, self.A.name)

    def places(self, values: Tensor) -> Tensor:
        """The places of the wanted eigenvalues among some, in the order that is promised."""
        values = values.detach()
        ascending = values.argsort(stable=True)
        wanted = ascending.gather(0, from_outermost(values.gather(0, ascending), self.which)[: self.k])
        return (
            wanted.gather(0, values.gather(0, wanted).argsort(stable=True)) if self.which == "BE" else wanted
        )

    def picked(self, values: Tensor) -> Tensor:
        """The wanted eigenvalues among some."""
        return values.gather(0, self.places(values))

    def picked_pairs(self, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The wanted eigenpairs among some."""
        places = self.places(values)
        return values.gather(0, places), vectors.gather(1, places.expand(vectors.shape[0], self.k))

    def start(self, width: int, v0: Any = None, generator: torch.Generator | None = None) -> Tensor:
        """``width`` vectors to start from."""
        A = self.A
        like = torch.zeros((), dtype=self.dtype, device=A.device)
        if generator is None:
            vectors = pseudorandom(A.shape[0], width, 0, like)
        else:
            on = generator.device
            vectors = torch.randn(A.shape[0], width, generator=generator, dtype=self.dtype, device=on).to(
                A.device
            )
        if v0 is None:
            return vectors
        space = A.domain
        form, leaves, count = space.read(self.name, v0, "v0")
        given = space.joined_columns(leaves, count) if form == "matrix" else space.joined(leaves)[:, None]
        given = given.detach().to(self.dtype)
        return torch.cat([given, vectors[:, given.shape[1] :]], 1)[:, :width]

    def until(self, tol: float | None, maxiter: int | None) -> Until:
        eps = torch.finfo(self.A.dtype).eps
        return Until(maxiter or _MOST_PRODUCTS, eps ** (2 / 3) if tol is None else tol, _ROUNDING * eps)

    def solved(self, start: Tensor, dimensions: Dimensions, until: Until) -> Ritz:
        """The eigenpairs as constants."""
        enabled = torch.is_grad_enabled()

        def multiply(block: Tensor) -> Tensor:
            # The first product tells whether the operator is differentiated.
            with torch.set_grad_enabled(enabled and self.tracked is None):
                product = self.multiply(block)
                if self.tracked is None:
                    self.tracked = compiling() or is_tracked(product)
            self.refuse_not_finite(product)
            return product.detach()

        with torch.no_grad(), Progress(self.name, None, 0, unit="product", shown=self.progress) as bar:

            def report(residuals: Tensor) -> None:
                bar.advance(1, f"residual {float(fully_unwrapped(residuals).max()):.1e}")

            found = lanczos(
                multiply, start, self.k, self.which, dimensions, until, report if self.progress else None
            )
            values, vectors = self.picked_pairs(found.values, found.vectors)
            return found._replace(values=values, vectors=vectors)

    def warn(self, ritz: Ritz, until: Until) -> None:
        """Say so where the eigenpairs have not converged."""
        missing = self.k - int(fully_unwrapped(ritz.converged.sum()).min())
        if missing:
            largest = float(fully_unwrapped(ritz.residuals).max())
            checks.warn_not_converged(
                self.name,
                f"{missing} of {self.k} eigenpairs have",
                f"{until.products} products with a block: the largest |A v - lambda v| is {largest:.2g}, "
                f"with tol={until.tol:.2g}",
                "Pass a larger maxiter, ncv or tol.",
            )
