"""Parts of Hessians and their eigenvalues against closed forms, torch.func and finite differences."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autodiff as ad
from autodiff.core.memory import Meter
from disguises import DTYPES, TRANSFORMERS, Case, as_tree, call, cases, passive_leaves, plain, vmapped
from scenarios import SCALAR, Tree, assert_close, difference, leaves_of, map_tree

PARTS = {
    "diagonal": ad.hessian_diagonal,
    "blocks": ad.hessian_block_diagonal,
    "trace": ad.hessian_trace,
    "eigenvalues": partial(ad.hessian_eigenvalues, k=1),
}
CHUNKED = ["diagonal", "blocks", "trace"]
CHUNKS: list[Any] = [1, 2, 3, 64, "auto", None]
each_part = pytest.mark.parametrize("part", PARTS)
each_chunked = pytest.mark.parametrize("part", CHUNKED)


def f64(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# What each part is, read off a nested Hessian without the library.


def own_blocks(hessian: Tree, primal: Tree) -> Tree:
    """The blocks [*leaf, *leaf] in a tree like the primal."""
    rows: list[Tree] = []
    map_tree(rows.append, primal, hessian)
    blocks = iter([leaves_of(row)[at] for at, row in enumerate(rows)])
    return map_tree(lambda _: next(blocks), primal, primal)


def own_diagonal(hessian: Tree, primal: Tree) -> Tree:
    def of_leaf(block: Tensor, leaf: Tensor) -> Tensor:
        return block.reshape(leaf.numel(), leaf.numel()).diagonal().reshape(leaf.shape)

    return map_tree(of_leaf, primal, own_blocks(hessian, primal), primal)


def as_matrix(hessian: Tree, primal: Tree) -> Tensor:
    rows: list[Tree] = []
    map_tree(rows.append, primal, hessian)
    sizes = [leaf.numel() for leaf in leaves_of(primal)]
    strips = [
        torch.cat([block.reshape(n, m) for block, m in zip(leaves_of(row), sizes, strict=True)], 1)
        for row, n in zip(rows, sizes, strict=True)
    ]
    return torch.cat(strips)


def part_of(part: str, hessian: Tree, primal: Tree) -> Tree:
    match part:
        case "blocks":
            return own_blocks(hessian, primal)
        case "diagonal":
            return own_diagonal(hessian, primal)
        case "trace":
            # torch 2.11 has no trace in half precision.
            return as_matrix(hessian, primal).diagonal().sum()
        case _:
            return torch.linalg.eigvalsh(as_matrix(hessian, primal))[-1:]


@each_part
@pytest.mark.parametrize(
    "case",
    cases(SCALAR, [plain, vmapped, as_tree], DTYPES)
    + cases(SCALAR, [t for t in TRANSFORMERS if t not in (plain, vmapped, as_tree)], [torch.float64]),
)
def test_part_equals_the_closed_form(case: Case, part: str) -> None:
    expected = case.expect(lambda x: part_of(part, case.scenario.hessian(x), x))
    if part in ("diagonal", "blocks"):
        expected = case.dress(expected)
    assert_close(call(case, PARTS[part]), expected, loose="float32" in repr(case.primals[0]))


@pytest.mark.parametrize("chunk_size", CHUNKS)
@each_chunked
@pytest.mark.parametrize("case", cases(SCALAR, [plain, vmapped, passive_leaves], [torch.float64]))
def test_chunks_change_nothing(case: Case, part: str, chunk_size: Any) -> None:
    expected = case.expect(lambda x: part_of(part, case.scenario.hessian(x), x))
    if part != "trace":
        expected = case.dress(expected)
    assert_close(call(case, partial(PARTS[part], chunk_size=chunk_size)), expected)


# A network, against torch.func's Hessian of a function of one vector.


def network(sizes: list[int], seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    params: dict[str, Tensor] = {}
    for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        params[f"{layer}.weight"] = f64(fan_out, fan_in, seed=seed + layer).to(dtype) / fan_in**0.5
        params[f"{layer}.bias"] = f64(fan_out, seed=seed + 10 + layer).to(dtype) / 3
    return params


def loss(params: dict[str, Any], x: Tensor, y: Tensor) -> Tensor:
    layers = sum(name.endswith("weight") for name in params)
    for layer in range(layers):
        x = nn.functional.linear(x, params[f"{layer}.weight"], params[f"{layer}.bias"])
        x = x.tanh() if layer < layers - 1 else x
    return nn.functional.cross_entropy(x, y)


def dense(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The Hessian as a matrix, by torch.func of a function of one vector."""
    names, shapes = list(params), [p.shape for p in params.values()]

    def of_vector(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes])
        named = zip(names, parts, shapes, strict=True)
        return loss({name: part.view(shape) for name, part, shape in named}, x, y)

    return torch.func.hessian(of_vector)(torch.cat([p.flatten() for p in params.values()]))


