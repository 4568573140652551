"""Gauss quadrature of an operator's spectrum: Lanczos iterations from several random vectors at once.

Provides `gauss_rules`, for the spectral density, and `log_samples`, for the determinant. Imports `probes` and the
operators.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from autodiff import checks
from autodiff._torch import fully_unwrapped
from autodiff.core.rules import Rules, attach, is_tracked
from autodiff.operators.implicit import solved
from autodiff.operators.linear_solver import LinearSolver
from autodiff.operators.probes import computed_in, constant_product
from autodiff.operators.refinement import Tolerance
from autodiff.operators.symmetry import acts_symmetric

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from autodiff.operators.operator import Operator
    from autodiff.operators.probes import Drawing

# The Lanczos vectors of the probes that are iterated together take at most so many bytes.
_BASIS_BYTES = 2**30


class GaussRules(NamedTuple):
    """For each probe z nodes and weights: sum_j w_j f(theta_j) = z^H f(A) z / z^H z for f of a degree below 2 steps.

    ``first`` are the products with the probes, scaled to norm one, and tracked where A is. ``basis`` holds the Lanczos
    vectors of each, ``vectors`` the eigenvectors of its tridiagonal matrix.

    # nodes, weights: [probes, steps], first: [n, probes], basis: [probes, steps, n], vectors: [probes, steps, steps]
    """

    nodes: Tensor
    weights: Tensor
    first: Tensor
    basis: Tensor
    vectors: Tensor

    def applied(self, values: Tensor) -> Tensor:
        """f(A) z / |z| of each probe z, from the values of f at the nodes.

        # values: [probes, steps] -> [n, probes]
        """
        coefficients = self.vectors @ (values * self.vectors[:, 0].conj())[..., None].to(self.vectors.dtype)
        return (self.basis.mT @ coefficients.to(self.basis.dtype)).squeeze(-1).mT


def gauss_rules(
    name: str, A: Operator, probes: Drawing, count: int, steps: int, check: bool
) -> Iterator[GaussRules]:
    """The rules of so many probes, as many of them at a time as fit; the operator is prepared.

    They have fewer steps where the space has no more dimensions.
    """
    checks.square_operator(name, A.name, A.domain, A.codomain)
    checks.some_number(name, A.name, A.domain)
    if check and not A.symmetric and not acts_symmetric(A):
        checks.raise_needs_symmetric(name, A.name)
    steps = min(steps, A.domain.size)
    bytes_each = A.domain.size * steps * computed_in(A.dtype).itemsize
    for Z in probes.batches(count, bytes_each, _BASIS_BYTES):
        yield _lanczos(A, Z, steps)


def _lanczos(A: Operator, Z: Tensor, steps: int) -> GaussRules:
    """Lanczos iterations from each column, orthogonalised in full, twice.

    Where the space of a probe is closed under A, its iteration has ended: its other diagonal entries are its first one,
    which is inside of its spectrum, and they have no weight.
    """
    wide = computed_in(A.dtype)
    count, eps = Z.shape[1], torch.finfo(wide).eps
    start = (Z.to(wide) / torch.linalg.vector_norm(Z.to(wide), dim=0)).mT
    first = A.matmat(start.mT.to(A.dtype)).to(wide)
    product = first.detach().mT
    # Not zeros(...): of a product that is batched this is batched, and can be written to.
    basis = product.new_zeros((count, steps, A.domain.size))
    basis[:, 0] = start
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    alive = torch.ones(count, dtype=torch.bool, device=Z.device)
    scale = torch.zeros(count, dtype=wide.to_real(), device=Z.device)
    with torch.no_grad():
        for step in range(steps):
            if step:
                product = constant_product(A, basis[:, step].mT.to(A.dtype)).to(wide).mT
            entry = (basis[:, step].conj() * product).sum(1).real
            diagonal.append(torch.where(alive, entry, diagonal[0]) if step else entry)
            if step + 1 == steps:
                break
            known = basis[:, : step + 1]
            for _ in range(2):
                product = product - (known.mT @ (known.conj() @ product[..., None])).squeeze(-1)
            norm = torch.linalg.vector_norm(product, dim=1)
            scale = torch.maximum(scale, entry.abs() + norm)
            alive = alive & (norm > 10 * eps * scale)
            beside.append(torch.where(alive, norm, 0))
            if not bool(fully_unwrapped(alive).any()):
                break
            basis[:, step + 1] = torch.where(alive, 1 / torch.where(alive, norm, 1), 0)[:, None] * product
    used = len(diagonal)
    middle, side = torch.stack(diagonal, -1), torch.stack(beside[: used - 1], -1) if used > 1 else None
    matrix = torch.diag_embed(middle)
    if side is not None:
        matrix = matrix + torch.diag_embed(side, 1) + torch.diag_embed(side, -1)
    nodes, vectors = torch.linalg.eigh(matrix)
    return GaussRules(nodes, vectors[:, 0] ** 2, first, basis[:, :used], vectors)


def log_samples(name: str, A: Operator, probes: Drawing, count: int, steps: int, check: bool) -> Tensor:
    """z^H log(A) z for so many probes of norm sqrt(n), with the derivative of the logarithm's trace."""
    samples, A = [], A.prepared()
    for rules in gauss_rules(name, A, probes, count, steps, check):
        smallest = fully_unwrapped(rules.nodes)
        if bool((smallest <= 0).any()):
            checks.raise_not_positive_definite(name, A.name, float(smallest.min()))
        size = A.domain.size
        values = size * (rules.weights * rules.nodes.log()).sum(1)
        if is_tracked(rules.first):
            solutions = size * _solutions(name, A, rules)
            (values,) = attach(_LogDerivative(), [values], [rules.first, solutions])
        samples.append(values)
    return torch.cat(samples)


def _solutions(name: str, A: Operator, rules: GaussRules) -> Tensor:
    """A^-1 z / |z| of each probe by the same iterations, which are those of conjugate gradients; differentiated.

    # [n, probes]
    """
    starts = rules.basis[:, 0].mT
    first = [rules.applied(1 / rules.nodes).to(A.dtype)]
    tolerance = Tolerance(torch.finfo(A.dtype).eps ** (2 / 3), 0.0)
    solver = LinearSolver(name, "cg", tolerance, None, None, 1, progress=False, check=False)

    def solution(at: Operator, right: Tensor) -> Tensor:
        return first.pop() if first else solver.find(at, right)

    return solved(A, starts.to(A.dtype), solution, name=name).to(starts.dtype)


class Undifferentiable(Rules):
    """No derivative where one is asked for: an error, where a constant would be wrong without a message."""

    def __init__(self, name: str, what: str, way_out: str) -> None:
        self._texts = name, what, way_out

    def pull(
        self, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        del saved, cotangents, wanted
        checks.raise_undifferentiable(*self._texts)

    def push(self, saved: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        del saved, tangents
        checks.raise_undifferentiable(*self._texts)


class _LogDerivative(Rules):
    """The derivative of samples in the products A z: <A^-1 z, dA z>. ``saved`` are the products, and A^-1 z.

    The values do not depend on the latter; their derivatives do.
    """

    def pull(
        self, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        del wanted
        (cotangent,) = cotangents
        return [None if cotangent is None else cotangent * saved[1], None]

    def push(self, saved: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        tangent = tangents[0]
        return [None if tangent is None else (saved[1].conj() * tangent).sum(0).real]
