"""GMRES: restarts, singular operators, and a preconditioner on the right."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from autodiff import operators
from autodiff.errors import ConvergenceWarning
from operators.systems import Counted, matrix

D = torch.float64


@pytest.mark.parametrize("dtype", [D, torch.complex128], ids=str)
def test_residuals_are_the_smallest_in_the_krylov_space(dtype: torch.dtype) -> None:
    M, b, steps = matrix("gmres", 14, dtype), torch.randn(14, dtype=dtype), 7
    with pytest.warns(ConvergenceWarning):
        x = operators.solve(operators.from_matrix(M), b, "gmres", maxiter=steps)
    basis = [b]
    for _ in range(steps - 1):
        basis.append(M @ basis[-1])
        basis[-1] = basis[-1] / basis[-1].norm()
    K = torch.stack(basis, 1)
    y = torch.linalg.lstsq(M @ K, b[:, None]).solution
    assert_close(x, (K @ y)[:, 0], rtol=1e-6, atol=1e-8)


def test_cycle_that_does_not_help_is_the_last_one() -> None:
    """A rotation of the axes: GMRES finds nothing before it has all dimensions."""
    shift = torch.roll(torch.eye(8, dtype=D), 1, 0)
    b = torch.eye(8, dtype=D)[:, 2]
    counted = Counted(shift)
    with pytest.warns(ConvergenceWarning, match="More steps do not make it smaller"):
        operators.solve(counted.operator, b, "gmres", restart=7)
    assert counted.products <= 10
    x = operators.solve(counted.operator, b, "gmres", restart=8)
    assert_close(x, torch.eye(8, dtype=D)[:, 1], rtol=0, atol=1e-12)


def test_right_hand_sides_that_end_at_different_steps_of_a_cycle() -> None:
    M = torch.diag(torch.tensor([1.0, 2, 3, 4, 5, 6, 7], dtype=D))
    M[0, 1] = 0.5
    B = torch.zeros(7, 4, dtype=D)
    B[2, 0] = 1  # an eigenvector
    B[3, 1] = B[5, 1] = 1  # two of them
    B[:, 2] = torch.randn(7, dtype=D)
    X, info = operators.solve(operators.from_matrix(M), B, "gmres", rtol=1e-11, info=True)
    assert info.iterations.tolist() == [1, 2, 7, 0]
    assert_close(X, torch.linalg.solve(M, B), rtol=1e-8, atol=1e-10)


def test_singular_operator() -> None:
    M = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=D)
    with pytest.warns(ConvergenceWarning):
        x, info = operators.solve(operators.from_matrix(M), torch.ones(2, dtype=D), "gmres", info=True)
    assert x.isfinite().all()
    assert_close(info.residual_norm, (torch.ones(2, dtype=D) - M @ x).norm() / 2**0.5)
    # The same in rotated axes, where rounding hides the zeros.
    Q, _ = torch.linalg.qr(torch.randn(2, 2, dtype=D))
    with pytest.warns(ConvergenceWarning):
        x = operators.solve(operators.from_matrix(Q @ M @ Q.mT), Q.sum(1), "gmres")
    assert x.norm() < 10


def test_preconditioner_is_on_the_right() -> None:
    """Its adjoint is taken for derivatives, and the residuals are those of the system."""
    M, b = matrix("gmres", 25) * torch.logspace(-2, 2, 25, dtype=D), torch.randn(25, dtype=D)
    P = operators.from_matrix(torch.linalg.inv(M + 0.1 * torch.randn(25, 25, dtype=D)))
    tracked = b.clone().requires_grad_()
    x, info = operators.solve(operators.from_matrix(M), tracked, rtol=1e-10, preconditioner=P, info=True)
    assert info.iterations < 20
    x.sum().backward()
    assert tracked.grad is not None
    expected = torch.linalg.solve(M.mT, torch.ones(25, dtype=D))
    assert_close(tracked.grad, expected, rtol=1e-6, atol=1e-6)
