"""Eigenvalues and eigenvectors against closed forms, dense torch.linalg, SciPy and finite differences."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

import autodiff as ad
from autodiff import _torch, operators
from autodiff.core.memory import Meter
from autodiff.errors import (
    ConvergenceWarning,
    DegeneracyError,
    LeafError,
    OptionError,
    ShapeError,
    SolverError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

N = 300
WHICH: list[Any] = ["LA", "SA", "LM", "BE"]
each_which = pytest.mark.parametrize("which", WHICH)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def with_spectrum(spectrum: Tensor, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """V diag(spectrum) V^H for a random unitary V."""
    wide = torch.promote_types(dtype, torch.float64)
    V, _ = torch.linalg.qr(normal(len(spectrum), len(spectrum), seed=seed, dtype=wide))
    matrix = (V * spectrum.to(torch.float64)) @ V.mH
    return ((matrix + matrix.mH) / 2).to(dtype)


def first(values: Tensor, k: int, which: str) -> Tensor:
    """By sorting lists, in the order that is promised."""
    ascending = sorted(values.tolist())
    match which:
        case "LA":
            picked = ascending[::-1][:k]
        case "SA":
            picked = ascending[:k]
        case "LM":
            picked = sorted(ascending, key=lambda v: -abs(v))[:k]
        case _:
            low = k // 2
            picked = ascending[:low] + ascending[len(ascending) - (k - low) :]
    return torch.tensor(picked, dtype=values.dtype)


def assert_pairs(matrix: Tensor, values: Tensor, vectors: Tensor, expected: Tensor, digits: float) -> None:
    """Eigenvalues as expected, and vectors that are orthonormal and have them, by plain products."""
    norm = float(torch.linalg.matrix_norm(matrix.to(torch.complex128), 2).clamp_min(1e-300))
    wide = torch.promote_types(vectors.dtype, torch.float64)
    matrix, vectors, values = matrix.to(wide), vectors.to(wide), values.to(torch.float64)
    close = partial(torch.testing.assert_close, rtol=0)
    close(values, expected.to(torch.float64), atol=digits * norm)
    close(vectors.mH @ vectors, torch.eye(len(values), dtype=wide), atol=max(1e-12, 100 * digits))
    close(matrix @ vectors, vectors * values, atol=digits**0.5 * norm)


SPECTRA = {
    "apart": torch.cat([torch.linspace(-1, 1, N - 6), torch.tensor([9.0, 7, 5, -4, -6, -10])]),
    "clusters": torch.cat([torch.linspace(-1, 1, N - 6), torch.tensor([5, 5.001, 5.002, -6, -6.001, -7])]),
    "twofold": torch.cat([torch.linspace(-1, 1, N - 6), torch.tensor([5.0, 5, 4, -6, -6, -7])]),
    "low rank": torch.cat([torch.zeros(N - 3), torch.tensor([5.0, 2, -3])]),
    "zero": torch.zeros(N),
    "multiple of the identity": torch.full((N,), 3.0),
    "two values": torch.ones(N).where(torch.arange(N) < 100, -2.0),
    "decay": torch.cat([0.8 ** torch.arange(N // 2), -0.5 * 0.8 ** torch.arange(N // 2)]),
    "tiny": 1e-200 * torch.cat([torch.linspace(-1, 1, N - 2), torch.tensor([2, -3])]).double(),
    "huge": 1e200 * torch.cat([torch.linspace(-1, 1, N - 2), torch.tensor([2, -3])]).double(),
}


@pytest.mark.parametrize("k", [1, 4])
@each_which
@pytest.mark.parametrize("name", SPECTRA)
def test_known_spectrum(name: str, which: Any, k: int) -> None:
    spectrum = SPECTRA[name].double()
    if name in ("tiny", "huge"):
        # At the edge of a dense spectrum the iterations come as close as they are asked to.
        k = 1
    matrix = with_spectrum(spectrum)
    # Enough to find k copies of what is repeated a hundred times.
    block = 6 if name == "two values" else None
    values, vectors = operators.eigsh(operators.from_matrix(matrix), k, which, block=block)
    assert vectors.shape == (N, k)
    if name not in ("tiny", "huge"):
        assert_pairs(matrix, values, vectors, first(spectrum, k, which), 1e-12)
    else:
        scale = float(spectrum.abs().max())
        assert_pairs(matrix / scale, values / scale, vectors, first(spectrum / scale, k, which), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@each_which
def test_each_dtype(which: Any, dtype: torch.dtype) -> None:
    spectrum = SPECTRA["apart"]
    matrix = with_spectrum(spectrum, dtype=dtype)
    values, vectors, residuals = operators.eigsh(operators.from_matrix(matrix), 5, which, residuals=True)
    assert (values.dtype, vectors.dtype, residuals.dtype) == (dtype.to_real(), dtype, dtype.to_real())
    digits = 2e-6 if dtype.to_real() == torch.float32 else 1e-12
    assert_pairs(matrix, values, vectors, first(spectrum, 5, which), digits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [40, 300])
def test_half_precision_is_computed_in_single(dtype: torch.dtype, n: int) -> None:
    d = torch.ones(n, dtype=dtype)
    d[3], d[7] = 4, -2
    values, vectors = operators.eigsh(operators.diagonal(d), 2, "LM")
    assert (values.dtype, vectors.dtype) == (dtype, dtype)
    torch.testing.assert_close(values, torch.tensor([4.0, -2], dtype=dtype), rtol=1e-2, atol=0)
    assert vectors.abs().argmax(0).tolist() == [3, 7]


def test_second_difference_has_cosines() -> None:
    """2 x_i - x_(i-1) - x_(i+1): 2 - 2 cos(pi j / (n + 1)). Neighbours differ by 1e-4 of the norm."""
    n = 300

    def second_difference(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, (1, 1))
        return 2 * x - padded[:-2] - padded[2:]

    A = operators.from_matvec(second_difference, torch.zeros(n, dtype=torch.float64), symmetric=True)
    expected = 2 - 2 * torch.cos(torch.pi * torch.arange(1, n + 1, dtype=torch.float64) / (n + 1))
    for which in WHICH:
        values, _ = operators.eigsh(A, 3, which, tol=1e-7)
        torch.testing.assert_close(values, first(expected, 3, which), rtol=0, atol=1e-10)


@each_which
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_equals_arpack(which: Any, dtype: Any) -> None:
    if which == "BE" and dtype is np.complex128:
        pytest.skip("SciPy has no BE for complex matrices")
    torch_dtype = torch.float64 if dtype is np.float64 else torch.complex128
    matrix = normal(250, 250, seed=2, dtype=torch_dtype)
    A = operators.from_matrix(matrix + matrix.mH)
    values, _ = operators.eigsh(A, 5, which)
    of_scipy, _ = scipy.sparse.linalg.eigsh(A.to_scipy(), 5, which=which)
    torch.testing.assert_close(
        values.sort().values, torch.from_numpy(np.sort(of_scipy.real)), rtol=1e-12, atol=0
    )


# A network's Hessian, over a tree.


def network(sizes: list[int], seed: int) -> dict[str, Tensor]:
    params: dict[str, Tensor] = {}
    for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        params[f"{layer}.weight"] = normal(fan_out, fan_in, seed=seed + layer) / fan_in**0.5
        params[f"{layer}.bias"] = normal(fan_out, seed=seed + 10 + layer) / 3
    return params


def loss(params: dict[str, Any], x: Tensor, y: Tensor) -> Tensor:
    layers = sum(name.endswith("weight") for name in params)
    for layer in range(layers):
        x = nn.functional.linear(x, params[f"{layer}.weight"], params[f"{layer}.bias"])
        x = x.tanh() if layer < layers - 1 else x
    return nn.functional.cross_entropy(x, y)


PARAMS, INPUTS, LABELS = network([8, 14, 11, 4], seed=40), normal(5, 8, seed=41), torch.arange(5) % 4


def dense_hessian(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    names, shapes = list(params), [p.shape for p in params.values()]

    def of_vector(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes])
        named = zip(names, parts, shapes, strict=True)
        return loss({name: part.view(shape) for name, part, shape in named}, x, y)

    return torch.func.hessian(of_vector)(torch.cat([p.flatten() for p in params.values()]))


@each_which
def test_hessian_of_a_network(which: Any) -> None:
    matrix = dense_hessian(PARAMS, INPUTS, LABELS)
    assert len(matrix) == 339
    A = operators.hessian(loss)(PARAMS, INPUTS, LABELS)
    values, vectors = operators.eigsh(A, 4, which)
    assert_pairs(matrix, values, vectors, first(torch.linalg.eigvalsh(matrix), 4, which), 1e-12)
    tree = A.domain.unravel(vectors[:, 1])
    product = A @ tree
    for name, leaf in tree.items():
        torch.testing.assert_close(product[name], values[1] * leaf, rtol=0, atol=1e-8)


def test_gauss_newton_of_low_rank_has_zeros() -> None:
    """Five samples with four outputs have a rank of at most 15."""

    def model(params: dict[str, Tensor], x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x, params["0.weight"], params["0.bias"]).tanh()
        return nn.functional.linear(hidden, params["1.weight"], params["1.bias"])

    params = network([8, 24, 4], seed=60)
    A = operators.gauss_newton(model, nn.functional.cross_entropy)(params, INPUTS, LABELS)
    assert A.shape == (316, 316)
    values, _ = operators.eigsh(A, 18)
    assert values[14] > 1e-4
    torch.testing.assert_close(values[15:], torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


# Small operators are formed.


@pytest.mark.parametrize("k", [1, 5, 6])
@each_which
def test_small_operator_is_exact(which: Any, k: int) -> None:
    matrix = normal(6, 6, seed=3)
    matrix = matrix + matrix.T
    values, vectors = operators.eigsh(operators.from_matrix(matrix), k, which)
    assert_pairs(matrix, values, vectors, first(torch.linalg.eigvalsh(matrix), k, which), 1e-14)


@pytest.mark.parametrize("n", [65, 66, 67, 68, 69, 70])
def test_right_on_both_sides_of_the_size_that_is_formed(n: int) -> None:
    spectrum = torch.linspace(-1, 1, n, dtype=torch.float64) ** 9
    values, _ = operators.eigsh(operators.from_matrix(with_spectrum(spectrum)), 1)
    torch.testing.assert_close(values, spectrum[-1:], rtol=0, atol=1e-12)


# What the options do.


class Counted:
    """A matrix whose products are counted, in blocks and in vectors."""

    def __init__(self, matrix: Tensor) -> None:
        self.blocks = self.vectors = 0

        def multiply(v: Tensor) -> Tensor:
            self.vectors += 1
            return matrix @ v

        self.operator = operators.from_matvec(multiply, matrix[0], symmetric=True, check=False)
        matmat = self.operator.matmat

        def counted(block: Tensor) -> Tensor:
            self.blocks += 1
            return matmat(block)

        self.operator.matmat = counted  # type: ignore[method-assign]


# Twenty outliers over a bulk that becomes denser toward zero, as of a network's loss.
OUTLIERS = torch.cat([0.85 ** torch.arange(20.0), 0.03 * torch.linspace(0, 1, 1980) ** 3]).double()


@pytest.mark.parametrize(("block", "times"), [(1, 1.0), (2, 1.25), (4, 1.75)])
def test_products_next_to_arpack(block: int, times: float) -> None:
    matrix = with_spectrum(OUTLIERS)
    ours, theirs = Counted(matrix), Counted(matrix)
    values, _ = operators.eigsh(ours.operator, 20, block=block, tol=1e-6)
    torch.testing.assert_close(values, OUTLIERS[:20], rtol=1e-10, atol=0)
    scipy.sparse.linalg.eigsh(theirs.operator.to_scipy(), 20, which="LA", tol=1e-6)
    assert ours.blocks * block == ours.vectors
    assert 20 < ours.vectors <= times * theirs.vectors


def test_more_vectors_in_the_basis_take_no_more_products() -> None:
    matrix = with_spectrum(torch.linspace(0, 1, 500, dtype=torch.float64) ** 3)
    counts = []
    for ncv in (10, 30, 100):
        counted = Counted(matrix)
        operators.eigsh(counted.operator, 4, ncv=ncv)
        counts.append(counted.blocks)
    assert counts[0] > 1.5 * counts[1] > 1.5 * counts[2]


def test_an_operator_that_is_not_differentiated_is_multiplied_no_further() -> None:
    counted = Counted(with_spectrum(SPECTRA["apart"].double()))
    operators.eigsh(counted.operator, 3, maxiter=1000)
    alone = counted.blocks
    operators.eigsh(counted.operator, 3, residuals=True)
    assert counted.blocks == 2 * alone + 1, "one block for the residuals"


def test_start_from_eigenvectors_ends_at_once() -> None:
    matrix = with_spectrum(SPECTRA["apart"].double())
    vectors = torch.linalg.eigh(matrix).eigenvectors[:, -2:]
    counted = Counted(matrix)
    values, _ = operators.eigsh(counted.operator, 2, v0=vectors, tol=1e-8)
    assert counted.blocks == 1
    torch.testing.assert_close(values, torch.tensor([9.0, 7], dtype=torch.float64))


def test_start_may_be_a_tree() -> None:
    A = operators.hessian(loss)(PARAMS, INPUTS, LABELS)
    expected, _ = operators.eigsh(A, 2)
    for v0 in (PARAMS, A.domain.ravel(PARAMS)):
        values, _ = operators.eigsh(A, 2, v0=v0)
        torch.testing.assert_close(values, expected, rtol=1e-10, atol=0)
        assert not torch.equal(values, expected)


def test_results_repeat_and_random_state_stays() -> None:
    A = operators.from_matrix(with_spectrum(torch.linspace(0, 1, N, dtype=torch.float64)))
    state = torch.get_rng_state()
    one, two = operators.eigsh(A, 2, tol=1e-3), operators.eigsh(A, 2, tol=1e-3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, one, two))
    drawn = [operators.eigsh(A, 2, tol=1e-3, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert all(map(torch.equal, drawn[0], drawn[1]))
    assert not torch.equal(drawn[0][0], drawn[2][0])
    assert not torch.equal(drawn[0][0], one[0])


@pytest.mark.parametrize("maxiter", [3, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore::autodiff.errors.ConvergenceWarning")
def test_residuals_are_those_of_plain_products(dtype: torch.dtype, maxiter: int) -> None:
    matrix = with_spectrum(SPECTRA["apart"], dtype=dtype)
    values, vectors, residuals = operators.eigsh(
        operators.from_matrix(matrix), 3, maxiter=maxiter, residuals=True
    )
    wide = matrix.double() @ vectors.double() - vectors.double() * values.double()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(residuals.double(), wide.norm(dim=0), rtol=1e-3, atol=100 * eps)
    if maxiter == 1000:
        assert (residuals <= (eps ** (2 / 3) * values.abs()).clamp_min(20 * eps * 10)).all()


def test_warning_has_figures_and_the_values_are_inside_the_spectrum() -> None:
    spectrum = torch.linspace(0, 1, N, dtype=torch.float64)
    A = operators.from_matrix(with_spectrum(spectrum))
    with pytest.warns(
        ConvergenceWarning, match=r"eigsh: 3 of 3 eigenpairs have not converged after 5 prod.*maxiter"
    ):
        values, _ = operators.eigsh(A, 3, maxiter=5)
    assert (values < 1).all()
    assert (values > 0.5).all()
    errors = []
    for maxiter in (2, 4, 8, 16):
        with pytest.warns(ConvergenceWarning):
            errors.append(1 - float(operators.eigsh(A, 1, maxiter=maxiter)[0]))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > 0


def test_memory_is_that_of_the_basis() -> None:
    n, k = 20_000, 4
    A = operators.diagonal(torch.cat([torch.linspace(0, 1, n - k), torch.arange(2.0, 2 + k)]).double())
    with Meter(torch.device("cpu")) as meter:
        values, _ = operators.eigsh(A, k)
    torch.testing.assert_close(values, torch.tensor([5.0, 4, 3, 2], dtype=torch.float64))
    assert meter.peak < 2 * (k + 32) * n * 8


def test_bar_shows_the_products(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    operators.eigsh(operators.from_matrix(with_spectrum(SPECTRA["apart"].double())), 2, progress=True)
    shown = capfd.readouterr().err
    assert "operators.eigsh" in shown
    assert "residual" in shown


# What is refused.

SQUARE = operators.from_matrix(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
WIDE = operators.from_matrix(torch.ones(2, 3))
GOOD = operators.diagonal(torch.arange(100.0))
NOT_A_NUMBER = operators.diagonal(torch.full((100,), torch.nan))
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "not symmetric": (
        lambda: operators.eigsh(SQUARE, 1),
        SolverError,
        ["operators.eigsh", "A.H", "check=False"],
    ),
    "not square": (lambda: operators.eigsh(WIDE, 1), ShapeError, ["operators.eigsh", "A.H @ A"]),
    "a matrix": (lambda: operators.eigsh(torch.eye(2), 1), LeafError, ["operators.eigsh", "from_matrix"]),  # type: ignore[call-overload]
    "k of 0": (
        lambda: operators.eigsh(GOOD, 0),
        OptionError,
        ["operators.eigsh: k is a positive int", "got 0"],
    ),
    "k above n": (
        lambda: operators.eigsh(GOOD, 101),
        OptionError,
        ["k=101 eigenvalues", "[100, 100] has 100"],
    ),
    "which": (lambda: operators.eigsh(GOOD, 1, "SM"), OptionError, ["which", "'LA', 'SA', 'LM'", "'SM'"]),  # type: ignore[call-overload]
    "tol": (lambda: operators.eigsh(GOOD, 1, tol=-1.0), OptionError, ["tol", "got -1.0"]),
    "ncv": (lambda: operators.eigsh(GOOD, 1, ncv=0), OptionError, ["ncv is a positive int", "got 0"]),
    "maxiter": (lambda: operators.eigsh(GOOD, 1, maxiter=2.5), OptionError, ["maxiter is a positive int"]),  # type: ignore[call-overload]
    "block": (lambda: operators.eigsh(GOOD, 1, block=-1), OptionError, ["block is a positive int", "got -1"]),
    "v0 of another size": (lambda: operators.eigsh(GOOD, 1, v0=torch.ones(7)), ShapeError, ["v0", "(7,)"]),
    "NaN": (lambda: operators.eigsh(NOT_A_NUMBER, 1), SolverError, ["operators.eigsh", "NaN", "diagonal"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    call, error, parts = REFUSED[case]
    with pytest.raises(error) as caught:
        call()
    assert all(part in str(caught.value) for part in parts), caught.value


def test_check_may_be_left_out() -> None:
    """The symmetric part of the small one is what is left."""
    values, _ = operators.eigsh(SQUARE, 2, check=False)
    torch.testing.assert_close(values, 2 + torch.tensor([2.0, -2.0]).div(2**0.5))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_check_sees_a_little_asymmetry_at_any_scale(scale: float) -> None:
    matrix = scale * with_spectrum(SPECTRA["apart"].double())
    operators.eigsh(operators.from_matrix(matrix), 1)
    matrix[:, 0] += 1e-3 * scale
    with pytest.raises(SolverError):
        operators.eigsh(operators.from_matrix(matrix), 1)


@pytest.mark.skipif(_torch.version < TorchVersion("2.13"), reason="older tracers are not supported")
def test_compiled_code_is_interrupted() -> None:
    d = torch.arange(200.0, dtype=torch.float64)
    largest = torch.compile(lambda d: 2 * operators.eigsh(operators.diagonal(3 * d), 1)[0], backend="eager")
    torch.testing.assert_close(largest(d), 6 * d[-1:])
    whole = torch.compile(
        lambda d: operators.eigsh(operators.diagonal(d), 1), backend="eager", fullgraph=True
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match="how many steps are taken depends"):
        whole(d)


# Derivatives.

C, B = (normal(N, N, seed=seed) / 40 for seed in (5, 6))
C, B = C + C.T, B + B.T
START = with_spectrum(torch.cat([torch.linspace(-1, 1, N - 4), torch.tensor([2.0, 3, 4.5, -4])]).double())
T = torch.tensor(0.3, dtype=torch.float64)
PROBE = normal(N, seed=7)


def matrix_of(t: Tensor) -> Tensor:
    return START + t * B + (2 * t).sin() * C


def eigenvalues(t: Tensor, which: Any = "LM", **options: Any) -> Tensor:
    return operators.eigsh(operators.from_matrix(matrix_of(t)), 3, which, check=False, **options)[0]


def captured_eigenvalues(t: Tensor) -> Tensor:
    A = operators.from_matvec(
        lambda v: matrix_of(t) @ v, torch.zeros(N, dtype=torch.float64), symmetric=True, check=False
    )
    return operators.eigsh(A, 3, "LM")[0]


def hessian_eigenvalues_of(t: Tensor) -> Tensor:
    A = operators.hessian(lambda x: x @ matrix_of(t) @ x / 2)(torch.zeros(N, dtype=torch.float64))
    return operators.eigsh(A, 3, "LM")[0]


def dense_eigenvalues(t: Tensor) -> Tensor:
    values = torch.linalg.eigvalsh(matrix_of(t))
    return values[values.abs().argsort(descending=True)[:3]]


def central(func: Callable[[Tensor], Tensor], t: Tensor, step: float) -> Tensor:
    """A finite difference of sixth order."""
    weights = {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}
    return sum(w * (func(t + i * step) - func(t - i * step)) for i, w in weights.items()) / step  # type: ignore[return-value]


def slopes(func: Callable[[Tensor], Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivatives by finite differences."""
    return central(func, t, 1e-2), central(lambda s: central(func, s, 1e-2), t, 1e-2)


