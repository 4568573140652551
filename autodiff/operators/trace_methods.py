"""How traces, diagonals and norms are computed from products: the methods behind `estimators`.

Each gives the mean of samples and its standard error, in the dtype of sums. Imports `probes` and the operators.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autodiff import checks
from autodiff._torch import fully_unwrapped
from autodiff.core.seeds import StandardBasis
from autodiff.operators.probes import column_norms, computed_in, constant_product, standard_error

if TYPE_CHECKING:
    from autodiff.operators.operator import Operator
    from autodiff.operators.probes import Drawing

# So many products with the standard basis are computed at a time.
_ROWS = 64


def quadratic_forms(A: Operator, probes: Drawing, count: int, outside: Tensor | None = None) -> Tensor:
    """z^H A z for so many probes, or for their parts ``outside`` of the space of some orthonormal columns.

    # outside: [n, k] -> [count]
    """
    forms, dtype = [], computed_in(A.dtype)
    for Z in probes.batches(count):
        part = Z if outside is None else (Z.to(dtype) - outside @ (outside.mH @ Z.to(dtype))).to(A.dtype)
        forms.append((part.conj().to(dtype) * A.matmat(part).to(dtype)).sum(0))
    return torch.cat(forms)


def hutch_plus_plus(A: Operator, probes: Drawing, samples: int) -> tuple[Tensor, Tensor]:
    """tr(Q^H A Q), where Q spans a third of the products, and samples of the rest."""
    sketched = min(samples // 3, A.domain.size)
    dtype = computed_in(A.dtype)
    Q, _ = torch.linalg.qr(constant_product(A, probes.columns(sketched)).to(dtype))
    on_space = (Q.conj() * A.matmat(Q.to(A.dtype)).to(dtype)).sum()
    forms = quadratic_forms(A, probes, samples - 2 * sketched, Q)
    return on_space + forms.mean(), standard_error(forms)


def hutchinson_diagonal(A: Operator, probes: Drawing, samples: int) -> tuple[Tensor, Tensor]:
    """The mean of the samples and its standard error, batch by batch: mean and squared deviations are merged."""
    dtype, count = computed_in(A.dtype), 0
    total: Any = 0
    mean: Any = 0
    squares: Any = 0
    for Z in probes.batches(samples):
        batch = Z.conj().to(dtype) * A.matmat(Z).to(dtype)
        total = total + batch.sum(1)
        batch = batch.detach()
        size, own_mean = batch.shape[1], batch.mean(1)
        squares = squares + ((batch - own_mean[:, None]).abs() ** 2).sum(1)
        squares = squares + (own_mean - mean).abs() ** 2 * (count * size / (count + size))
        mean = mean + (own_mean - mean) * (size / (count + size))
        count += size
    variance = squares / (samples - 1) if samples > 1 else torch.full_like(squares, float("nan"))
    return total / samples, (variance / samples) ** 0.5


def exact_norm(A: Operator, dtype: torch.dtype) -> Tensor:
    """By a product for each row or each column, whichever are fewer."""
    rows, columns = A.shape
    if rows < columns:
        A = A.H
    zeros = torch.zeros(A.domain.size, dtype=A.domain.dtype, device=A.device)
    basis, norms = StandardBasis([zeros]), [zeros.new_zeros((), dtype=dtype.to_real())]
    for start in range(0, len(zeros), _ROWS):
        (strip,) = basis.vectors(start, min(start + _ROWS, len(zeros)))
        norms.append(column_norms(A.matmat(strip.mT).to(dtype).reshape(-1, 1))[0])
    return column_norms(torch.stack(norms)[:, None])[0]


def exact_logdet(name: str, A: Operator, check: bool) -> Tensor:
    """By Cholesky factors of the matrix."""
    checks.some_number(name, A.name, A.domain)
    matrix = A.to_matrix().to(computed_in(A.dtype))
    if check and not A.symmetric:
        tolerance = 4 * torch.finfo(A.dtype).eps ** (1 / 3)
        distance = torch.linalg.vector_norm((matrix - matrix.mH).detach())
        if bool(fully_unwrapped(distance > tolerance * torch.linalg.vector_norm(matrix.detach())).any()):
            checks.raise_needs_symmetric(name, A.name)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if bool(fully_unwrapped(failed).any()):
        checks.raise_not_positive_definite(name, A.name, None)
    logarithm: Tensor = 2 * factor.diagonal().real.log().sum()
    return logarithm
