"""Spectral densities against spectra in closed form, their moments, and what an iteration does when it ends early."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import autodiff as ad
from autodiff import operators
from autodiff.errors import LeafError, OptionError, RuleError, ShapeError, SolverError
from autodiff.operators import quadrature

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def laplacian(n: int) -> tuple[Any, Tensor]:
    """The second difference on n points with zeros beyond them, and its eigenvalues."""

    def multiply(v: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(v, (1, 1))
        return 2 * v - padded[2:] - padded[:-2]

    k = torch.arange(1, n + 1, dtype=F64)
    A = operators.from_matvec(multiply, torch.zeros(n, dtype=F64), symmetric=True, batched=True)
    return A, 2 - 2 * torch.cos(math.pi * k / (n + 1))


def broadened(grid: Tensor, eigenvalues: Tensor, width: Tensor) -> Tensor:
    """The density of these eigenvalues, each a Gaussian."""
    bells = torch.distributions.Normal(eigenvalues, width).log_prob(grid[:, None]).exp()
    return bells.mean(1)


def symmetric(n: int = 31) -> Tensor:
    M = torch.randn(n, n, dtype=F64, generator=generator(9))
    return (M + M.mT) / 2


def test_laplacian_in_one_dimension() -> None:
    A, eigenvalues = laplacian(400)
    found = operators.spectral_density(A, 20, 60, generator=generator(0))
    assert found.nodes.shape == found.weights.shape == (20, 60)
    assert found.width.item() == pytest.approx(4 / 60, rel=0.01)
    truth = broadened(found.grid, eigenvalues, found.width)
    # Points within a width are correlated: some 60 of them are not, and 20 probes have a Student distribution.
    distance = (found.density - truth).abs()
    assert (distance < 2.1 * found.standard_error + 1e-3).double().mean() > 0.85
    assert (distance < 4.5 * found.standard_error + 1e-3).all()
    assert torch.trapezoid(distance, found.grid) < 0.08
    assert torch.trapezoid(found.density, found.grid).item() == pytest.approx(1, abs=2e-6)
    mean, error = found.mean_of(lambda t: t)
    assert abs(mean - 2) < 3 * error
    second, error = found.mean_of(lambda t: t**2)
    assert abs(second - eigenvalues.square().mean()) < 3 * error


def test_semicircle_of_a_random_matrix() -> None:
    n = 600
    M = torch.randn(n, n, dtype=F64, generator=generator(1)) / n**0.5
    A = operators.from_matrix((M + M.mT) / 2**0.5)
    found = operators.spectral_density(A, 10, 50, generator=generator(2), check=False)
    semicircle = (4 - found.grid**2).clamp_min(0).sqrt() / (2 * math.pi)
    # Away from the edges, where a width matters; the matrix itself is 1/n from its limit.
    inner = found.grid.abs() < 1.8
    distance = (found.density - semicircle).abs()[inner]
    assert (distance < 4.5 * found.standard_error[inner] + 0.01).all()
    assert distance.square().mean().sqrt() < 0.02
    for power, moment in ((1, 0.0), (2, 1.0), (4, 2.0)):
        mean, error = found.mean_of(lambda t, p=power: t**p)
        assert abs(mean - moment) < 3 * error + 10 / n


def test_error_band_holds_over_200_seeds() -> None:
    M = symmetric(60)
    A = operators.from_matrix(M)
    grid = torch.tensor([-6.0, -2.5, 0.0, 1.0, 4.0], dtype=F64)
    found = [
        operators.spectral_density(A, 12, 60, grid=grid, width=0.8, generator=generator(seed), check=False)
        for seed in range(200)
    ]
    truth = broadened(grid, torch.linalg.eigvalsh(M), torch.tensor(0.8, dtype=F64))
    density, error = (
        torch.stack([getattr(one, name) for one in found]) for name in ("density", "standard_error")
    )
    assert ((density.mean(0) - truth).abs() < 3.5 * density.std(0) / 200**0.5).all()
    inside = ((density - truth).abs() < 2 * error).double().mean(0)
    assert (inside > 0.87).all()  # Student's distribution at 12 probes: 0.93
    assert (inside < 0.995).all()
    torch.testing.assert_close(error.square().mean(0).sqrt(), density.std(0), rtol=0.2, atol=0)
    means = torch.stack([torch.stack(one.mean_of(lambda t: t)) for one in found])
    assert abs(means[:, 0].mean() - M.trace() / 60) < 3 * means[:, 0].std() / 200**0.5
    assert 0.87 < ((means[:, 0] - M.trace() / 60).abs() < 2 * means[:, 1]).double().mean() < 0.995


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.complex128])
def test_rules_are_exact_for_every_probe_where_steps_suffice(dtype: torch.dtype) -> None:
    n = 13
    M = torch.randn(n, n, dtype=dtype, generator=generator(4))
    M = (M + M.mH) / 2
    A = operators.from_matrix(M)
    found = operators.spectral_density(A, 3, 40, generator=generator(5))
    assert found.nodes.dtype == (torch.float32 if dtype == torch.float32 else F64)
    eigenvalues = torch.linalg.eigvalsh(M)
    torch.testing.assert_close(found.nodes, eigenvalues.expand(3, n), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(found.weights.sum(1), torch.ones_like(found.weights[:, 0]))
    # z^H M^3 z / n of the same probes.
    Z = operators.probes.Drawing(A.domain, "rademacher", generator(5)).columns(3)
    forms = (Z.conj() * (M @ M @ M @ Z)).sum(0).real / n
    torch.testing.assert_close((found.weights * found.nodes**3).sum(1), forms, rtol=2e-4, atol=2e-4)


def test_orthogonality_survives_many_steps() -> None:
    """Without reorthogonalisation, the eigenvalues that stand apart come twice, and more often."""
    eigenvalues = torch.cat(
        [torch.linspace(0, 1, 297, dtype=F64), torch.tensor([50.0, 80.0, 100.0], dtype=F64)]
    )
    A = operators.diagonal(eigenvalues)
    found = operators.spectral_density(A, 2, 120, generator=generator(0))
    assert ((found.nodes > 2).sum(1) == 3).all()


def test_iterations_end_where_their_space_is_closed() -> None:
    calls: list[int] = []
    diagonal = torch.tensor([1.0] * 5 + [3.0] * 15 + [-2.0] * 20, dtype=F64)

    def multiply(v: Tensor) -> Tensor:
        calls.append(1)
        return diagonal * v

    A = operators.from_matvec(multiply, diagonal, symmetric=True, check=False)
    found = operators.spectral_density(A, 4, 30, generator=generator(0))
    assert len(calls) == 4 * 3
    assert found.nodes.shape == (4, 3)
    torch.testing.assert_close(found.nodes, torch.tensor([-2.0, 1.0, 3.0], dtype=F64).expand(4, 3))
    torch.testing.assert_close(found.weights, torch.tensor([0.5, 0.125, 0.375], dtype=F64).expand(4, 3))
    assert found.standard_error.max() < 1e-12


def test_one_iteration_ends_and_another_goes_on() -> None:
    """In a space of signs (1, 1) and (1, -1), one of them is an eigenvector."""
    M = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=F64)
    big = torch.block_diag(M, torch.tensor([[1.0]], dtype=F64))
    with_weights = operators.spectral_density(operators.from_matrix(big), 16, 3, generator=generator(0))
    # Signs (1, 1, s): values 3 and 1 with weights 2/3, 1/3; (1, -1, s) is an eigenvector of eigenvalue 1.
    ended = with_weights.weights.abs().amax(1) > 0.99
    assert ended.any()
    assert not ended.all()
    moments = (with_weights.weights * with_weights.nodes).sum(1)
    torch.testing.assert_close(moments[ended], torch.ones(int(ended.sum()), dtype=F64))
    torch.testing.assert_close(moments[~ended], torch.full((int((~ended).sum()),), 7 / 3, dtype=F64))


@pytest.mark.parametrize("value", [0.0, 1.0, -1e-8, 1e12])
def test_multiples_of_the_identity(value: float) -> None:
    A = operators.diagonal(torch.full((7,), value, dtype=F64))
    found = operators.spectral_density(A)
    assert torch.trapezoid(found.density, found.grid).item() == pytest.approx(1, abs=2e-6)
    assert found.grid[found.density.argmax()].item() == pytest.approx(value, abs=found.width.item())


def test_groups_of_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    A = operators.from_matrix(symmetric())
    whole = operators.spectral_density(A, 7, 9, generator=generator(1))
    monkeypatch.setattr(quadrature, "_BASIS_BYTES", 3 * 9 * 31 * 8)
    for one, other in zip(operators.spectral_density(A, 7, 9, generator=generator(1)), whole, strict=True):
        torch.testing.assert_close(one, other)
    # Groups that end after different numbers of steps.
    monkeypatch.setattr(quadrature, "_BASIS_BYTES", 1)
    big = torch.block_diag(
        torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=F64), torch.tensor([[1.0]], dtype=F64)
    )
    found = operators.spectral_density(operators.from_matrix(big), 16, 3, generator=generator(0))
    torch.testing.assert_close(found.weights.sum(1), torch.ones(16, dtype=F64))


def test_the_same_generator_gives_the_same_density() -> None:
    A = operators.from_matrix(symmetric())
    one, again, other = (operators.spectral_density(A, 3, 9, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.density, again.density)
    assert not torch.equal(one.nodes, other.nodes)
    torch.manual_seed(1)
    assert torch.equal(operators.spectral_density(A, 3, 9).density, one.density)


def test_grids() -> None:
    A = operators.from_matrix(symmetric())
    assert operators.spectral_density(A, 2, 9).grid.shape == (1024,)
    assert operators.spectral_density(A, 2, 200).grid.shape == (2000,)
    assert operators.spectral_density(A, 2, 9, grid=301).grid.shape == (301,)
    grid = torch.linspace(-1, 1, 5)
    found = operators.spectral_density(A, 2, 9, grid=grid, generator=generator(0))
    assert torch.equal(found.grid, grid.double())
    full = operators.spectral_density(A, 2, 9, generator=generator(0))
    assert torch.equal(full.width, found.width)
    near = (full.grid - 0.5).abs().argmin()
    assert full.density[near].item() == pytest.approx(found.density[3].item(), rel=0.02)
    with pytest.raises(
        OptionError, match=r"operators\.spectral_density: .*1024 points for a width of 0\.0001"
    ):
        operators.spectral_density(A, width=1e-4)
    assert operators.spectral_density(A, grid=200_000, width=1e-4).density.shape == (200_000,)
    assert operators.spectral_density(A, 1).standard_error.isnan().all()


def test_half_precision() -> None:
    D = operators.diagonal(torch.tensor([1.0, 2.0, 2.0, 4.0], dtype=torch.bfloat16))
    found = operators.spectral_density(D, generator=generator(0))
    assert found.density.dtype == torch.float32
    mean, _ = found.mean_of(lambda t: t)
    assert mean.item() == pytest.approx(2.25, rel=1e-2)


def quartic(x: Tensor) -> Tensor:
    return (x.outer(x).sin().sum() + (x**4).sum()) / 2


def test_batches_of_operators() -> None:
    points = torch.randn(3, 6, dtype=F64, generator=generator(3))

    def density(x: Tensor) -> Any:
        return operators.spectral_density(operators.hessian(quartic)(x), 4, 5, generator=generator(1))

    batched = ad.vmap(density)(points)
    assert isinstance(batched, operators.SpectralDensity)
    for i, x in enumerate(points):
        for one, other in zip(batched, density(x), strict=True):
            torch.testing.assert_close(one[i], other, rtol=1e-6, atol=1e-8)
    means = ad.vmap(lambda x: density(x).mean_of(lambda t: t)[0])(points)
    traces = torch.stack([torch.autograd.functional.hessian(quartic, x).trace() for x in points])
    assert (means - traces / 6).abs().max() < traces.abs().max()


@pytest.mark.parametrize("transform", [ad.grad, ad.jacfwd])
def test_a_derivative_is_an_error(transform: Any) -> None:
    x = torch.ones(6, dtype=F64)
    with pytest.raises(RuleError, match=r"operators\.spectral_density: .*torch\.no_grad"):
        transform(lambda x: operators.spectral_density(operators.hessian(quartic)(x)).density.max())(x)
    x.requires_grad_()
    found = operators.spectral_density(operators.hessian(quartic)(x))
    with pytest.raises(RuleError):
        found.density.sum().backward()
    with torch.no_grad():
        assert not operators.spectral_density(operators.hessian(quartic)(x)).density.requires_grad


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda A: operators.spectral_density(torch.eye(3)), LeafError, "expected A to be an operator"),
        (
            lambda A: operators.spectral_density(operators.from_matrix(torch.ones(2, 3))),
            ShapeError,
            "space to itself",
        ),
        (operators.spectral_density, SolverError, "expected a symmetric operator"),
        (lambda A: operators.spectral_density(A, 0), OptionError, "probes is a positive int"),
        (lambda A: operators.spectral_density(A, steps=-1), OptionError, "steps is a positive int"),
        (lambda A: operators.spectral_density(A, width=0.0), OptionError, "width is a positive number"),
        (lambda A: operators.spectral_density(A, width=math.nan), OptionError, "width is a positive number"),
        (lambda A: operators.spectral_density(A, grid=0), OptionError, "grid is a positive int"),
        (lambda A: operators.spectral_density(A, grid=torch.ones(2, 2)), OptionError, "shape (2, 2)"),
    ],
)
def test_what_is_refused(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=r"^operators\.spectral_density: ") as raised:
        call(operators.from_matrix(torch.tensor([[1.0, 2.0], [0.0, 1.0]])))
    assert message in str(raised.value)


def test_symmetry_is_compared_unless_it_is_known() -> None:
    products: list[int] = []

    def multiply(v: Tensor) -> Tensor:
        products.append(1)
        return 2 * v

    for options, count in (
        ({"check": False}, 2),
        ({}, 2 + 2),
    ):
        products.clear()
        A = operators.from_matvec(multiply, torch.zeros(5, dtype=F64), check=False)
        operators.spectral_density(A, 2, 1, **options)
        assert len(products) == count
    complex_symmetric = torch.tensor([[1, 2j], [2j, 1]], dtype=torch.complex128)
    with pytest.raises(SolverError, match="Hermitian where it is complex"):
        operators.spectral_density(operators.from_matrix(complex_symmetric))


def test_plot_draws_the_density_and_its_band() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    A, _ = laplacian(50)
    found = operators.spectral_density(A, 4, 20, generator=generator(0))
    axes = found.plot(color="C1", label="Laplacian")
    (line,) = axes.lines
    assert line.get_ydata() == pytest.approx(found.density.numpy())
    assert line.get_label() == "Laplacian"
    (band,) = axes.collections
    assert found.plot(axes) is axes
    low, high = band.get_paths()[0].get_extents().get_points()[:, 1]
    assert low >= 0
    assert high == pytest.approx((found.density + 2 * found.standard_error).max().item())
    pyplot.close(axes.figure)


def test_plot_without_matplotlib_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = operators.spectral_density(operators.diagonal(torch.ones(3)))
    with pytest.raises(ImportError, match=r"SpectralDensity\.plot: .*pip install matplotlib"):
        found.plot()