SMALL, INPUTS, LABELS = network([4, 5, 3], seed=20), f64(7, 4, seed=21), torch.arange(7) % 3


@each_part
def test_network_equals_torch_func(part: str) -> None:
    matrix = dense(SMALL, INPUTS, LABELS)
    sizes = [p.numel() for p in SMALL.values()]
    blocks = [strip.split(sizes, 1) for strip in matrix.split(sizes)]
    shaped = {
        a: {b: blocks[i][j].reshape(*SMALL[a].shape, *SMALL[b].shape) for j, b in enumerate(SMALL)}
        for i, a in enumerate(SMALL)
    }
    assert_close(PARTS[part](loss)(SMALL, INPUTS, LABELS), part_of(part, shaped, SMALL))


@each_part
def test_per_sample_parts_of_a_shared_tree(part: str) -> None:
    per_sample = ad.vmap(PARTS[part](loss), in_dims=(None, 0, 0), chunk_size=3)(SMALL, INPUTS, LABELS)
    for at in range(len(INPUTS)):
        expected = PARTS[part](loss)(SMALL, INPUTS[at], LABELS[at])
        assert_close(map_tree(lambda leaf, at=at: leaf[at], expected, per_sample), expected)


def test_trace_and_diagonal_agree_with_differences() -> None:
    """d^2 f / dx_i^2 by central differences of the first derivative's differences."""

    def func(x: Tensor) -> Tensor:
        return (x.sin() * x.flip(0).exp()).sum() + x.prod()

    x, expected = f64(5, seed=22), []
    for e in torch.eye(5, dtype=torch.float64):
        slope = partial(difference, func, direction=e, step=2e-2)
        expected.append(difference(lambda at, slope=slope: slope(at), x, e, step=2e-2))
    torch.testing.assert_close(ad.hessian_diagonal(func)(x), torch.stack(expected), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ad.hessian_trace(func)(x), sum(expected), rtol=1e-8, atol=1e-8)


# Arguments, leaves and dtypes.


def bilinear(x: Tensor, y: Tensor) -> Tensor:
    """x_0^2 sum(y) + x_1 y_0 y_1, which is linear in x_1, y_0 and y_1 each."""
    return x[0] ** 2 * y.sum() + x[1] * y[0] * y[1]


