"""What products with operators cost, in gradients of the same function: ``python -m benchmarks.operators``.

Beside torch.func by hand and, where it is installed, curvlinops; with solvers and eigenvalues over a data set.
"""

from __future__ import annotations

import time
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

import autodiff
from autodiff import operators
from benchmarks import memory
from benchmarks.clock import Here, medians
from benchmarks.promises import Promise
from benchmarks.rows.row import Place, Row, Side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROUNDS = 11
# Hessian and Gauss-Newton products, in gradients.
BARS = {"MLP": (1.8, 1.3), "CNN": (2.7, 2.8), "transformer": (3.0, 1.7)}
OF_CURVLINOPS = 0.75
MANY = 32


class Problem(NamedTuple):
    """A network, its parameters as a dict, and one batch."""

    module: nn.Module
    params: dict[str, Tensor]
    inputs: Tensor
    targets: Tensor

    def model(self, params: dict[str, Tensor], inputs: Tensor) -> Tensor:
        output = autodiff.functional_call(self.module, params, (inputs,))
        return output if output.dim() == 2 else output.flatten(0, 1)

    def loss(self, params: dict[str, Tensor]) -> Tensor:
        return cross_entropy(self.model(params, self.inputs), self.targets)

    def vector(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        return {name: torch.randn(p.shape, generator=generator) for name, p in self.params.items()}

    def gradient(self) -> Callable[[], object]:
        """The gradient by plain autograd: what products are counted in."""
        tracked = {name: p.clone().requires_grad_() for name, p in self.params.items()}
        return lambda: torch.autograd.grad(self.loss(tracked), tuple(tracked.values()))


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
        self.embedding = nn.Embedding(100, 64)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.output = nn.Linear(64, 100)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.layers(self.embedding(tokens)))


def _problem(module: nn.Module, inputs: Tensor, classes: int) -> Problem:
    targets = torch.randint(
        classes, (inputs.shape[0] * (inputs.shape[1] if inputs.dim() == 2 and classes == 100 else 1),)
    )
    return Problem(module, {name: p.detach() for name, p in module.named_parameters()}, inputs, targets)


def problem(name: str) -> Problem:
    torch.manual_seed(0)
    if name == "MLP":
        layers = nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10)
        return _problem(nn.Sequential(*layers), torch.randn(256, 784), 10)
    if name == "CNN":
        convolutions = [
            layer
            for channels in ((3, 16), (16, 32), (32, 32))
            for layer in (nn.Conv2d(*channels, 3, padding=1), nn.SiLU())
        ]
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)
        return _problem(nn.Sequential(*convolutions, *head), torch.randn(32, 3, 32, 32), 10)
    return _problem(_Transformer(), torch.randint(100, (16, 32)), 100)


# By torch.func, as it is written by hand.


def _hessian_product(one: Problem, v: dict[str, Tensor]) -> Any:
    return torch.func.jvp(torch.func.grad(one.loss), (one.params,), (v,))[1]


def _hessian_product_in_reverse(one: Problem, v: dict[str, Tensor]) -> Any:
    """Reverse over reverse, for what torch has no forward mode of, such as the backward of SiLU."""
    return torch.func.vjp(torch.func.grad(one.loss), one.params)[1](v)[0]


def _gauss_newton_product(one: Problem, v: dict[str, Tensor]) -> Any:
    def model(params: dict[str, Tensor]) -> Tensor:
        return one.model(params, one.inputs)

    output, tangent = torch.func.jvp(model, (one.params,), (v,))
    slope = torch.func.grad(partial(_loss_of_output, one.targets))
    _, curved = torch.func.jvp(slope, (output,), (tangent,))
    return torch.func.vjp(model, one.params)[1](curved)[0]


def _loss_of_output(targets: Tensor, output: Tensor) -> Tensor:
    return cross_entropy(output, targets)


def _of_curvlinops(one: Problem, kind: str, v: dict[str, Tensor]) -> Callable[[], Any] | None:
    """A product with curvlinops' operator, None where it is not installed."""
    try:
        import curvlinops  # noqa: PLC0415  optional
    except ImportError:
        return None

    class Flat(nn.Module):
        """The network with an output ``[samples, classes]``."""

        def __init__(self) -> None:
            super().__init__()
            self.module = one.module

        def forward(self, inputs: Tensor) -> Tensor:
            output = self.module(inputs)
            return output if output.dim() == 2 else output.flatten(0, 1)

    make = {"hessian": curvlinops.HessianLinearOperator, "gauss_newton": curvlinops.GGNLinearOperator}[kind]
    model = Flat()
    operator = make(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(one.inputs, one.targets)],
        check_deterministic=False,
        num_data=len(one.targets),
        batch_size_fn=lambda _: len(one.targets),
    )
    vector = [v[name] for name, _ in one.module.named_parameters()]
    return lambda: operator @ vector


