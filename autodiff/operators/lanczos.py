"""Outermost eigenpairs of a Hermitian matrix that is only multiplied, by thick-restarted block Lanczos iterations.

Works on constants ``[n, b]``, inside `vmap` as well: nothing but the end of the loop depends on numbers. Never sees a
tree or an operator. K. Wu and H. Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J.
Matrix Anal. Appl. 22 (2000).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from autodiff._torch import fully_unwrapped, functorch_active

if TYPE_CHECKING:
    from collections.abc import Callable

    from autodiff.types import Which


class Dimensions(NamedTuple):
    """How many vectors there are: in a block, in the largest basis, in the basis after a restart."""

    block: int
    basis: int
    kept: int


class Until(NamedTuple):
    """When the iterations end: after so many products with a block, or once the residuals are small.

    The residual of an eigenvalue is small below ``tol`` of the eigenvalue, or ``floor`` of the largest in magnitude.
    With ``tol=None`` nothing is compared.
    """

    products: int
    tol: float | None
    floor: float


class Ritz(NamedTuple):
    """Eigenpairs of the restriction to a subspace, and how far they are from those of the matrix."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    converged: Tensor
    products: int


def lanczos(
    multiply: Callable[[Tensor], Tensor],
    start: Tensor,
    k: int,
    which: Which,
    dimensions: Dimensions,
    until: Until,
    report: Callable[[Tensor], None] | None = None,
) -> Ritz:
    """``k`` eigenpairs, the outermost first.

    The basis V is kept orthonormal in full, and the matrix is restricted to it, T = V^H A V. A V - V T is W in the last
    block of columns, and zero in the others but for rounding errors, so that W gives the residuals.

    # start: [n, block] -> values: [k], vectors: [n, k], residuals: [k]
    """
    basis = _Basis(start, dimensions.basis)
    restriction, width = start.new_zeros(0, 0), dimensions.block
    for products in range(1, until.products + 1):
        V = basis.vectors
        product = multiply(V[:, -width:])
        columns = V.mH @ product
        W = product - V @ columns
        restriction = _bordered(restriction, columns)
        full = V.shape[1] + width > dimensions.basis
        is_last = products == until.products
        if V.shape[1] >= k and (until.tol is not None or full or is_last):
            values, S = torch.linalg.eigh(restriction)
            order = from_outermost(values, which)
            wanted, kept = order[:k], order[: dimensions.kept]
            theta, residuals = values.gather(0, wanted), norms(W, _columns(S[-width:], wanted))
            converged = _converged(values, theta, residuals, until)
            if report is not None:
                report(residuals)
            if is_last or (until.tol is not None and bool(fully_unwrapped(converged).all())):
                return Ritz(theta, V @ _columns(S, wanted), residuals, converged, products)
            if full:
                basis.replace(V @ _columns(S, kept))
                restriction = values.gather(0, kept).to(S.dtype).diag()
        basis.append(W, products)
    raise AssertionError("the last product returns")


def _converged(values: Tensor, theta: Tensor, residuals: Tensor, until: Until) -> Tensor:
    if until.tol is None:
        return torch.zeros_like(residuals, dtype=torch.bool)
    bound = torch.maximum(until.tol * theta.abs(), until.floor * values.abs().amax())
    return residuals <= bound


def norms(matrix: Tensor, combinations: Tensor) -> Tensor:
    """The norms of combinations of columns, whose squares need not be numbers that the dtype has."""
    scale = matrix.abs().amax().clamp_min(torch.finfo(matrix.dtype).tiny)
    lengths: Tensor = torch.linalg.vector_norm((matrix / scale) @ combinations, dim=0)
    return lengths * scale


def _bordered(matrix: Tensor, columns: Tensor) -> Tensor:
    """A Hermitian matrix with some columns more, whose conjugates are its last rows.

    # matrix: [m, m], columns: [m + b, b] -> [m + b, m + b]
    """
    size = matrix.shape[0]
    above, corner = columns[:size], columns[size:]
    corner = (corner + corner.mH) / 2
    return torch.cat([torch.cat([matrix, above], 1), torch.cat([above.mH, corner], 1)])


def _columns(matrix: Tensor, which: Tensor) -> Tensor:
    """Some columns of a matrix, which may be others in every sample of a batch."""
    return matrix.gather(1, which.expand(matrix.shape[0], which.shape[0]))


def from_outermost(ascending: Tensor, which: Which) -> Tensor:
    """The places of eigenvalues that come in ascending order, the most wanted first."""
    count = ascending.shape[0]
    places = torch.arange(count, device=ascending.device)
    if which == "LM":
        return ascending.abs().argsort(descending=True, stable=True)
    if which == "SA":
        return places
    if which == "LA":
        return places.flip(0)
    return torch.stack([places.flip(0), places], 1).flatten()[:count]


class _Basis:
    """Orthonormal vectors, to which blocks are added; in one buffer where no transform is active."""

    def __init__(self, start: Tensor, most: int) -> None:
        self._most = most
        self._set(_orthonormal(start.new_zeros(start.shape[0], 0), start, 0))

    def _set(self, vectors: Tensor) -> None:
        self.vectors = vectors
        self._buffer = None
        if not functorch_active():
            # Vectors are rows in memory, as those of the spaces are.
            self._buffer = vectors.new_empty(self._most, vectors.shape[0]).mT
            self.vectors = self._put(0, vectors)

    def _put(self, start: int, block: Tensor) -> Tensor:
        assert self._buffer is not None
        stop = start + block.shape[1]
        self._buffer[:, start:stop] = block
        return self._buffer[:, :stop]

    def replace(self, vectors: Tensor) -> None:
        """Go on with these vectors, which are orthonormal."""
        self.vectors = vectors if self._buffer is None else self._put(0, vectors)

    def append(self, block: Tensor, step: int) -> None:
        """Add as many orthonormal vectors, which span what the block adds to the space."""
        V = self.vectors
        block = _orthonormal(V, block, step)
        self.vectors = torch.cat([V, block], 1) if self._buffer is None else self._put(V.shape[1], block)


def _orthonormal(V: Tensor, block: Tensor, step: int) -> Tensor:
    """Orthonormal vectors with the span of a block's columns, orthogonal to V.

    To each column is added what rounding does anyway; where the space is closed under the matrix, as for one of low
    rank, it is what the space goes on with. Orthogonalising twice is enough.
    """
    precision = torch.finfo(block.dtype)
    block = block / block.abs().amax(0, keepdim=True).clamp_min(precision.tiny)
    block = block + 10 * precision.eps * pseudorandom(block.shape[0], block.shape[1], step, block)
    for _ in range(2):
        block, _ = torch.linalg.qr(block - V @ (V.mH @ block))
    return block


def pseudorandom(size: int, width: int, step: int, like: Tensor) -> Tensor:
    """Numbers from -1 to 1 without a pattern, others in every step; [size, width].

    A hash of their places, since vmap refuses random operations: the same on every device, for every sample.
    """
    count = size * width
    bits = torch.arange(step * count, (step + 1) * count, device=like.device)
    for _ in range(3):
        bits = ((bits ^ (bits >> 15)) * 0x7FEB352D + 0x3C6EF372) & 0xFFFFFFFF
    return bits.view(size, width).to(like.dtype) / 2**31 - 1
