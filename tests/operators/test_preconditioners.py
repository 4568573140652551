"""Preconditioners against dense inverses, and by the steps that they save."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import autodiff as ad
from autodiff import operators
from autodiff.errors import ArgnumsError, OptionError, ShapeError, SolverError, StructureError
from operators.systems import matrix

D = torch.float64
LIKE = {
    "first": {"w": torch.zeros(2, 3, dtype=D), "b": torch.zeros(3, dtype=D)},
    "last": torch.zeros(4, dtype=D),
}


def positive(n: int) -> Tensor:
    root = torch.randn(n, n, dtype=D)
    return root @ root.mT + torch.diag(torch.logspace(0, 4, n, dtype=D))


def steps(dense: Tensor, method: Any, preconditioner: Any, b: Tensor) -> int:
    x, info = operators.solve(
        operators.from_matrix(dense, LIKE), b, method, rtol=1e-8, preconditioner=preconditioner, info=True
    )
    assert_close(x, torch.linalg.solve(dense, b), rtol=1e-4, atol=1e-6)
    return int(info.iterations)


@pytest.mark.parametrize("method", ["cg", "minres", "gmres"])
def test_preconditioners_save_steps(method: Any) -> None:
    M, b = positive(13), torch.randn(13, dtype=D)
    A = operators.from_matrix(M, LIKE)
    plain = steps(M, method, None, b)
    simple = steps(M, method, operators.jacobi(A), b)
    blocks = steps(M, method, operators.block_jacobi(A, ["first.*", "last"]), b)
    exact = steps(M, method, operators.block_jacobi(A, [("first.*", "last")]), b)
    assert exact <= 2 < blocks <= simple < plain


def test_jacobi() -> None:
    M = positive(13)
    A = operators.from_matrix(M, LIKE)
    assert_close(operators.jacobi(A, damping=0.5).to_matrix(), torch.diag(1 / (M.diagonal() + 0.5)))
    assert operators.jacobi(A).positive
    given = A.domain.unravel(torch.arange(1.0, 14.0, dtype=D))
    assert_close(operators.jacobi(A, given) @ torch.ones(13, dtype=D), 1 / torch.arange(1.0, 14.0, dtype=D))
    indefinite = operators.jacobi(operators.from_matrix(-M, LIKE))
    assert indefinite.symmetric
    assert not indefinite.positive


@pytest.mark.parametrize("symmetric", [True, False])
def test_block_jacobi(symmetric: bool) -> None:
    M = positive(13) if symmetric else matrix("gmres", 13)
    A = operators.from_matrix(M, LIKE)
    inverse = torch.zeros(13, 13, dtype=D)
    for part in (slice(0, 6), slice(6, 9), slice(9, 13)):
        block = M[part, part] + 0.25 * torch.eye(part.stop - part.start, dtype=D)
        inverse[part, part] = torch.linalg.inv(block)
    found = operators.block_jacobi(A, damping=0.25)
    assert_close(found.to_matrix(), inverse)
    assert_close(found.H.to_matrix(), inverse.mT)
    assert found.positive is symmetric
    v = torch.randn(13, dtype=D)
    assert_close(found @ v, inverse @ v)
    partial = operators.block_jacobi(A, ["last"])
    expected = torch.eye(13, dtype=D)
    expected[9:, 9:] = torch.linalg.inv(M[9:, 9:])
    assert_close(partial.to_matrix(), expected)


def test_nystrom_approximation_is_exact_for_low_rank() -> None:
    """For A of rank 5 with damping, CG with it takes a handful of steps, whatever the condition number."""
    Q, _ = torch.linalg.qr(torch.randn(60, 60, dtype=D))
    values = torch.cat([torch.logspace(1, 6, 5, dtype=D), torch.zeros(55, dtype=D)])
    M = (Q * values) @ Q.mT
    A = operators.from_matrix((M + M.mT) / 2)
    b = torch.randn(60, dtype=D)
    generator = torch.Generator().manual_seed(3)
    P = operators.nystrom(A, 8, damping=0.1, generator=generator)
    assert_close(
        P.to_matrix(), 0.1 * torch.linalg.inv(M + 0.1 * torch.eye(60, dtype=D)), rtol=1e-4, atol=1e-6
    )
    assert P.positive
    x, info = operators.solve(A + 0.1, b, "cg", rtol=1e-8, preconditioner=P, info=True)
    _, plain = operators.solve(A + 0.1, b, "cg", rtol=1e-8, info=True)
    assert info.iterations <= 4 < plain.iterations
    assert_close((M @ x) + 0.1 * x, b, rtol=1e-6, atol=1e-6)
    again = operators.nystrom(A, 8, damping=0.1, generator=generator.manual_seed(3))
    assert torch.equal(again.to_matrix(), P.to_matrix())


def test_nystrom_condition_number() -> None:
    """With a rank above 2 (effective dimension) + 1, the expected condition number is below 28 (theorem 1.1)."""
    Q, _ = torch.linalg.qr(torch.randn(80, 80, dtype=D))
    values, damping = 10.0 ** -torch.linspace(-2, 6, 80, dtype=D), 1.0
    A = operators.from_matrix((Q * values) @ Q.mT)
    rank = 2 * int(1.5 * (values / (values + damping)).sum()) + 1
    conditions = []
    for seed in range(20):
        P = operators.nystrom(A, rank, damping=damping, generator=torch.Generator().manual_seed(seed))
        spectrum = torch.linalg.eigvals(P.to_matrix() @ (A + damping).to_matrix()).real
        conditions.append(float(spectrum.max() / spectrum.min()))
    assert sum(conditions) / 20 < 28 < (values.max() + damping) / damping


def test_preconditioners_of_complex_operators() -> None:
    M = matrix("cg", 9, torch.complex128)
    A, b = operators.from_matrix(M), torch.randn(9, dtype=torch.complex128)
    for P in (operators.block_jacobi(A), operators.nystrom(A, 9, damping=1e-9), operators.jacobi(A)):
        x = operators.solve(A, b, "gmres", rtol=1e-10, preconditioner=P)
        assert_close(x, torch.linalg.solve(M, b), rtol=1e-7, atol=1e-8)
    assert_close(operators.block_jacobi(A).to_matrix(), torch.linalg.inv(M))


def test_preconditioner_of_a_network() -> None:
    """It is a constant: the solution's derivative does not depend on it."""
    params = {"w": torch.randn(4, 3, dtype=D), "b": torch.randn(3, dtype=D)}
    x = torch.randn(6, 4, dtype=D)
    loss = lambda p: ((x @ p["w"]).tanh() + p["b"]).pow(2).sum() + 20 * p["w"].pow(2).sum()

    def step(preconditioned: bool, params: Any) -> Tensor:
        A = operators.hessian(loss)(params)
        P = operators.block_jacobi(A) if preconditioned else None
        return operators.solve(A, ad.grad(loss)(params), "cg", rtol=1e-12, preconditioner=P)["w"].sum()

    one, other = (ad.grad(partial(step, with_it))(params) for with_it in (True, False))
    assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_inside_vmap() -> None:
    M, b = torch.stack([matrix("cg", 6) for _ in range(3)]), torch.randn(3, 6, dtype=D)

    def solution(dense: Tensor, b: Tensor) -> Tensor:
        A = operators.from_matrix(dense)
        return operators.solve(A, b, "cg", rtol=1e-11, preconditioner=operators.jacobi(A))

    assert_close(ad.vmap(solution)(M, b), torch.linalg.solve(M, b), rtol=1e-8, atol=1e-9)