def products() -> Iterator[Promise]:
    """A product of each operator on each network."""
    for name, bars in BARS.items():
        one = problem(name)
        v = one.vector()
        kept = {
            "hessian": operators.hessian(one.loss)(one.params),
            "gauss_newton": operators.gauss_newton(one.model, cross_entropy)(
                one.params, one.inputs, one.targets
            ),
        }
        by_hand = {"hessian": _hessian_product, "gauss_newton": _gauss_newton_product}
        for (kind, A), bar in zip(kept.items(), bars, strict=True):
            others = {
                "torch.func": partial(by_hand[kind], one, v),
                "torch.func, reverse": partial(_hessian_product_in_reverse, one, v),
                "curvlinops": _of_curvlinops(one, kind, v),
            }
            if kind != "hessian":
                del others["torch.func, reverse"]
            what = f"{kind} product, {name}"
            runs = {"operator": partial(A.__matmul__, v), **others}
            with sdpa_kernel(
                SDPBackend.MATH
            ):  # torch's fused attention has neither forward mode nor second derivatives
                sides = {side: run for side, run in runs.items() if run is not None and _runs(run)}
                _check_equal(what, sides)
                timed = {side: Here(run) for side, run in {"gradient": one.gradient(), **sides}.items()}
                times = medians(timed, ROUNDS)
            yield Promise(f"{what}: gradients", times["operator"] / times["gradient"], bar)
            for other in others:
                if other in sides:
                    bound = OF_CURVLINOPS if other == "curvlinops" else 1.0
                    yield Promise(f"{what}: over {other}", times["operator"] / times[other], bound)


def _runs(run: Callable[[], Any]) -> bool:
    """Whether torch has the rules that this way needs."""
    try:
        run()
    except NotImplementedError:
        return False
    return True


def _check_equal(what: str, sides: dict[str, Callable[[], Any]]) -> None:
    """All sides multiply by the same matrix. Of another library it is said where it does not."""
    flat = {}
    for name, run in sides.items():
        result = run()
        parts = result.values() if isinstance(result, dict) else result
        flat[name] = torch.cat([part.reshape(-1) for part in parts])
    for name, product in flat.items():
        error = float((product - flat["operator"]).norm() / flat["operator"].norm())
        if error > 1e-4:
            if name != "curvlinops":
                raise AssertionError(f"{what}: {name} multiplies by another matrix")
            print(f"{what}: the product of {name} is off by {error:.2g} of its norm")


def many_vectors() -> Iterator[Promise]:
    """Several vectors at once beside as many single products."""
    one = problem("MLP")
    A = operators.hessian(one.loss)(one.params)
    V = torch.randn(A.shape[1], MANY)
    columns = [V[:, i].contiguous() for i in range(MANY)]
    sides = {"once": lambda: A @ V, "singly": lambda: [A @ v for v in columns]}
    times = medians({side: Here(run) for side, run in sides.items()}, 5)
    yield Promise(f"{MANY} vectors at once over {MANY} products, MLP", times["once"] / times["singly"], 0.6)


def _sides_of_memory(_: Place) -> dict[str, Any]:
    one = problem("MLP")
    gradient = one.gradient()
    return {
        "gradient": Side(gradient, ()),
        "operator": Side(lambda: operators.hessian(one.loss)(one.params), ()),
    }


ROWS = [Row("a kept operator", 0, _sides_of_memory)]


def kept_memory() -> Iterator[Promise]:
    """What a kept operator holds, beside the peak of a gradient."""
    gradient, kept = (
        memory.peak("benchmarks.operators", "a kept operator", column, Place())
        for column in ("gradient", "operator")
    )
    yield Promise("a kept operator, MLP: peaks of a gradient", kept / gradient, 2.2)


