"""What `hessian_eigenvalues` has beside its tests among the parts of a Hessian: second derivatives, and an early end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import autodiff as ad

N = 400


def f64(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


SPECTRUM = torch.cat([torch.linspace(-1, 1, N - 5), torch.tensor([3.0, 5, 6.5, -4, -6])]).double()
V, _ = torch.linalg.qr(f64(N, N, seed=1))
START, B = (V * SPECTRUM) @ V.T, f64(N, N, seed=2) / 40
B = B + B.T
T = torch.tensor(0.3, dtype=torch.float64)


def matrix_of(t: Tensor) -> Tensor:
    return START + t.exp() * B


def dense(t: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(matrix_of(t)).flip(0)[:2]


def found(t: Tensor) -> Tensor:
    return ad.hessian_eigenvalues(lambda x: x @ matrix_of(t) @ x / 2, 2)(torch.zeros(N, dtype=torch.float64))


@pytest.mark.parametrize("outer", [ad.jacrev, ad.jacfwd])
@pytest.mark.parametrize("inner", [ad.jacrev, ad.jacfwd])
def test_second_derivatives(inner: object, outer: object) -> None:
    # torch.linalg.eigvalsh differentiates itself; here it is differentiated by differences.
    step = 1e-3
    bend = (dense(T + step) - 2 * dense(T) + dense(T - step)) / step**2
    assert callable(inner)
    assert callable(outer)
    torch.testing.assert_close(outer(inner(found))(T), bend, rtol=1e-5, atol=1e-5)


def test_both_ends() -> None:
    values = ad.hessian_eigenvalues(lambda x: x @ START @ x / 2, 3, which="BE")(V[0])
    torch.testing.assert_close(values, torch.tensor([-6.0, 5, 6.5], dtype=torch.float64))


class Counted(torch.autograd.Function):
    """The identity, which counts how often a cotangent comes to it."""

    pulls = 0

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        pass

    @staticmethod
    def backward(ctx: object, cotangent: Tensor) -> Tensor:
        Counted.pulls += 1
        return cotangent.clone()


def pulls_for(diagonal: Tensor) -> int:
    Counted.pulls = 0
    func = lambda x: (diagonal * Counted.apply(x) ** 2).sum() / 2
    values = ad.hessian_eigenvalues(func, 2, iterations=40, which="LM")(diagonal)
    torch.testing.assert_close(values[0], torch.tensor(2.0, dtype=torch.float64))
    return Counted.pulls


def test_ends_where_rounding_is_left() -> None:
    """A matrix with three eigenvalues needs few products."""
    few = torch.zeros(N, dtype=torch.float64)
    few[[3, 50]] = torch.tensor([2.0, -1.0], dtype=torch.float64)
    many = torch.linspace(-1, 1, N).double()
    many[7] = 2
    assert 0 < pulls_for(few) < pulls_for(many) / 3
