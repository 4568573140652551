"""Singular values and vectors against closed forms, torch.linalg, SciPy and finite differences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

import autodiff as ad
from autodiff import operators
from autodiff.errors import ConvergenceWarning, DegeneracyError, LeafError, OptionError, SolverError

if TYPE_CHECKING:
    from collections.abc import Callable

SHAPES = [(250, 130), (130, 250), (170, 170), (6, 400), (400, 6)]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def assert_triples(matrix: Tensor, found: tuple[Tensor, Tensor, Tensor], k: int, digits: float) -> None:
    U, S, Vh = found
    rows, columns = matrix.shape
    assert (U.shape, S.shape, Vh.shape) == ((rows, k), (k,), (k, columns))
    eye, norm = torch.eye(k, dtype=matrix.dtype), float(torch.linalg.matrix_norm(matrix, 2))
    for one, other, size in (
        (S, torch.linalg.svdvals(matrix)[:k], norm * digits),
        (U.mH @ U, eye, 100 * digits),
        (Vh @ Vh.mH, eye, 100 * digits),
        (matrix @ Vh.mH, U * S, norm * digits**0.5),
        (matrix.mH @ U, Vh.mH * S, norm * digits**0.5),
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = normal(*shape, seed=1, dtype=dtype)
    digits = 3e-6 if dtype is torch.float32 else 1e-12
    assert_triples(matrix, operators.svds(operators.from_matrix(matrix), 4), 4, digits)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_equals_scipy(shape: tuple[int, int]) -> None:
    A = operators.from_matrix(normal(*shape, seed=2))
    _, of_scipy, _ = scipy.sparse.linalg.svds(A.to_scipy(), 5)
    torch.testing.assert_close(operators.svds(A, 5)[1], torch.from_numpy(np.sort(of_scipy)[::-1].copy()))


def test_jacobian_between_trees() -> None:
    weight = normal(90, 120, seed=3)

    def model(params: dict[str, Tensor]) -> list[Tensor]:
        image = (weight @ torch.cat([params["w"].flatten(), params["b"]])).tanh()
        return [image[:30].reshape(5, 6), image[30:]]

    params = {"w": normal(10, 11, seed=4) / 10, "b": normal(10, seed=5) / 10}
    flat = torch.cat([params["w"].flatten(), params["b"]])
    dense = torch.func.jacrev(lambda x: (weight @ x).tanh())(flat)
    A = operators.jacobian(model)(params)
    U, S, Vh = operators.svds(A, 3)
    # The domain has its leaves in the order of the keys.
    order = (
        torch.cat([torch.arange(10) + 110, torch.arange(110)]) if list(A.domain.paths) == ["b", "w"] else None
    )
    assert_triples(dense if order is None else dense[:, order], (U, S, Vh), 3, 1e-12)
    image = A @ A.domain.unravel(Vh[0])
    torch.testing.assert_close(A.codomain.ravel(image), S[0] * U[:, 0], rtol=0, atol=1e-8)


def test_low_rank_has_zeros() -> None:
    matrix = normal(200, 3, seed=6) @ normal(3, 150, seed=7)
    U, S, Vh = operators.svds(operators.from_matrix(matrix), 5)
    torch.testing.assert_close(S[:3], torch.linalg.svdvals(matrix)[:3])
    assert (S[3:] < 1e-6 * S[0]).all()
    torch.testing.assert_close((U * S) @ Vh, matrix, rtol=0, atol=1e-6 * float(S[0]))
    torch.testing.assert_close(U.T @ U, torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("shape", [*SHAPES, (5, 7)])
@pytest.mark.parametrize("maxiter", [3, None])
@pytest.mark.filterwarnings("ignore::autodiff.errors.ConvergenceWarning")
def test_residuals_are_those_of_plain_products(shape: tuple[int, int], maxiter: int | None) -> None:
    matrix = normal(*shape, seed=8)
    U, S, Vh, residuals = operators.svds(operators.from_matrix(matrix), 3, maxiter=maxiter, residuals=True)
    parts = torch.cat([matrix @ Vh.T - U * S, matrix.T @ U - Vh.T * S])
    torch.testing.assert_close(residuals, parts.norm(dim=0), rtol=1e-3, atol=1e-12)


def test_warning_and_errors() -> None:
    A = operators.from_matrix(normal(200, 150, seed=9))
    with pytest.warns(ConvergenceWarning, match=r"operators.svds: 2 of 2"):
        operators.svds(A, 2, maxiter=2)
    for call, error, text in (
        (lambda: operators.svds(A, 151), OptionError, r"k=151 singular values .* \[200, 150\] has 150"),
        (lambda: operators.svds(A, 0), OptionError, "operators.svds: k is a positive int"),
        (lambda: operators.svds(A, 1, tol=-1.0), OptionError, "tol"),
        (lambda: operators.svds(torch.eye(2), 1), LeafError, "from_matrix"),  # type: ignore[call-overload]
        (lambda: operators.svds(A * torch.tensor(torch.inf), 1), SolverError, "NaN or infinities"),
    ):
        with pytest.raises(error, match=text):
            call()


# Derivatives.

START, B, C = (normal(160, 110, seed=seed) for seed in (10, 11, 12))
START[:, :3] *= torch.tensor([6.0, 5.0, 4.0], dtype=torch.float64)
T = torch.tensor(0.3, dtype=torch.float64)
LEFT, RIGHT = normal(160, seed=13), normal(110, seed=14)


def numbers(triples: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Numbers that depend on singular values and vectors, but not on the signs of the latter."""
    U, S, Vh = (part[..., :2] if part is triples[0] else part[:2] for part in triples)
    return torch.cat([S, (LEFT @ U) * (Vh @ RIGHT)])


def central(func: Callable[[Tensor], Tensor], t: Tensor, step: float = 1e-2) -> Tensor:
    weights = {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}
    total: Any = sum(w * (func(t + i * step) - func(t - i * step)) for i, w in weights.items())
    return total / step


@pytest.mark.parametrize("transposed", [False, True])
def test_derivatives(transposed: bool) -> None:
    def matrix(t: Tensor) -> Tensor:
        return START + t * B + (2 * t).sin() * C

    def expected(t: Tensor) -> Tensor:
        return numbers(torch.linalg.svd(matrix(t), full_matrices=False))

    def found(t: Tensor) -> Tensor:
        if not transposed:
            return numbers(operators.svds(operators.from_matrix(matrix(t)), 2))
        U, S, Vh = operators.svds(operators.from_matrix(matrix(t).T), 2)
        return numbers((Vh.T, S, U.T))

    torch.testing.assert_close(found(T), expected(T), rtol=1e-8, atol=1e-8)
    slope = central(expected, T)
    bend = central(lambda t: central(expected, t), T)
    for jac in (ad.jacrev, ad.jacfwd):
        torch.testing.assert_close(jac(found)(T), slope, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ad.jacrev(ad.jacrev(found))(T), bend, rtol=1e-4, atol=1e-4)


def test_vectors_of_repeated_values_have_no_derivative() -> None:
    d = torch.cat([torch.linspace(0.1, 1, 200), torch.tensor([3.0, 3.0])]).double()
    with pytest.raises(DegeneracyError, match=r"operators.svds"):
        ad.grad(lambda d: (operators.svds(operators.diagonal(d), 2)[0][-1] ** 2)[0])(d)


def test_per_sample() -> None:
    matrices = torch.stack([START, START + B])
    S = ad.vmap(lambda matrix: operators.svds(operators.from_matrix(matrix), 3)[1])(matrices)
    torch.testing.assert_close(S, torch.linalg.svdvals(matrices)[:, :3])
