"""MINRES: what it minimises, with and without a preconditioner, and singular operators."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from autodiff import operators
from autodiff.errors import ConvergenceWarning
from operators.systems import matrix

D = torch.float64


@pytest.mark.parametrize("preconditioned", [False, True])
def test_residuals_are_the_smallest_in_the_krylov_space(preconditioned: bool) -> None:
    """Without a preconditioner the norm itself, with one that of the preconditioner, from the dense Krylov basis."""
    M, b, steps = matrix("minres", 15), torch.randn(15, dtype=D), 6
    d = torch.linspace(0.5, 2, 15, dtype=D) if preconditioned else torch.ones(15, dtype=D)
    P = operators.diagonal(d) if preconditioned else None
    with pytest.warns(ConvergenceWarning):
        x, info = operators.solve(
            operators.from_matrix(M), b, "minres", maxiter=steps, preconditioner=P, info=True
        )
    basis = [d * b]
    for _ in range(steps - 1):
        basis.append(d * (M @ basis[-1]))
        basis[-1] = basis[-1] / basis[-1].norm()
    K = torch.stack(basis, 1)
    root = d.sqrt()[:, None]
    y = torch.linalg.lstsq(root * (M @ K), root * b[:, None]).solution
    assert_close(x, (K @ y)[:, 0], rtol=1e-6, atol=1e-7)
    assert info.history.shape == (steps,)
    # The residual that the iteration knows is the true one: that of the last step but one here.
    with pytest.warns(ConvergenceWarning):
        x = operators.solve(operators.from_matrix(M), b, "minres", maxiter=steps - 1, preconditioner=P)
    assert_close(info.history[-1], (b - M @ x).norm() / b.norm(), rtol=1e-9, atol=0)


def test_singular_system_without_a_solution() -> None:
    Q, _ = torch.linalg.qr(torch.randn(12, 12, dtype=D))
    values = torch.tensor([5.0, -4, 3, -2, 1, 2, -1, 4, 0, 0, 0, 0], dtype=D)
    M, b = (Q * values) @ Q.mT, torch.randn(12, dtype=D)
    M = (M + M.mT) / 2
    with pytest.warns(ConvergenceWarning, match="take method='lsmr'"):
        x, info = operators.solve(operators.from_matrix(M), b, "minres", rtol=1e-9, info=True)
    assert info.iterations < 20
    assert_close((b - M @ x).norm(), (Q[:, 8:].mT @ b).norm(), rtol=1e-6, atol=0)
    b = M @ b
    x = operators.solve(operators.from_matrix(M), b, "minres", rtol=1e-9)
    assert_close(M @ x, b, rtol=1e-7, atol=1e-8)