MODES = {"reverse": ad.jacrev, "forward": ad.jacfwd, "torch's reverse": torch.func.jacrev}


@pytest.mark.parametrize("outer", MODES)
@pytest.mark.parametrize("inner", MODES)
@pytest.mark.parametrize("func", [eigenvalues, captured_eigenvalues, hessian_eigenvalues_of])
def test_derivatives_of_eigenvalues(func: Any, inner: str, outer: str) -> None:
    slope, bend = slopes(dense_eigenvalues, T)
    torch.testing.assert_close(MODES[inner](func)(T), slope, rtol=1e-8, atol=1e-9)
    if (inner, outer) in (("reverse", "reverse"), ("forward", "reverse"), ("reverse", "forward")):
        torch.testing.assert_close(MODES[outer](MODES[inner](func))(T), bend, rtol=1e-6, atol=1e-6)


def test_third_derivative_of_eigenvalues() -> None:
    _, third = slopes(lambda t: central(dense_eigenvalues, t, 1e-2), T)
    result = ad.jacrev(ad.jacrev(ad.jacrev(eigenvalues)))(T)
    torch.testing.assert_close(result, third, rtol=1e-3, atol=1e-3)


def test_derivatives_by_backward() -> None:
    slope, _ = slopes(dense_eigenvalues, T)
    t = T.clone().requires_grad_()
    values = eigenvalues(t)
    (found,) = torch.autograd.grad(values.sum(), t)
    torch.testing.assert_close(found, slope.sum(), rtol=1e-8, atol=1e-9)
    with torch.no_grad():
        assert not eigenvalues(t).requires_grad