def solver() -> Iterator[Promise]:
    """50 steps of conjugate gradients beside 50 products."""
    one = problem("MLP")
    A = operators.gauss_newton(one.model, cross_entropy)(one.params, one.inputs, one.targets) + 1e-3
    b = torch.randn(A.shape[0])

    def solve() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            operators.solve(A, b, method="cg", maxiter=50, rtol=0.0, atol=0.0)

    times = medians({"solve": Here(solve), "products": Here(lambda: [A @ b for _ in range(50)])}, 3)
    yield Promise("50 steps of CG over 50 products, MLP", times["solve"] / times["products"], 1.1)


SAMPLES, LARGEST = 10_000, 20
# Of residuals: eigenvalues are then right to 1e-5, since their errors are of second order.
_TOLERANCE = 3e-3


class _Spectrum(NamedTuple):
    """The loss of a network of about 200,000 parameters over a data set in batches."""

    module: nn.Module
    params: dict[str, Tensor]
    batches: list[tuple[Tensor, Tensor]]

    def loss(self, params: dict[str, Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(autodiff.functional_call(self.module, params, (inputs,)), targets)


def _spectrum() -> _Spectrum:
    """A network after some steps of gradient descent, on samples from one Gaussian for each class."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh(), nn.Linear(400, 10))
    targets = torch.randint(10, (SAMPLES,))
    inputs = torch.randn(10, 64)[targets] + torch.randn(SAMPLES, 64)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for start in range(0, SAMPLES, 500):
        part = slice(start, start + 500)
        optimizer.zero_grad()
        cross_entropy(module(inputs[part]), targets[part]).backward()
        optimizer.step()
    params = {name: p.detach() for name, p in module.named_parameters()}
    return _Spectrum(module, params, list(zip(inputs.split(1000), targets.split(1000), strict=True)))


def eigenvalues() -> Iterator[Promise]:
    """The largest eigenvalues over a data set, beside ARPACK on products by jvp(grad)."""
    from scipy.sparse.linalg import LinearOperator, eigsh  # noqa: PLC0415  in this measurement alone

    one = _spectrum()
    shapes = [p.shape for p in one.params.values()]
    size = sum(p.numel() for p in one.params.values())
    products = 0

    def by_jvp_of_grad(vector: Any) -> Any:
        nonlocal products
        products += 1
        parts = torch.as_tensor(vector, dtype=torch.float32).reshape(-1).split([s.numel() for s in shapes])
        v = {name: part.view(s) for name, part, s in zip(one.params, parts, shapes, strict=True)}
        total = torch.zeros(size)
        for inputs, targets in one.batches:
            slope = torch.func.grad(lambda p, x=inputs, t=targets: one.loss(p, x, t))
            product = torch.func.jvp(slope, (one.params,), (v,))[1]
            total += torch.cat([part.reshape(-1) for part in product.values()]) * (len(targets) / SAMPLES)
        return total.numpy()

    def of_arpack(tol: float) -> tuple[Tensor, float]:
        nonlocal products
        products, start = 0, time.perf_counter()
        operator = LinearOperator((size, size), by_jvp_of_grad, dtype="float32")
        values = eigsh(operator, LARGEST, which="LA", tol=tol)[0]
        seconds = time.perf_counter() - start
        print(f"ARPACK, tol={tol:g}: {products} products in {seconds:.1f} s", flush=True)
        return torch.as_tensor(values).sort(descending=True).values, seconds

    start = time.perf_counter()
    A = operators.hessian(one.loss).over(one.batches)(one.params)
    values, _ = operators.eigsh(A, LARGEST, which="LA", tol=_TOLERANCE)
    ours = time.perf_counter() - start
    print(f"eigsh, tol={_TOLERANCE:g}: {ours:.1f} s", flush=True)
    # As a user would run it, who wants to be sure of four digits; and with a tolerance that is known to suffice.
    exact, theirs = of_arpack(0.0)
    _, loosely = of_arpack(_TOLERANCE)
    what = f"{LARGEST} largest eigenvalues, {size} parameters"
    yield Promise(f"{what}: error over ARPACK's", float((values - exact).abs().max() / exact[0]), 1e-4)
    yield Promise(f"{what}: time over ARPACK's", ours / theirs, 0.5)
    yield Promise(f"{what}: time over ARPACK's, same tol", ours / loosely, 1.0)


def kept() -> Iterator[Promise]:
    """Every figure of operators, measured."""
    for measure in (products, many_vectors, kept_memory, solver, eigenvalues):
        yield from measure()


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name, value, bound in kept():
        missed = "" if value <= bound else "  MISSED"
        print(f"{name:66} {value:8.3g}  bar {bound:g}{missed}", flush=True)


if __name__ == "__main__":
    main()
