"""Least squares: tall, wide and singular operators."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import autodiff as ad
from autodiff import operators
from autodiff.testing import check_grads
from operators.systems import Counted

D = torch.float64


@pytest.mark.parametrize("dtype", [D, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(20, 7), (7, 20)], ids=["tall", "wide"])
def test_least_squares_of_least_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    M, B = torch.randn(shape, dtype=dtype), torch.randn(shape[0], 3, dtype=dtype)
    X, info = operators.solve(operators.from_matrix(M), B, rtol=1e-12, info=True)
    assert info.method == "lsmr"
    assert info.reason == "converged"
    assert_close(X, torch.linalg.pinv(M) @ B, rtol=1e-9, atol=1e-10)
    left = torch.linalg.vector_norm(B - M @ X, dim=0) / torch.linalg.vector_norm(B, dim=0)
    assert_close(info.residual_norm, left, rtol=1e-6, atol=1e-11)


def test_singular_operator() -> None:
    M = torch.randn(15, 4, dtype=D) @ torch.randn(4, 9, dtype=D)
    b = torch.randn(15, dtype=D)
    x = operators.solve(operators.from_matrix(M), b, rtol=1e-12)
    assert_close(x, torch.linalg.pinv(M) @ b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("shape", [(20, 7), (7, 20)], ids=["tall", "wide"])
def test_solution_is_the_nearest_to_the_start(shape: tuple[int, int]) -> None:
    M, b, x0 = torch.randn(shape, dtype=D), torch.randn(shape[0], dtype=D), torch.randn(shape[1], dtype=D)
    tracked = M.clone().requires_grad_()
    for matrix in (M, tracked):
        x = operators.solve(operators.from_matrix(matrix), b, rtol=1e-12, x0=x0)
        assert_close(x.detach(), x0 + torch.linalg.pinv(M) @ (b - M @ x0), rtol=1e-8, atol=1e-9)


def test_right_preconditioner() -> None:
    scale = torch.logspace(-3, 3, 12, dtype=D)
    M, b = torch.randn(30, 12, dtype=D) * scale, torch.randn(30, dtype=D)
    counts = []
    for preconditioner in (None, operators.diagonal(1 / scale)):
        counted = Counted(M)
        x, info = operators.solve(
            counted.operator, b, "lsmr", rtol=1e-10, maxiter=5000, preconditioner=preconditioner, info=True
        )
        counts.append(counted.products)
        assert counted.products == pytest.approx(info.iterations.item(), abs=4)
    assert_close(x, torch.linalg.lstsq(M, b[:, None]).solution[:, 0], rtol=1e-6, atol=1e-8)
    assert counts[1] < 30 < counts[0]


@pytest.mark.parametrize("shape", [(6, 3), (3, 6), (4, 4)], ids=["tall", "wide", "square"])
def test_derivatives(shape: tuple[int, int]) -> None:
    M, b = torch.randn(shape, dtype=D), torch.randn(shape[0], dtype=D)

    def solution(matrix: Tensor, b: Tensor) -> Tensor:
        return operators.solve(operators.from_matrix(matrix), b, "lsmr", rtol=1e-13)

    check_grads(solution, (M, b), order=2)
    expected = torch.func.jacrev(lambda m: torch.linalg.pinv(m) @ b)(M)
    assert_close(ad.jacrev(lambda m: solution(m, b))(M), expected, rtol=1e-7, atol=1e-8)
