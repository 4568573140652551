"""torch.compile over the transforms: one graph, eager's numbers, and nothing left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import autodiff as ad
from autodiff import functional
from scenarios import assert_close

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 13),
    reason="older tracers do not know what the transforms are made of",
)
X = torch.tensor([0.5, -0.75, 1.25])
BATCH = torch.stack([X, X.sin(), 2 * X, X.cos()])
PARAMS = {"w": torch.tensor([0.3, -0.2, 0.9]), "b": torch.tensor(0.1), "power": 2}
NORM, LINEAR = torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)
WEIGHTS = {"weight": torch.stack([X, X.cos()])}


def scalar(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() * x.flip(0)).sum()


def loss(params: dict[str, Any], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ((params["w"] * x).sum().tanh() + params["b"] - y) ** params["power"]


def vector(x: torch.Tensor) -> torch.Tensor:
    return x.exp() * x.roll(1)


def of_norm(params: dict[str, Any], x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    output, buffers = ad.functional_call(NORM, params, (x,), return_buffers=True)
    return output.square().sum(), buffers


def of_linear(params: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
    return ad.functional_call(LINEAR, params, (x,)).exp().sum()


CASES: dict[str, Callable[[], Any]] = {
    "grad": lambda: (ad.grad(scalar), (X,)),
    "grad of a tree": lambda: (ad.grad(loss), (PARAMS, X, X[0])),
    "value_and_grad": lambda: (ad.value_and_grad(scalar), (X,)),
    "vjp": lambda: (lambda x: ad.vjp(vector, x)[1](x)[0], (X,)),
    "jvp": lambda: (lambda x: ad.jvp(vector, (x,), (x,))[1], (X,)),
    "linearize": lambda: (lambda x: ad.linearize(vector, x)[1](x), (X,)),
    "jacrev": lambda: (ad.jacrev(vector), (X,)),
    "jacrev in chunks": lambda: (ad.jacrev(vector, chunk_size=2), (X,)),
    "jacfwd": lambda: (ad.jacfwd(vector), (X,)),
    "hessian": lambda: (ad.hessian(scalar), (X,)),
    "hvp": lambda: (lambda x: ad.hvp(scalar, (x,), (x,))[1], (X,)),
    "hessian_diagonal": lambda: (ad.hessian_diagonal(loss), (PARAMS, X, X[0])),
    "hessian_block_diagonal": lambda: (ad.hessian_block_diagonal(loss), (PARAMS, X, X[0])),
    "hessian_trace": lambda: (ad.hessian_trace(scalar, chunk_size=2), (X,)),
    "hessian_eigenvalues": lambda: (ad.hessian_eigenvalues(loss, 2), (PARAMS, X, X[0])),
    "hessian_eigenvalues, restricted": lambda: (
        ad.hessian_eigenvalues(loss, 1, iterations=2),
        ({"w": torch.linspace(-1, 1, 20), "b": X[1], "power": 2}, torch.linspace(0, 2, 20), X[0]),
    ),
    "vmap": lambda: (ad.vmap(vector, out_dims=1), (BATCH,)),
    "vmap of grad": lambda: (ad.vmap(ad.grad(scalar)), (BATCH,)),
    "vmap of jvp": lambda: (ad.vmap(lambda x: ad.jvp(vector, (x,), (x,))[1]), (BATCH,)),
    "per-sample gradients": lambda: (ad.vmap(ad.grad(loss), (None, 0, 0)), (PARAMS, BATCH, BATCH[:, 0])),
    "per-sample Hessians": lambda: (ad.vmap(ad.hessian(loss), (None, 0, 0)), (PARAMS, BATCH, BATCH[:, 0])),
    "functional_call": lambda: (ad.vmap(ad.hessian(of_linear), (None, 0)), (WEIGHTS, BATCH)),
    "buffers": lambda: (ad.grad(of_norm, has_aux=True), ({"weight": X}, BATCH)),
    "buffers of samples": lambda: (
        ad.vmap(ad.grad(of_norm, has_aux=True), (None, 0)),
        ({"weight": X}, torch.stack([BATCH, BATCH.exp()])),
    ),
    "functional.hessian": lambda: (lambda x: functional.hessian(scalar, x), (X,)),
    "functional.vhp": lambda: (lambda x: functional.vhp(scalar, x, x), (X,)),
}


@pytest.fixture(autouse=True)
def fresh_tracer() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", CASES)
def test_one_graph_gives_eagers_numbers(name: str, backend: str) -> None:
    func, arguments = CASES[name]()
    expected = func(*arguments)
    compiled = torch.compile(func, backend=backend, fullgraph=True)
    assert_close(compiled(*arguments), expected, loose=True)
    assert_close(compiled(*arguments), expected, loose=True)
