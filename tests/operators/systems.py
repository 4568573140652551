"""Systems of equations whose solutions are known, for the tests of solvers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from autodiff import operators

if TYPE_CHECKING:
    from autodiff.operators import Operator

METHODS = ("cg", "minres", "gmres", "lsmr")


def spectrum(method: str, n: int) -> Tensor:
    """Eigenvalues for which a method is made: of both signs for MINRES, positive for CG."""
    values = torch.linspace(1, 50, n, dtype=torch.float64)
    return values * (-1) ** torch.arange(n) if method == "minres" else values


def matrix(method: str, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A matrix with such eigenvalues; one that is not symmetric for GMRES and LSMR."""
    Q, _ = torch.linalg.qr(torch.randn(n, n, dtype=dtype))
    M = (Q * spectrum(method, n).to(dtype)) @ Q.mH
    if method in ("cg", "minres"):
        return (M + M.mH) / 2
    return M + torch.randn(n, n, dtype=dtype)


def second_differences(n: int) -> Tensor:
    """The matrix of -u'' on n points, of condition number 4 (n + 1)^2 / pi^2."""
    one = torch.ones(n, dtype=torch.float64)
    return torch.diag(2 * one) - torch.diag(one[1:], 1) - torch.diag(one[1:], -1)


class Counted:
    """A matrix as an operator that counts its products, those of a block once."""

    def __init__(self, matrix: Tensor, *, symmetric: bool = False, positive: bool = False) -> None:
        self.products = self.adjoints = 0

        def matvec(v: Tensor) -> Tensor:
            self.products += 1
            return matrix @ v

        def rmatvec(v: Tensor) -> Tensor:
            self.adjoints += 1
            return matrix.mH @ v

        rows, columns = (torch.zeros(size, dtype=matrix.dtype) for size in matrix.shape)
        self.operator: Operator = operators.from_matvec(
            matvec,
            columns,
            rows if matrix.shape[0] != matrix.shape[1] else None,
            rmatvec=rmatvec,
            symmetric=symmetric,
            positive=positive,
            batched=True,
            check=False,
        )