X, Y = torch.tensor([0.5, -1.0], dtype=torch.float64), torch.tensor([3.0, 5.0], dtype=torch.float64)
OF_X, OF_Y = torch.tensor([16.0, 0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
XX, YY = torch.diag(OF_X), torch.tensor([[0.0, -1], [-1, 0]], dtype=torch.float64)
XY = torch.tensor([[1.0, 1], [5, 3]], dtype=torch.float64)


def test_argnums_tuple_gives_a_tuple() -> None:
    assert_close(ad.hessian_diagonal(bilinear, (0, 1))(X, Y), (OF_X, OF_Y))
    assert_close(ad.hessian_diagonal(bilinear, ("y", 0))(X, y=Y), (OF_Y, OF_X))
    assert_close(ad.hessian_block_diagonal(bilinear, ("y", 0))(X, y=Y), (YY, XX))
    assert_close(ad.hessian_trace(bilinear, ("y", 0))(X, y=Y), OF_X.sum())
    both = torch.cat([torch.cat([XX, XY], 1), torch.cat([XY.T, YY], 1)])
    assert_close(ad.hessian_eigenvalues(bilinear, 4, (0, 1))(X, Y), torch.linalg.eigvalsh(both).flip(0))
    assert_close(ad.hessian_eigenvalues(bilinear, 2, "y")(X, Y), torch.tensor([1.0, -1], dtype=torch.float64))


def test_wrt_leaves_none_in_place_of_the_others() -> None:
    params = {"x": X, "rest": [Y, 3, None]}

    def func(p: dict[str, Any]) -> Tensor:
        return bilinear(p["x"], p["rest"][0])

    assert_close(ad.hessian_diagonal(func, wrt="rest.*")(params), {"x": None, "rest": [OF_Y, None, None]})
    assert_close(ad.hessian_block_diagonal(func, wrt="rest.*")(params), {"x": None, "rest": [YY, None, None]})
    assert_close(ad.hessian_trace(func, wrt="x")(params), OF_X.sum())
    assert_close(ad.hessian_eigenvalues(func, 1, wrt="x")(params), OF_X[:1])


def test_aux_comes_beside_the_result() -> None:
    func = lambda x: ((x**3).sum(), {"text": "any", "double": 2 * x})
    for part, transform in PARTS.items():
        result, aux = transform(func, has_aux=True)(X)
        assert_close(result, part_of(part, torch.diag(6 * X), X))
        assert_close(aux, {"text": "any", "double": 2 * X})


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_leaves_that_the_gradient_does_not_depend_on(chunk_size: Any) -> None:
    """One leaf enters linearly, one not at all, one is empty, one is a single number."""
    params = {
        "linear": f64(2, 3, seed=23),
        "unused": f64(14, seed=24),
        "empty": torch.zeros(0, 3, dtype=torch.float64),
        "number": torch.tensor(0.5, dtype=torch.float64),
    }

    def func(p: dict[str, Tensor]) -> Tensor:
        return p["linear"].sum() + p["number"] ** 3 + (p["empty"] ** 2).sum()

    zeros = {name: torch.zeros_like(leaf) for name, leaf in params.items()}
    number = torch.tensor(3.0, dtype=torch.float64)
    assert_close(ad.hessian_diagonal(func, chunk_size=chunk_size)(params), {**zeros, "number": number})
    blocks = {
        "linear": torch.zeros(2, 3, 2, 3, dtype=torch.float64),
        "unused": torch.zeros(14, 14, dtype=torch.float64),
        "empty": torch.zeros(0, 3, 0, 3, dtype=torch.float64),
        "number": number,
    }
    assert_close(ad.hessian_block_diagonal(func, chunk_size=chunk_size)(params), blocks)
    assert_close(ad.hessian_trace(func, chunk_size=chunk_size)(params), number)
    expected = torch.tensor([3.0, 0, 0], dtype=torch.float64)
    assert_close(ad.hessian_eigenvalues(func, 3)(params), expected)
    assert_close(ad.hessian_eigenvalues(func, 1, iterations=2)(params), expected[:1])


@each_part
def test_linear_function_has_zeros(part: str) -> None:
    expected = part_of(part, torch.zeros(5, 5, dtype=torch.float64), torch.zeros(5))
    assert_close(PARTS[part](lambda x: 2 * x.sum())(f64(5, seed=25)), expected)


def test_empty_argument() -> None:
    empty = torch.zeros(2, 0, dtype=torch.float64)
    assert_close(ad.hessian_diagonal(lambda x: (x**2).sum())(empty), empty)
    assert_close(ad.hessian_trace(lambda x: (x**2).sum())(empty), torch.zeros((), dtype=torch.float64))
    blocks = ad.hessian_block_diagonal(lambda x: (x**2).sum())(empty)
    assert_close(blocks, torch.zeros(2, 0, 2, 0, dtype=torch.float64))


@pytest.mark.parametrize("iterations", [None, 2])
def test_mixed_dtypes_are_promoted_in_what_is_over_all_leaves(iterations: int | None) -> None:
    single, double = torch.full((3,), 0.5), torch.full((12,), 2.0, dtype=torch.float64)
    func = lambda p: (p[0] ** 3).sum() + (p[1] ** 3).sum()
    assert_close(ad.hessian_diagonal(func)((single, double)), (6 * single, 6 * double))
    largest, trace = ad.hessian_eigenvalues(func, 1, iterations=iterations), ad.hessian_trace(func)
    assert_close(trace((single, double)), torch.tensor(153.0, dtype=torch.float64))
    assert_close(largest((single, double)), torch.tensor([12.0], dtype=torch.float64))
    batch = single[None], double[None]
    assert_close(ad.vmap(trace)(batch), torch.tensor([153.0], dtype=torch.float64))
    assert_close(ad.vmap(largest)(batch), torch.tensor([[12.0]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("iterations", [None, 1])
def test_half_precision(dtype: torch.dtype, iterations: int | None) -> None:
    x = torch.arange(1, 9).to(dtype)
    for part in CHUNKED:
        assert_close(PARTS[part](lambda x: (x**2).sum())(x), part_of(part, 2 * torch.eye(8).to(dtype), x))
    largest = ad.hessian_eigenvalues(lambda x: (x**2).sum(), 1, iterations=iterations)(x)
    assert_close(largest, torch.tensor([2.0], dtype=dtype))


# Under other transforms, and how much is computed.


def quartic(x: Tensor) -> Tensor:
    """sum x^4 + (sum x)^3; Laplacian 12 sum x^2 + 6 n sum x; its gradient 24 x + 6 n."""
    return (x**4).sum() + x.sum() ** 3


POINT = f64(5, seed=26)


@pytest.mark.parametrize("chunk_size", [1, 2, None])
@pytest.mark.parametrize("library", [ad, torch.func], ids=lambda m: m.__name__)
def test_gradient_of_the_laplacian(library: Any, chunk_size: int | None) -> None:
    laplacian = ad.hessian_trace(quartic, chunk_size=chunk_size)
    assert_close(laplacian(POINT), 12 * (POINT**2).sum() + 30 * POINT.sum())
    assert_close(library.grad(laplacian)(POINT), 24 * POINT + 30)
    batch = torch.stack([POINT, -2 * POINT])
    assert_close(library.vmap(library.grad(laplacian))(batch), 24 * batch + 30)
    _, slope = library.jvp(laplacian, (POINT,), (POINT.flip(0),))
    assert_close(slope, (24 * POINT + 30) @ POINT.flip(0))
    third = library.jacrev(ad.hessian_diagonal(quartic, chunk_size=chunk_size))(POINT)
    assert_close(third, torch.diag(24 * POINT) + 6)
    tracked = POINT.clone().requires_grad_()
    (by_backward,) = torch.autograd.grad(laplacian(tracked), tracked)
    assert_close(by_backward, 24 * POINT + 30)


def test_physics_informed_loss_trains_the_network() -> None:
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    points = f64(9, 2, seed=27)

    def trained(library: Any, laplacian: Any) -> list[Tensor]:
        residual = library.vmap(laplacian)(points) + points.prod(1)
        return list(torch.autograd.grad((residual**2).mean(), list(net.parameters())[:-1]))

    u = lambda x: net(x).squeeze()
    expected = trained(torch.func, lambda x: torch.func.hessian(u)(x).trace())
    assert all(g.abs().sum() > 0 for g in expected)
    assert_close(trained(ad, ad.hessian_trace(u)), expected)


class Squares(torch.autograd.Function):
    """x^2, which counts how often a cotangent comes to it."""

    pulls = 0

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        Squares.pulls += 1
        return 2 * ctx.saved_tensors[0] * cotangent


@each_chunked
@pytest.mark.parametrize("order", [1, -1])
def test_blocks_of_two_leaves_are_never_pulled(part: str, order: int) -> None:
    """The gradient by x reaches y through the squares, and nobody asks for that."""
    Squares.pulls = 0
    x, y = f64(2, seed=28), f64(3, seed=29)
    func = lambda p: (p["x"] ** 3).sum() * Squares.apply(p["y"]).sum()
    params = dict([("x", x), ("y", y)][::order])
    PARTS[part](func, chunk_size=1)(params)
    assert Squares.pulls == 1, "once, for the gradient itself"


def coupled(x: Tensor) -> Tensor:
    """Every pair of inputs has a second derivative: e^s' with s' the mean of the squares."""
    return (x**2).mean().exp()


def coupled_diagonal(x: Tensor) -> Tensor:
    n = x.shape[-1]
    return (x**2).mean(-1, keepdim=True).exp() * (2 / n + 4 * x**2 / n**2)


@pytest.mark.parametrize("batch", [None, 3], ids=["plain", "under vmap"])
@pytest.mark.parametrize("transform", [ad.hessian_diagonal, ad.hessian_trace])
def test_memory_is_that_of_a_chunk_of_rows(transform: Any, batch: int | None) -> None:
    """The matrix has 2000 x 2000 numbers; ten rows at a time are a two-hundredth of it."""
    x = f64(2000, seed=30) if batch is None else f64(batch, 2000, seed=30)
    derived = transform(coupled, chunk_size=10)
    with Meter(torch.device("cpu")) as meter:
        result = derived(x) if batch is None else ad.vmap(derived)(x)
    expected = coupled_diagonal(x)
    assert_close(result, expected if transform is ad.hessian_diagonal else expected.sum(-1))
    assert meter.peak < (batch or 1) * 2000 * 2000 * 8 / 20


# Eigenvalues of matrices too large to be formed: known spectra.

P = 400


def quadratic(spectrum: Tensor, seed: int = 31) -> Any:
    """x^T A x / 2 with A = V diag(spectrum) V^T."""
    V, _ = torch.linalg.qr(f64(len(spectrum), len(spectrum), seed=seed))
    A = ((V * spectrum.double()) @ V.T).to(spectrum.dtype)
    return lambda x: x @ A @ x / 2


def spectrum(*outer: float, inner: Tensor | None = None) -> Tensor:
    """The outer eigenvalues, and as many inner ones as are missing."""
    rest = torch.zeros(P - len(outer)) if inner is None else inner[: P - len(outer)]
    return torch.cat([torch.tensor(outer, dtype=torch.float64), rest.double()])


_APART = spectrum(9, 7, 6, 5, 4, -4.5, -5.5, -6.5, -8, -10, inner=torch.linspace(-1, 1, P))
SPECTRA = {
    "apart": _APART,
    "low rank": spectrum(5, 2, -3),
    "rank one": spectrum(-2),
    "multiple of the identity": torch.full((P,), 3.0, dtype=torch.float64),
    "zero": torch.zeros(P, dtype=torch.float64),
    "fourfold": spectrum(4, 4, 4, 4, -5, -5, -5, -5, inner=torch.linspace(-1, 1, P)),
    "two values": spectrum(*[2.0] * 150, inner=torch.full((P,), -1.0)),
    "decay": torch.cat([0.8 ** torch.arange(P / 2), -0.5 * 0.8 ** torch.arange(P / 2)]).double(),
    "tiny": 1e-200 * _APART,
    "huge": 1e200 * _APART,
}


def first(values: Tensor, k: int, which: str) -> Tensor:
    """By sorting, in the order that SciPy's names promise."""
    match which:
        case "LA":
            return values.sort(descending=True).values[:k]
        case "SA":
            return values.sort().values[:k]
        case _:
            return torch.tensor(sorted(values.tolist(), key=lambda v: -abs(v))[:k], dtype=values.dtype)


def assert_eigenvalues(result: Tensor, expected: Tensor, norm: Tensor, digits: float = 1e-9) -> None:
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    torch.testing.assert_close(result, expected, rtol=0, atol=digits * norm.abs().max().item())


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("name", SPECTRA)
def test_known_spectrum(name: str, which: Any, k: int) -> None:
    values = SPECTRA[name]
    result = ad.hessian_eigenvalues(quadratic(values), k, which=which)(f64(P, seed=32))
    assert_eigenvalues(result, first(values, k, which), values)


@pytest.mark.parametrize("name", ["apart", "low rank", "multiple of the identity", "zero", "fourfold"])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_known_spectrum_in_single_precision(name: str, scale: float) -> None:
    values = (scale * SPECTRA[name]).float()
    result = ad.hessian_eigenvalues(quadratic(values), 4, which="LM")(torch.zeros(P))
    assert_eigenvalues(result, first(values, 4, "LM"), values, digits=3e-6)


DIAGONALS = {
    "one entry": torch.cat([torch.ones(1), torch.zeros(P - 1)]),
    "three entries": torch.cat([torch.tensor([1.0, 5, -2]), torch.zeros(P - 3)]),
    "last entry": torch.cat([torch.zeros(P - 1), torch.ones(1)]),
    "two halves": torch.ones(P).where(torch.arange(P) < P // 2, -2.0),
    "alternating": torch.ones(P).where(torch.arange(P) % 2 == 0, -2.0),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("name", DIAGONALS)
def test_exact_zeros_break_nothing_down(name: str, which: Any, dtype: torch.dtype) -> None:
    """The products vanish exactly, and unit vectors are what QR completes a basis with."""
    values = DIAGONALS[name].to(dtype)
    result = ad.hessian_eigenvalues(lambda x: (values * x**2).sum() / 2, 2, which=which)(values)
    assert_eigenvalues(result, first(values, 2, which), values, 1e-13 if dtype is torch.float64 else 3e-6)


@pytest.mark.parametrize("size", [119, 120, 121, 122, 125])
def test_right_on_both_sides_of_the_size_that_is_formed(size: int) -> None:
    values = torch.linspace(-1, 1, size, dtype=torch.float64) ** 9
    result = ad.hessian_eigenvalues(quadratic(values), 1)(values)
    assert_eigenvalues(result, values[-1:], values)


def test_the_space_may_be_nearly_everything() -> None:
    """Half of the space for a matrix with nothing apart: the result is still from within."""
    values = torch.linspace(-1, 1, 121, dtype=torch.float64)
    result = ad.hessian_eigenvalues(quadratic(values), 1)(values)
    assert 0.99 < result.item() < 1 + 1e-12


def test_more_iterations_come_closer_from_within() -> None:
    values = torch.linspace(0, 1, P, dtype=torch.float64)
    func, x = quadratic(values), f64(P, seed=33)
    errors = [1 - ad.hessian_eigenvalues(func, 1, iterations=n)(x).item() for n in (2, 5, 10, 20, 40)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-2
    assert 0 < errors[-1] < 1e-4
    assert ad.hessian_eigenvalues(func, 1, iterations=P)(x).item() == pytest.approx(1, abs=1e-13)


# A network whose Hessian is not formed.

LARGE = network([8, 16, 14, 4], seed=40)
MANY, OF_MANY = f64(5, 8, seed=41), torch.arange(5) % 4


def per_sample_spectra() -> Tensor:
    x, y = MANY[:, None], OF_MANY[:, None]
    return torch.stack([torch.linalg.eigvalsh(dense(LARGE, x[at], y[at])) for at in range(len(MANY))])


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("k", [1, 3])
def test_eigenvalues_of_a_network(which: Any, k: int) -> None:
    expected = torch.linalg.eigvalsh(dense(LARGE, MANY, OF_MANY))
    assert len(expected) == 442
    result = ad.hessian_eigenvalues(loss, k, which=which)(LARGE, MANY, OF_MANY)
    assert_eigenvalues(result, first(expected, k, which), expected)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_eigenvalues_per_sample(which: Any, chunk_size: int | None, mode: Any) -> None:
    expected = per_sample_spectra()
    derived = ad.hessian_eigenvalues(loss, 3, which=which)
    with mode():
        result = ad.vmap(derived, (None, 0, 0), chunk_size=chunk_size)(LARGE, MANY, OF_MANY)
    for at in range(len(MANY)):
        assert_eigenvalues(result[at].clone(), first(expected[at], 3, which), expected[at])


def test_results_repeat_and_random_state_stays() -> None:
    derived = ad.hessian_eigenvalues(quadratic(torch.linspace(0, 1, P, dtype=torch.float64)), 2)
    x, state = f64(P, seed=34), torch.get_rng_state()
    one = derived(x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(derived(x), one)
    # Not converged, so that another start would show.
    assert_close(ad.vmap(derived)(torch.stack([x, 2 * x])), torch.stack([one, one]))


@pytest.mark.parametrize("iterations", [None, P], ids=["restricted", "formed"])
def test_function_runs_once_for_all_products(iterations: int | None) -> None:
    seen, values = [], SPECTRA["apart"]

    def func(x: Tensor) -> Tensor:
        seen.append(1)
        return quadratic(values)(x)

    ad.hessian_eigenvalues(func, 1, iterations=iterations)(values)
    assert len(seen) == 1


def test_first_derivatives_of_eigenvalues() -> None:
    """A(t) = A + t B: the derivative of eigenvalue i is v_i^T B v_i."""
    V, _ = torch.linalg.qr(f64(P, P, seed=35))
    A = (V * SPECTRA["apart"]) @ V.T
    B = f64(P, P, seed=36)
    B = (B + B.T) / 20
    t = torch.tensor(0.3, dtype=torch.float64)
    _, vectors = torch.linalg.eigh(A + t * B)
    expected = torch.einsum("pi,pq,qi->i", vectors, B, vectors).flip(0)[:3]
    x = f64(P, seed=37)

    def eigenvalues(t: Tensor) -> Tensor:
        return ad.hessian_eigenvalues(lambda x: x @ (A + t * B) @ x / 2, 3)(x)

    def close(result: Tensor) -> None:
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)

    close(ad.jacrev(eigenvalues)(t))
    close(ad.jacfwd(eigenvalues)(t))
    close(torch.func.jacrev(eigenvalues)(t))
    close(ad.vmap(ad.jacrev(eigenvalues))(t.expand(2))[1])
    close(torch.autograd.functional.jacobian(eigenvalues, t))


@pytest.mark.parametrize("name", ["one entry", "last entry", "three entries"])
def test_first_derivatives_where_the_space_is_soon_complete(name: str) -> None:
    """The derivative of the largest entry of a diagonal, however the basis went on when it had them all."""
    values = DIAGONALS[name].double()
    x = f64(P, seed=39)

    def largest(entries: Tensor) -> Tensor:
        return ad.hessian_eigenvalues(lambda x: (entries * x**2).sum() / 2, 1)(x)

    assert_close(ad.jacrev(largest)(values), (values == values.max())[None].double())


def test_eigenvalues_take_the_memory_of_their_space() -> None:
    """60 vectors of the basis, and what a few operations on it need."""
    x = f64(4000, seed=38)
    derived = ad.hessian_eigenvalues(coupled, 1)
    with Meter(torch.device("cpu")) as meter:
        largest = derived(x)
    # 2 e^m / n I + 4 e^m x x^T / n^2, with m the mean of the squares.
    m = (x**2).mean()
    assert_close(largest, (m.exp() * (2 + 4 * m) / 4000)[None])
    assert meter.peak < 4 * 60 * 4000 * 8
