"""Conjugate gradients where the operator, or the preconditioner, is not positive."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import autodiff as ad
from autodiff import operators
from autodiff.errors import ConvergenceWarning, SolverError
from operators.systems import Counted, matrix, second_differences

D = torch.float64


def diagonal(*numbers: float, dtype: torch.dtype = D) -> Tensor:
    return torch.diag(torch.tensor(numbers, dtype=dtype))


@pytest.mark.parametrize(
    ("dense", "b"),
    [
        (diagonal(1, -1), [1.0, 1.0]),  # p'Ap is zero, and A p is not
        (diagonal(-3, -2), [1.0, 2.0]),
        (diagonal(5, 4, 3, -1e-3), [1.0, 1.0, 1.0, 1.0]),
        (matrix("minres", 12), [1.0] * 12),
    ],
    ids=["zero", "negative", "nearly positive", "mixed"],
)
@pytest.mark.parametrize("dtype", [torch.float32, D], ids=str)
def test_indefinite_operator_is_an_error_that_names_minres(
    dense: Tensor, b: list[float], dtype: torch.dtype
) -> None:
    A, right = operators.from_matrix(dense.to(dtype)), torch.tensor(b, dtype=dtype)
    with pytest.raises(SolverError, match=r"p'Ap is negative .* Take method='minres'"):
        operators.solve(A, right, "cg")
    # Also for one of several right-hand sides, of which one is zero.
    with pytest.raises(SolverError, match="minres"):
        operators.solve(A, torch.stack([torch.zeros_like(right), right], 1), "cg")
    x = operators.solve(A, right, "minres", rtol=1e-5)
    assert_close(x, torch.linalg.solve(dense.to(dtype), right), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, D], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_rounding_is_not_taken_for_an_indefinite_operator(seed: int, dtype: torch.dtype) -> None:
    """A semidefinite operator of rank 5: right-hand sides in its range, outside of it, and in its null space."""
    torch.manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(40, 40, dtype=dtype))
    A = operators.from_matrix((Q[:, :5] * torch.logspace(-3, 3, 5, dtype=dtype)) @ Q[:, :5].mT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for b in (A @ torch.randn(40, dtype=dtype), torch.randn(40, dtype=dtype), Q[:, 20]):
            _, info = operators.solve(A, b, "cg", rtol=1e-7, info=True, check=False)
            assert info.residual_norm <= 1.01


def test_null_space_is_left_with_a_warning() -> None:
    A = operators.from_matrix(diagonal(2.0, 0.0))
    with pytest.warns(ConvergenceWarning, match="if the operator is singular"):
        x, info = operators.solve(A, torch.tensor([0.0, 1.0], dtype=D), "cg", info=True)
    assert torch.equal(x, torch.zeros(2, dtype=D))
    assert info.reason == "stagnated"
    x = operators.solve(A, torch.tensor([3.0, 0.0], dtype=D), "cg")
    assert_close(x, torch.tensor([1.5, 0.0], dtype=D))


def test_converged_columns_do_not_count_as_indefinite() -> None:
    """They are solved exactly, and stay so while another right-hand side takes all its steps."""
    M = second_differences(30)
    values, vectors = torch.linalg.eigh(M)
    B = torch.stack([torch.zeros(30, dtype=D), vectors[:, 0], torch.randn(30, dtype=D)], 1)
    X, info = operators.solve(operators.from_matrix(M), B, "cg", rtol=1e-13, info=True)
    assert_close(X[:, 1], vectors[:, 0] / values[0], rtol=1e-10, atol=1e-11)
    assert_close(X, torch.linalg.solve(M, B), rtol=1e-8, atol=1e-9)
    assert info.converged.all()


def test_preconditioner_that_is_not_positive_is_refused() -> None:
    M, b = matrix("cg", 10), torch.randn(10, dtype=D)
    for method in ("cg", "minres"):
        with pytest.raises(SolverError, match=r"r'Mr is negative .* method='gmres'"):
            operators.solve(
                operators.from_matrix(M),
                b,
                method,
                preconditioner=operators.diagonal(-torch.ones(10, dtype=D)),
            )
    x = operators.solve(
        operators.from_matrix(M),
        b,
        "gmres",
        rtol=1e-9,
        preconditioner=operators.diagonal(-torch.ones(10, dtype=D)),
    )
    assert_close(x, torch.linalg.solve(M, b), rtol=1e-6, atol=1e-8)


def test_finite_termination() -> None:
    """Three different eigenvalues take three steps."""
    counted = Counted(diagonal(1, 1, 4, 4, 4, 9, 9), positive=True)
    _, info = operators.solve(counted.operator, torch.randn(7, dtype=D), "cg", rtol=1e-12, info=True)
    assert info.iterations == 3


def test_one_indefinite_sample_of_many() -> None:
    M, b = torch.stack([matrix("cg", 6), matrix("minres", 6), matrix("cg", 6)]), torch.ones(6, dtype=D)
    solution = lambda m: operators.solve(operators.from_matrix(m), b, "cg", rtol=1e-11)
    with pytest.raises(SolverError, match="minres"):
        ad.vmap(solution)(M)
    assert_close(ad.vmap(solution)(M[[0, 2]]), torch.linalg.solve(M[[0, 2]], b), rtol=1e-8, atol=1e-9)