def test_bad_input() -> None:
    A = operators.from_matrix(positive(13), LIKE)
    with pytest.raises(SolverError, match=r"operators\.jacobi: expected a diagonal that has an inverse"):
        operators.jacobi(operators.diagonal(torch.tensor([1.0, 0.0])))
    with pytest.raises(SolverError, match=r"the block of last"):
        operators.block_jacobi(operators.from_matrix(torch.zeros(13, 13, dtype=D), LIKE), ["last"])
    with pytest.raises(ArgnumsError, match=r"two that match 'last'"):
        operators.block_jacobi(A, ["*", "last"])
    with pytest.raises(ArgnumsError, match="matches no leaf"):
        operators.block_jacobi(A, ["nowhere"])
    with pytest.raises(StructureError):
        operators.jacobi(A, {"w": torch.ones(3)})
    with pytest.raises(ShapeError):
        operators.jacobi(operators.from_matrix(torch.ones(3, 2)))
    for options in ({"rank": 14, "damping": 0.1}, {"rank": 0, "damping": 0.1}, {"rank": 2, "damping": 0.0}):
        with pytest.raises(OptionError, match=r"operators\.nystrom"):
            operators.nystrom(A, **options)
    with pytest.raises(SolverError, match="Gauss-Newton"):
        operators.nystrom(operators.from_matrix(-positive(13)), 3, damping=0.1)


def test_blocks_of_a_leaf_without_numbers() -> None:
    A = operators.hessian(lambda p: (p["b"] ** 3).sum())(
        {"a": torch.zeros(0, 3, dtype=D), "b": torch.tensor([1.0, 2.0], dtype=D)}
    )
    assert_close(operators.block_jacobi(A).to_matrix(), torch.diag(torch.tensor([1 / 6, 1 / 12], dtype=D)))