def squares(vectors: Tensor) -> Tensor:
    """Numbers that depend on the vectors, but not on their signs."""
    return (PROBE @ vectors) ** 2


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_derivatives_of_eigenvectors(mode: str) -> None:
    def found(t: Tensor) -> Tensor:
        return squares(operators.eigsh(operators.from_matrix(matrix_of(t)), 3, check=False)[1])

    def expected(t: Tensor) -> Tensor:
        return squares(torch.linalg.eigh(matrix_of(t)).eigenvectors.flip(1)[:, :3])

    slope, bend = slopes(expected, T)
    torch.testing.assert_close(found(T), expected(T), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(MODES[mode](found)(T), slope, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(ad.jacrev(MODES[mode](found))(T), bend, rtol=1e-5, atol=1e-5)


def test_derivatives_of_complex_eigenpairs() -> None:
    hermitian = with_spectrum(SPECTRA["apart"].double(), dtype=torch.complex128)
    change = normal(N, N, seed=8, dtype=torch.complex128) / 30
    change = change + change.mH

    def of(matrix: Tensor, dense: bool) -> Tensor:
        if dense:
            values, vectors = torch.linalg.eigh(matrix)
            values, vectors = values.flip(0)[:2], vectors.flip(1)[:, :2]
        else:
            values, vectors = operators.eigsh(operators.from_matrix(matrix), 2, check=False)
        return torch.cat([values, (PROBE.to(vectors.dtype) @ vectors).abs() ** 2])

    slope, bend = slopes(lambda t: of(hermitian + t * change, True), T)
    found = lambda t: of(hermitian + t * change, False)
    for jac in (ad.jacrev, ad.jacfwd):
        torch.testing.assert_close(jac(found)(T), slope, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(ad.jacrev(ad.jacrev(found))(T), bend, rtol=1e-5, atol=1e-5)


def test_first_derivatives_of_eigenvalues_take_no_solution() -> None:
    """The products after the iterations: one block for the image, which is recorded and pulled."""
    counts = []
    for requires_grad in (False, True):
        products = 0
        t = T.clone().requires_grad_(requires_grad)

        def multiply(v: Tensor, t: Tensor = t) -> Tensor:
            nonlocal products
            products += 1
            return matrix_of(t) @ v

        A = operators.from_matvec(multiply, torch.zeros(N, dtype=torch.float64), symmetric=True, check=False)
        values, _ = operators.eigsh(A, 3, "LM")
        if requires_grad:
            torch.autograd.grad(values.sum(), t)
        counts.append(products)
    assert counts[1] - counts[0] <= 4 * 3


def test_repeated_eigenvalues() -> None:
    """Their sum has the derivative of a trace over their space; their vectors have none."""
    d = torch.cat([torch.linspace(-1, 1, N - 2), torch.tensor([3.0, 3.0])]).double()

    def pairs(d: Tensor) -> tuple[Tensor, Tensor]:
        return operators.eigsh(operators.diagonal(d), 2)

    expected = torch.zeros(N, dtype=torch.float64)
    expected[-2:] = 1
    torch.testing.assert_close(ad.grad(lambda d: pairs(d)[0].sum())(d), expected)
    with pytest.raises(DegeneracyError, match=r"operators.eigsh: expected simple eigenvalues"):
        ad.grad(lambda d: squares(pairs(d)[1])[0])(d)
    with pytest.raises(DegeneracyError):
        ad.grad(lambda d: squares(operators.eigsh(operators.diagonal(d), 1)[1])[0])(d)


# Batches.


@each_which
def test_per_sample(which: Any) -> None:
    matrices = torch.stack([matrix_of(t * T) for t in range(3)])
    found, vectors = ad.vmap(
        lambda matrix: operators.eigsh(operators.from_matrix(matrix), 3, which, check=False)
    )(matrices)
    for matrix, values, own in zip(matrices, found, vectors, strict=True):
        assert_pairs(matrix, values, own, first(torch.linalg.eigvalsh(matrix), 3, which), 1e-12)


def test_per_sample_hessians() -> None:
    x, y = INPUTS[:3, None], LABELS[:3, None]

    def largest(x: Tensor, y: Tensor) -> Tensor:
        return operators.eigsh(operators.hessian(loss)(PARAMS, x, y), 2, "LM")[0]

    for at, values in enumerate(ad.vmap(largest)(x, y)):
        expected = first(torch.linalg.eigvalsh(dense_hessian(PARAMS, x[at], y[at])), 2, "LM")
        torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12)


def test_derivatives_per_sample() -> None:
    points = torch.stack([T, 2 * T])
    expected = [slopes(dense_eigenvalues, t) for t in points]
    slope = ad.vmap(ad.jacrev(eigenvalues))(points)
    bend = ad.vmap(ad.jacfwd(ad.jacrev(eigenvalues)))(points)
    torch.testing.assert_close(slope, torch.stack([one for one, _ in expected]), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(bend, torch.stack([one for _, one in expected]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [3, 300])
def test_numbers_that_are_not_finite_are_refused(n: int) -> None:
    A = operators.hessian(lambda x: x.sqrt().sum())(-torch.ones(n))
    for decomposed in (operators.eigsh, operators.svds):
        with pytest.raises(SolverError, match="expected finite products"):
            decomposed(A, 1)
