"""Estimates against dense matrices: without bias and with honest errors over 200 seeds, differentiable, in batches."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import autodiff as ad
from autodiff import operators
from autodiff.errors import LeafError, OptionError, ShapeError, SolverError
from autodiff.operators import probes as probes_file

if TYPE_CHECKING:
    from collections.abc import Callable

SEEDS = 200
F64, C128 = torch.float64, torch.complex128


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(kind: str, n: int = 43) -> Tensor:
    """A matrix of this kind, the same one each time."""
    g = generator(5)
    if kind == "complex":
        return torch.randn(n, n, dtype=C128, generator=g) + 3 * torch.eye(n)
    if kind == "nonsymmetric":
        return torch.randn(n, n, dtype=F64, generator=g) + 3 * torch.eye(n)
    Q, _ = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=g))
    spectra = {
        "flat": 1 + torch.rand(n, dtype=F64, generator=g),
        "decaying": 1 / torch.arange(1, n + 1, dtype=F64),
        "indefinite": torch.randn(n, dtype=F64, generator=g),
        "low rank": (torch.arange(n) < 5).double() * 2,
    }
    M = Q @ torch.diag(spectra[kind]) @ Q.mT
    return (M + M.mT) / 2


def over_seeds(estimate: Callable[[torch.Generator], Any], of: int = SEEDS) -> tuple[Tensor, Tensor]:
    pairs = [estimate(generator(seed)) for seed in range(of)]
    return torch.stack([one for one, _ in pairs]), torch.stack([error for _, error in pairs])


def assert_unbiased(estimates: Tensor, truth: Tensor, errors: float = 3.0) -> None:
    spread = estimates.std(0) / math.sqrt(len(estimates))
    # Of many entries, the worst may be further away.
    assert ((estimates.mean(0) - truth).abs() < errors * spread).all()


METHODS = ["hutchinson", "hutch++", "xtrace"]


@pytest.mark.parametrize("kind", ["flat", "decaying", "indefinite", "nonsymmetric", "complex"])
@pytest.mark.parametrize("method", METHODS)
def test_trace_has_no_bias_and_an_honest_error(method: Any, kind: str) -> None:
    M = matrix(kind)
    A = operators.from_matrix(M)
    estimates, errors = over_seeds(lambda g: operators.trace(A, method, samples=36, generator=g))
    truth = M.diagonal().sum()
    assert estimates.dtype == M.dtype
    assert errors.dtype == F64
    assert_unbiased(estimates, truth)
    inside = ((estimates - truth).abs() < 2 * errors).double().mean()
    # 95 % of 200, to three standard deviations; Student's distribution at 12 samples has 93 %.
    assert inside > 0.885
    stated, actual = errors.square().mean().sqrt(), (estimates - truth).abs().square().mean().sqrt()
    if method == "xtrace":  # the jackknife is known to be too large
        assert 0.95 * actual < stated < 3 * actual
    else:
        assert inside < 0.995 or kind == "complex"
        assert stated == pytest.approx(actual.item(), rel=0.2)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere"])
@pytest.mark.parametrize("kind", ["nonsymmetric", "complex"])
def test_every_distribution_has_the_unit_covariance(distribution: Any, kind: str) -> None:
    M = matrix(kind)
    A = operators.from_matrix(M)
    estimates, errors = over_seeds(
        lambda g: operators.trace(A, samples=30, distribution=distribution, generator=g)
    )
    assert_unbiased(estimates, M.diagonal().sum())
    actual = (estimates - M.diagonal().sum()).abs().square().mean().sqrt()
    assert errors.square().mean().sqrt() == pytest.approx(actual.item(), rel=0.2)
    norms, errors = over_seeds(
        lambda g: operators.frobenius_norm(A, samples=30, distribution=distribution, generator=g)
    )
    truth = torch.linalg.matrix_norm(M)
    assert_unbiased(norms, truth - errors.square().mean() / (2 * truth))
    assert 0.885 < ((norms - truth).abs() < 2 * errors).double().mean() < 0.995


def test_methods_that_find_a_space_are_exact_for_a_low_rank() -> None:
    M = matrix("low rank")
    A = operators.from_matrix(M)
    for method in ("hutch++", "xtrace"):
        estimate, error = operators.trace(A, method, samples=24, generator=generator(0))
        assert estimate.item() == pytest.approx(10.0, rel=1e-12)
        assert error < 1e-12
    estimate, error = operators.diagonal(A, "xdiag", samples=24, generator=generator(0))
    torch.testing.assert_close(estimate, M.diagonal(), rtol=0, atol=1e-12)
    assert error.max() < 1e-12
    assert operators.trace(A, samples=24, generator=generator(0)).standard_error > 0.1


def test_methods_that_find_a_space_need_fewer_products_where_eigenvalues_decay() -> None:
    A = operators.from_matrix(matrix("decaying"))
    spreads = [
        over_seeds(lambda g, m=m: operators.trace(A, m, samples=36, generator=g), 100)[0].std()
        for m in METHODS
    ]
    assert spreads[0] > 2 * spreads[1]
    assert spreads[1] > 1.2 * spreads[2]


@pytest.mark.parametrize("kind", ["decaying", "nonsymmetric", "complex"])
@pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
def test_diagonal_has_no_bias_and_honest_errors(method: Any, kind: str) -> None:
    M = matrix(kind)
    A = operators.from_matrix(M)
    estimates, errors = over_seeds(lambda g: operators.diagonal(A, method, samples=30, generator=g))
    assert_unbiased(estimates, M.diagonal(), errors=4.0)
    inside = ((estimates - M.diagonal()).abs() < 2 * errors).double().mean()
    assert 0.92 < inside < 0.995
    stated, actual = (one.square().mean().sqrt().item() for one in (errors, (estimates - M.diagonal()).abs()))
    assert actual * 0.9 < stated < actual * (1.1 if method == "hutchinson" else 2)


# The estimators once more, by QR of each subset.


def xtrace_by_subsets(M: Tensor, Z: Tensor) -> Tensor:
    n, k = Z.shape
    samples = []
    for j in range(k):
        others = [i for i in range(k) if i != j]
        Q = torch.linalg.qr(M @ Z[:, others])[0]
        x = Z[:, j] - Q @ (Q.mH @ Z[:, j])
        x = x / x.norm() * math.sqrt(n - len(others))
        samples.append((Q.mH @ M @ Q).diagonal().sum() + torch.vdot(x, M @ x))
    return torch.stack(samples).mean()


def xdiag_by_subsets(M: Tensor, Z: Tensor) -> Tensor:
    k = Z.shape[1]
    samples = []
    for j in range(k):
        Q = torch.linalg.qr(M @ Z[:, [i for i in range(k) if i != j]])[0]
        y = M @ Z[:, j]
        samples.append((Q @ (Q.mH @ M)).diagonal() + Z[:, j].conj() * (y - Q @ (Q.mH @ y)))
    return torch.stack(samples).mean(0)


@pytest.mark.parametrize("kind", ["decaying", "nonsymmetric", "complex"])
@pytest.mark.parametrize(
    ("estimate", "by_subsets", "distribution"),
    [
        (lambda A, g: operators.trace(A, "xtrace", samples=10, generator=g), xtrace_by_subsets, "sphere"),
        (
            lambda A, g: operators.diagonal(A, "xdiag", samples=10, generator=g),
            xdiag_by_subsets,
            "rademacher",
        ),
    ],
    ids=["xtrace", "xdiag"],
)
def test_leaving_probes_out_is_what_it_would_be_without_them(
    estimate: Any, by_subsets: Any, distribution: Any, kind: str
) -> None:
    M = matrix(kind, 13)
    A = operators.from_matrix(M)
    found, error = estimate(A, generator(3))
    Z = probes_file.Drawing(A.domain, distribution, generator(3)).columns(5)
    torch.testing.assert_close(found, by_subsets(M, Z), rtol=1e-10, atol=1e-12)
    without = torch.stack([by_subsets(M, Z[:, [i for i in range(5) if i != out]]) for out in range(5)])
    jackknife = ((without - without.mean(0)).abs() ** 2).sum(0).mul(4 / 5).sqrt()
    torch.testing.assert_close(error, jackknife, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["flat", "nonsymmetric", "complex"])
def test_exact(kind: str) -> None:
    M = matrix(kind, 70)  # more than one strip of the basis
    A = operators.from_matrix(M)
    trace, error = operators.trace(A, "exact")
    torch.testing.assert_close(trace, M.diagonal().sum(), rtol=1e-12, atol=0)
    assert error.item() == 0
    diagonal, error = operators.diagonal(A, "exact")
    assert torch.equal(diagonal, M.diagonal())
    assert torch.equal(error, torch.zeros(70, dtype=F64))
    wide = operators.from_matrix(M[:31])
    for one in (wide, wide.H, A):
        torch.testing.assert_close(
            operators.frobenius_norm(one, "exact").estimate,
            torch.linalg.matrix_norm(one.to_matrix()),
            rtol=1e-12,
            atol=0,
        )
    assert operators.trace(A, "xtrace", samples=140) == operators.trace(A, "exact")
    assert operators.trace(A, "hutch++", samples=209)[1] > 0


def test_frobenius_norm_of_a_matrix_that_is_not_square() -> None:
    M = matrix("nonsymmetric")[:17]
    A = operators.from_matrix(M)
    estimates, errors = over_seeds(lambda g: operators.frobenius_norm(A, samples=60, generator=g))
    truth = torch.linalg.matrix_norm(M)
    assert abs(estimates.mean() - truth) < 3 * estimates.std() / SEEDS**0.5 + errors.square().mean() / truth
    assert 0.9 < ((estimates - truth).abs() < 2 * errors).double().mean() < 0.99


def test_frobenius_norm_of_zero_has_the_derivative_zero() -> None:
    for method in ("hutchinson", "exact"):
        x = torch.zeros(3, 2, requires_grad=True)
        estimate, error = operators.frobenius_norm(operators.from_matrix(x), method, samples=4)
        (slope,) = torch.autograd.grad(estimate, x)
        assert (estimate.item(), error.item()) == (0, 0)
        assert torch.equal(slope, torch.zeros(3, 2))


# Determinants.


@pytest.mark.parametrize("kind", ["flat", "decaying"])
def test_logdet_has_no_bias_and_an_honest_error(kind: str) -> None:
    M = matrix(kind)
    A = operators.from_matrix(M)
    estimates, errors = over_seeds(lambda g: operators.logdet(A, samples=30, steps=30, generator=g))
    assert_unbiased(estimates, torch.logdet(M))
    assert 0.9 < ((estimates - torch.logdet(M)).abs() < 2 * errors).double().mean() < 0.99
    exact, error = operators.logdet(A, "exact")
    torch.testing.assert_close(exact, torch.logdet(M), rtol=1e-10, atol=0)
    assert error.item() == 0


def test_logdet_of_a_hermitian_matrix() -> None:
    B = matrix("complex", 9)
    M = B @ B.mH + torch.eye(9)
    truth = torch.linalg.slogdet(M).logabsdet
    estimates, _ = over_seeds(
        lambda g: operators.logdet(operators.from_matrix(M), samples=10, steps=9, generator=g)
    )
    assert estimates.dtype == F64
    assert_unbiased(estimates, truth)
    torch.testing.assert_close(operators.logdet(operators.from_matrix(M), "exact").estimate, truth)


@pytest.mark.parametrize("method", ["quadrature", "exact"])
def test_logdet_refuses_what_is_not_positive_definite_or_not_symmetric(method: Any) -> None:
    with pytest.raises(SolverError, match=r"operators\.logdet: .* got matrix: it has .*A \+ 0\.1"):
        operators.logdet(operators.from_matrix(matrix("indefinite")), method)
    with pytest.raises(SolverError):
        operators.logdet(operators.from_matrix(torch.zeros(3, 3)), method)
    with pytest.raises(SolverError, match=r"operators\.logdet: expected a symmetric operator .*check=False"):
        operators.logdet(operators.from_matrix(matrix("nonsymmetric") + 20 * torch.eye(43)), method)


def kernel(x: Tensor, places: Tensor) -> Tensor:
    return torch.exp(-(((places[:, None] - places) / x[0]) ** 2)) + x[1] ** 2 * torch.eye(
        len(places), dtype=x.dtype
    )


def test_derivative_of_logdet_is_that_of_the_trace_of_the_logarithm() -> None:
    places = torch.linspace(0, 2, 25, dtype=F64)
    x = torch.tensor([0.7, 0.4], dtype=F64)
    truth = torch.autograd.functional.jacobian(lambda x: torch.logdet(kernel(x, places)), x)

    def estimate(x: Tensor, g: torch.Generator) -> Tensor:
        A = operators.from_matrix(kernel(x, places))
        return operators.logdet(A, samples=20, steps=25, generator=g).estimate

    slopes = torch.stack([ad.grad(estimate)(x, generator(seed)) for seed in range(100)])
    assert_unbiased(slopes, truth)
    # The same probes, in plain torch.
    Z = probes_file.Drawing(operators.Space.of(places), "rademacher", generator(0)).columns(20)
    X = torch.linalg.solve(kernel(x, places), Z)
    (plain,) = torch.autograd.grad((X * (kernel(y := x.clone().requires_grad_(), places) @ Z)).sum() / 20, y)
    torch.testing.assert_close(slopes[0], plain, rtol=1e-8, atol=1e-10)
    v = torch.tensor([0.3, -1.1], dtype=F64)
    _, pushed = ad.jvp(lambda x: estimate(x, generator(0)), (x,), (v,))
    torch.testing.assert_close(pushed, plain @ v, rtol=1e-8, atol=1e-10)
    batched = ad.vmap(ad.grad(lambda x: estimate(x, generator(0))))(torch.stack([x, 1.5 * x]))
    torch.testing.assert_close(batched[0], plain, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(batched[1], ad.grad(estimate)(1.5 * x, generator(0)), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "second", [ad.hessian, lambda f: ad.jacfwd(ad.jacfwd(f)), lambda f: ad.jacfwd(ad.grad(f))]
)
def test_second_derivatives_of_logdet(second: Any) -> None:
    places, x = torch.linspace(0, 2, 6, dtype=F64), torch.tensor([0.7, 0.4], dtype=F64)

    def estimate(method: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: (
            operators.logdet(
                operators.from_matrix(kernel(x, places)), method, generator=generator(0)
            ).estimate
        )

    exact = second(estimate("exact"))(x)
    truth = torch.autograd.functional.hessian(lambda x: torch.logdet(kernel(x, places)), x)
    torch.testing.assert_close(exact, truth)
    # The first derivative with these probes, in plain torch, differentiated once more.
    Z = probes_file.Drawing(operators.Space.of(places), "rademacher", generator(0)).columns(30)

    def slope(x: Tensor) -> Tensor:
        X = torch.linalg.solve(kernel(x, places), Z)
        parts = torch.func.jacrev(kernel)(x, places)
        return torch.einsum("ip,ijk,jp->k", X, parts, Z) / 30

    plain = torch.autograd.functional.jacobian(slope, x)
    found = second(estimate("quadrature"))(x)
    torch.testing.assert_close(found, plain, rtol=1e-7, atol=1e-7)


def test_derivatives_in_what_the_function_captures() -> None:
    x, w = torch.tensor([0.3, -0.5, 0.9], dtype=F64), torch.tensor([0.8, 1.3], dtype=F64)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return w[0] * (x.cosh().sum() + x.sum().cosh()) + w[1] ** 3 * (x**2).sum()

    def of_dense(function: Any) -> Tensor:
        return torch.func.hessian(lambda w: function(torch.func.hessian(loss)(x, w)))(w)

    def of(estimate: Any) -> Tensor:
        return ad.hessian(lambda w: estimate(operators.hessian(lambda x: loss(x, w))(x)).estimate)(w)

    torch.testing.assert_close(of(lambda A: operators.trace(A, "exact")), of_dense(torch.trace))
    slopes = of(lambda A: operators.trace(A, samples=6, generator=generator(0)))
    assert slopes[1, 1].item() == pytest.approx(6 * 1.3 * 2 * 3)  # 6 w_1 tr(2 1), the same for all signs
    found = torch.stack(
        [of(lambda A, s=s: operators.logdet(A, samples=8, generator=generator(s))) for s in range(40)]
    )
    assert_unbiased(found, of_dense(torch.logdet))


# Where random numbers come from.

EVERY = {
    "hutchinson": lambda A, g: operators.trace(A, samples=12, generator=g),
    "hutch++": lambda A, g: operators.trace(A, "hutch++", samples=12, generator=g),
    "xtrace": lambda A, g: operators.trace(A, "xtrace", samples=12, generator=g),
    "diagonal": lambda A, g: operators.diagonal(A, samples=12, generator=g),
    "xdiag": lambda A, g: operators.diagonal(A, "xdiag", samples=12, generator=g),
    "norm": lambda A, g: operators.frobenius_norm(A, samples=12, generator=g),
    "logdet": lambda A, g: operators.logdet(A, samples=5, steps=7, generator=g),
}
every = pytest.mark.parametrize("estimate", EVERY.values(), ids=EVERY)


@every
def test_the_same_generator_gives_the_same_estimate(estimate: Any) -> None:
    A = operators.from_matrix(matrix("flat"))
    one, again, other = (estimate(A, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(one.estimate, again.estimate)
    assert torch.equal(one.standard_error, again.standard_error)
    assert not torch.equal(one.estimate, other.estimate)
    torch.manual_seed(3)
    by_default = estimate(A, None)
    assert torch.equal(by_default.estimate, one.estimate)
    assert not torch.equal(estimate(A, None).estimate, one.estimate)


@pytest.mark.parametrize("kind", ["flat", "complex"])
def test_batches_change_nothing_but_the_order(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    A = operators.from_matrix(matrix(kind))
    names = ["hutchinson", "hutch++", "diagonal", "norm"]
    whole = [EVERY[name](A, generator(1)) for name in names]
    monkeypatch.setattr(probes_file.Drawing.batches, "__defaults__", (None, 5 * 43 * A.dtype.itemsize))
    for name, one in zip(names, whole, strict=True):
        in_batches = EVERY[name](A, generator(1))
        torch.testing.assert_close(in_batches.estimate, one.estimate)
        torch.testing.assert_close(in_batches.standard_error, one.standard_error)


def test_one_sample_has_no_error() -> None:
    A = operators.from_matrix(matrix("flat"))
    assert operators.trace(A, samples=1).standard_error.isnan()
    assert operators.trace(A, "hutch++", samples=3).standard_error.isnan()
    assert operators.diagonal(A, samples=1).standard_error.isnan().all()
    assert operators.frobenius_norm(A, samples=1).standard_error.isnan()
    assert operators.logdet(A, samples=1).standard_error.isnan()


def counted(M: Tensor) -> tuple[Any, list[int]]:
    calls: list[int] = []

    def multiply(v: Tensor) -> Tensor:
        calls.append(1)
        return M @ v

    A = operators.from_matvec(multiply, M[0], positive=True, check=False)
    return A, calls


@pytest.mark.parametrize(
    ("estimate", "products"),
    [
        (lambda A: operators.trace(A, samples=14), 14),
        (lambda A: operators.trace(A, "hutch++", samples=14), 14),
        (lambda A: operators.trace(A, "xtrace", samples=14), 14),
        (lambda A: operators.diagonal(A, samples=14), 14),
        (lambda A: operators.diagonal(A, "xdiag", samples=14), 14),
        (lambda A: operators.frobenius_norm(A, samples=14), 14),
        (lambda A: operators.logdet(A, samples=4, steps=6), 24),
        (lambda A: operators.trace(A, "exact"), 43),
        (lambda A: operators.frobenius_norm(A, "exact"), 43),
        (lambda A: operators.logdet(A, "exact"), 43),
    ],
)
def test_how_many_products_are_computed(estimate: Any, products: int) -> None:
    A, calls = counted(matrix("flat"))
    estimate(A)
    assert len(calls) == products


@every
def test_functions_that_torch_cannot_see_through(estimate: Any) -> None:
    M = matrix("flat")
    A = operators.from_matvec(lambda v: torch.from_numpy(M.numpy() @ v.numpy()), M[0], symmetric=True)
    not_known = operators.from_matvec(lambda v: torch.from_numpy(M.numpy() @ v.numpy()), M[0])
    truth = estimate(operators.from_matrix(M), generator(0)).estimate
    torch.testing.assert_close(estimate(A, generator(0)).estimate, truth)
    if estimate is not EVERY["xdiag"]:  # which needs A.H
        torch.testing.assert_close(estimate(not_known, generator(0)).estimate, truth)


# Derivatives, and other transforms.

START = torch.tensor([0.3, -0.7, 1.1, 0.4], dtype=F64)


def energy(x: Tensor) -> Tensor:
    return (x.outer(x).sin().sum() + (x[0] * x[1:] ** 3).sum() + 5 * x @ x + (x**4).sum()) / 2


def dense_hessian(x: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(energy, x, create_graph=True)


def trace_of(method: str, seed: int, samples: int = 9) -> Callable[[Tensor], Tensor]:
    return lambda x: (
        operators.trace(
            operators.hessian(energy)(x), method, samples=samples, generator=generator(seed)
        ).estimate
    )


def test_derivatives_of_an_estimate_are_its_own() -> None:
    f = trace_of("hutchinson", 0)
    slope = ad.grad(f)(START)
    step = 1e-5
    differences = torch.stack(
        [(f(START + step * e) - f(START - step * e)) / (2 * step) for e in torch.eye(4)]
    )
    torch.testing.assert_close(slope, differences, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(ad.jacfwd(f)(START), slope)
    second = ad.hessian(f)(START)
    differences = torch.stack(
        [(ad.grad(f)(START + step * e) - ad.grad(f)(START - step * e)) / (2 * step) for e in torch.eye(4)]
    )
    torch.testing.assert_close(second, differences, rtol=1e-6, atol=1e-6)
    x = START.clone().requires_grad_()
    f(x).backward()
    torch.testing.assert_close(x.grad, slope)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_derivatives_of_traces_have_no_bias(method: str) -> None:
    truth = torch.autograd.functional.jacobian(lambda x: dense_hessian(x).trace(), START)
    slopes = torch.stack([ad.grad(trace_of(method, seed, 6))(START) for seed in range(100)])
    assert slopes.std() > 1e-3
    assert_unbiased(slopes, truth, errors=3.5)
    torch.testing.assert_close(ad.jacfwd(trace_of(method, 0, 6))(START), slopes[0])


@pytest.mark.parametrize("method", ["hutchinson", "xdiag", "exact"])
def test_derivatives_of_diagonals_have_no_bias(method: str) -> None:
    truth = torch.autograd.functional.jacobian(lambda x: dense_hessian(x).diagonal(), START)
    slopes = torch.stack(
        [
            ad.jacrev(
                lambda x, s=seed: (
                    operators.diagonal(
                        operators.hessian(energy)(x), method, samples=6, generator=generator(s)
                    ).estimate
                )
            )(START)
            for seed in range(100 if method != "exact" else 2)
        ]
    )
    if method == "exact":
        torch.testing.assert_close(slopes[0], truth)
    else:
        assert_unbiased(slopes, truth, errors=4.0)


@every
def test_batches_of_operators_share_their_probes(estimate: Any) -> None:
    points = torch.stack([START, 2 * START, START.flip(0)])
    size = 4 * 4

    def of_point(x: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.kron(ad.hessian(energy)(x), torch.eye(4, dtype=F64)) + torch.ones(size, size, dtype=F64)
        return tuple(estimate(operators.from_matrix(wide @ wide.mT), generator(2)))

    batched = ad.vmap(of_point)(points)
    by_hand = zip(*(of_point(x) for x in points), strict=True)
    for one, each in zip(batched, by_hand, strict=True):
        torch.testing.assert_close(one, torch.stack(each), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_batches_of_points_and_their_gradients(method: str) -> None:
    points = torch.stack([START, 2 * START, START.flip(0)])
    f = trace_of(method, 1, 6)
    torch.testing.assert_close(ad.vmap(f)(points), torch.stack([f(x) for x in points]))
    torch.testing.assert_close(ad.vmap(ad.grad(f))(points), torch.stack([ad.grad(f)(x) for x in points]))
    torch.testing.assert_close(torch.func.vmap(f)(points), torch.stack([f(x) for x in points]))


def test_the_function_runs_once() -> None:
    runs = []

    def counting(x: Tensor) -> Tensor:
        runs.append(1)
        return energy(x)

    for method in METHODS:
        operators.trace(operators.hessian(counting)(START), method, samples=6)
        ad.vmap(lambda x, m=method: operators.trace(operators.hessian(counting)(x), m, samples=6).estimate)(
            START[None]
        )
    assert len(runs) == 2 * len(METHODS)


def test_an_operator_is_an_argument() -> None:
    A = operators.from_matrix(matrix("flat"))
    slope = ad.grad(lambda A: operators.trace(A, samples=8, generator=generator(0)).estimate)(A)
    Z = probes_file.Drawing(A.domain, "rademacher", generator(0)).columns(8)
    torch.testing.assert_close(slope.matrix, Z @ Z.mT / 8)


# Trees, dtypes, and what is refused.


def test_the_diagonal_is_a_tree_like_the_domain() -> None:
    params = {"w": torch.ones(2, 3), "name": "layer", "b": torch.full((2,), 2.0)}
    A = operators.hessian(lambda p: (p["w"] ** 3).sum() + (p["b"] ** 4).sum())(params)
    for method in ("hutchinson", "xdiag", "exact"):
        estimate, error = operators.diagonal(A, method, samples=6)
        assert estimate["name"] is error["name"] is None
        # A diagonal matrix is exact, where no space is found in which it is only as large as its other parts.
        exact = method != "xdiag"
        torch.testing.assert_close(estimate["w"], torch.full((2, 3), 6.0), rtol=0, atol=1e-5 if exact else 30)
        torch.testing.assert_close(estimate["b"], torch.full((2,), 48.0), rtol=0, atol=1e-5 if exact else 30)
        assert [one.shape for one in (error["w"], error["b"])] == [(2, 3), (2,)]
        assert (error["w"].abs().max() < 1e-5) == exact


def test_the_diagonal_operator_of_a_tree() -> None:
    D = operators.diagonal({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)})
    torch.testing.assert_close(D.to_matrix(), torch.tensor([1.0, 2.0, 3.0]).diag())
    assert operators.diagonal(D, samples=2).estimate["b"].item() == 3
    with pytest.raises(
        OptionError, match=r"operators\.diagonal: .* for the diagonal of an operator, got .* a tensor"
    ):
        operators.diagonal(torch.ones(2), method="exact")
    with pytest.raises(LeafError):
        operators.diagonal({"a": 1})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_estimates_have_the_dtype_of_the_operator(dtype: torch.dtype) -> None:
    M = (torch.arange(1.0, 9.0).diag() + 0.25).to(dtype)
    A = operators.from_matrix(M)
    for name, estimate in EVERY.items():
        one, error = estimate(A, generator(0))
        assert one.dtype == error.dtype == dtype, name
        assert one.isfinite().all()
    trace, error = operators.trace(A, "hutch++", samples=15, generator=generator(0))
    assert abs(trace - 38) < 4 * error + 0.5
    assert operators.logdet(A, samples=30, generator=generator(0)).estimate.item() == pytest.approx(
        torch.logdet(M.double()).item(), abs=0.5
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda A: operators.trace(A, "hutch"),
            OptionError,
            "allowed values for method are 'hutchinson', 'hutch",
        ),
        (lambda A: operators.trace(A, samples=0), OptionError, "samples is a positive int"),
        (lambda A: operators.trace(A, "xtrace", samples=3), OptionError, "at least 4 samples"),
        (lambda A: operators.trace(A, "hutch++", samples=2), OptionError, "at least 3 samples"),
        (lambda A: operators.trace(A, distribution="normal"), OptionError, "allowed values for distribution"),
        (
            lambda A: operators.trace(A, "xtrace", distribution="gaussian"),
            OptionError,
            "distribution='sphere'",
        ),
        (lambda A: operators.trace(torch.eye(2)), LeafError, "expected A to be an operator, got Tensor"),
        (lambda A: operators.trace(operators.from_matrix(torch.ones(2, 3))), ShapeError, "space to itself"),
        (
            lambda A: operators.diagonal(operators.from_matrix(torch.ones(2, 3))),
            ShapeError,
            "space to itself",
        ),
        (lambda A: operators.diagonal(A, "xtrace"), OptionError, "'hutchinson', 'xdiag', 'exact'"),
        (lambda A: operators.logdet(A, "xtrace"), OptionError, "'quadrature', 'exact'"),
        (lambda A: operators.logdet(A, steps=0), OptionError, "steps is a positive int"),
        (lambda A: operators.frobenius_norm(A, "hutch++"), OptionError, "'hutchinson', 'exact'"),
    ],
)
def test_options_that_are_refused(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=r"^operators\.") as raised:
        call(operators.from_matrix(torch.eye(3)))
    assert message in str(raised.value)


@every
def test_numbers_that_are_not_finite_show(estimate: Any) -> None:
    M = torch.eye(20)
    M[3, 3] = torch.nan
    A = operators.from_matvec(lambda v: M @ v, M[0], positive=True, check=False)
    assert estimate(A, generator(0)).estimate.isnan().any()


def test_operators_on_nothing() -> None:
    A = operators.from_matrix(torch.zeros(0, 0))
    for method in (*METHODS, "exact"):
        assert operators.trace(A, method).estimate.item() == 0
    assert operators.frobenius_norm(A).estimate.item() == 0
    assert operators.diagonal(A).estimate.shape == (0,)
    for method in ("quadrature", "exact"):
        with pytest.raises(ShapeError, match=r"operators\.logdet: expected an operator with eigenvalues"):
            operators.logdet(A, method)


def test_an_operator_over_a_data_set() -> None:
    x = torch.randn(23, 4, dtype=F64, generator=generator(8))

    def loss(p: Tensor, x: Tensor) -> Tensor:
        return ((x @ p).sin() ** 2).mean()

    def estimated(of: Any) -> Callable[[Tensor], Tensor]:
        return lambda p: operators.trace(of(p), samples=5, generator=generator(0)).estimate

    whole = estimated(lambda p: operators.hessian(loss)(p, x))
    batched = estimated(operators.hessian(loss).over([(x[:8],), (x[8:16],), (x[16:],)]))
    torch.testing.assert_close(batched(START), whole(START))
    torch.testing.assert_close(ad.grad(batched)(START), ad.grad(whole)(START))


def test_a_compiled_function_breaks_its_graph_there() -> None:
    A = operators.from_matrix(matrix("flat"))

    def doubled(x: Tensor) -> Tensor:
        return x * operators.trace(A, samples=4, generator=None).estimate * 2

    torch.manual_seed(1)
    compiled = torch.compile(doubled, backend="eager")(torch.ones(2, dtype=F64))
    torch.manual_seed(1)
    torch.testing.assert_close(compiled, doubled(torch.ones(2, dtype=F64)))


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e20, 1e30])
@pytest.mark.parametrize("method", ["hutchinson", "exact"])
def test_squares_of_entries_may_overflow_or_underflow(method: Any, scale: float) -> None:
    M = matrix("flat")
    estimates = [
        operators.frobenius_norm(
            operators.from_matrix(s * M.float()), method, samples=50, generator=generator(3)
        )
        for s in (1.0, scale)
    ]
    assert math.isclose(estimates[1].estimate.item() / scale, estimates[0].estimate.item(), rel_tol=1e-5)
    assert math.isclose(
        estimates[1].standard_error.item() / scale, estimates[0].standard_error.item(), rel_tol=1e-4
    )
    if method == "exact":
        assert math.isclose(estimates[1].estimate.item() / scale, M.norm().item(), rel_tol=1e-5)
