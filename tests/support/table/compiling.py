"""torch.compile over the transforms."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops import scan
from torch.nn.functional import layer_norm, mse_loss

from scenarios import assert_close
from table.row import Section

COMPILING = Section("torch.compile")
X, Y = torch.tensor([[0.5, -0.75, 1.25], [0.3, -0.2, 0.9]]), torch.tensor([0.25, -1.0])
W = torch.tensor([0.3, -0.2, 0.9])


def loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return ((w * x).sum() - y) ** 3


@COMPILING.row(
    "`torch.compile(vmap(hessian(loss), (None, 0, 0)), fullgraph=True)`",
    torch="fails to trace",
    fails="(TorchRuntimeError|Unsupported): ",
    ours="one graph, eager's numbers",
    issue="pytorch#183015",
    needs="2.13",
    alone=(),
)
def compiled_hessians_per_sample(library: Any) -> None:
    func = library.vmap(library.hessian(loss), (None, 0, 0))
    result = torch.compile(func, fullgraph=True, backend="eager")(W, X, Y)
    expected = 6 * (X @ W - Y)[:, None, None] * X[:, :, None] * X[:, None, :]
    assert_close(result, expected, loose=True)


@COMPILING.row(
    "`torch.compile` of `jvp(grad(mse_loss))`",
    torch="fails to trace; with the backend aot_eager the process ends",
    fails="RuntimeError: ZeroTensors are immutable|the process ends by signal",
    ours="one graph, right",
    over={"eager": "eager", "aot_eager": "aot_eager"},
    needs="2.13",
    alone=(),
)
def compiled_product_with_the_hessian_of_mse_loss(library: Any, backend: str) -> None:
    def product(x: Tensor) -> Tensor:
        return library.jvp(library.grad(lambda x: mse_loss(x, W)), (x,), (W,))[1]

    result = torch.compile(product, fullgraph=True, backend=backend)(X[0])
    assert_close(result, 2 / 3 * W, loose=True)


@COMPILING.row(
    "a `jvp` after `torch.compile` of `jvp(grad(mse_loss))`, failed or not",
    torch="every later `jvp` of the process fails",
    fails="RuntimeError: Nested forward mode AD is not supported",
    ours="right",
    over={"eager": "eager"},
    needs="2.13",
    alone=(),
)
def jvp_after_a_failed_compile(library: Any, backend: str) -> None:
    def product(x: Tensor) -> Tensor:
        return library.jvp(library.grad(lambda x: mse_loss(x, W)), (x,), (W,))[1]

    with suppress(Exception):
        torch.compile(product, backend=backend)(X[0])
    assert_close(library.jvp(torch.sin, (X[0],), (W,))[1], X[0].cos() * W, loose=True)


@COMPILING.row(
    "`jvp` or `hessian` of `torch.compile(f, fullgraph=True)`",
    torch="fails to trace",
    fails="Unsupported: ",
    ours="right; the function runs uncompiled",
    alone=(),
)
def compiled_functions_inside(library: Any) -> None:
    compiled = torch.compile(lambda x: x.cumprod(0).sum(), fullgraph=True, backend="aot_eager")
    x, y, z = X[0]
    zero, one = torch.tensor([0.0, 1.0])
    gradient = torch.stack([1 + y + y * z, x + x * z, x * y])
    assert_close(library.jvp(compiled, (X[0],), (W,))[1], gradient @ W, loose=True)
    expected = torch.stack([zero, one + z, y, one + z, zero, x, y, x, zero]).view(3, 3)
    assert_close(library.hessian(compiled)(X[0]), expected, loose=True)


@COMPILING.row(
    "`jacrev` of `torch.compile(f)`",
    torch="a compiled pullback cannot be batched",
    fails="RuntimeError: .*compiled backward function within vmap|Unsupported: ",
    ours="right; the compiled pullback is called for each row",
    alone=(),
)
def jacrev_of_a_compiled_function(library: Any) -> None:
    compiled = torch.compile(lambda x: x**3 + x.sum(), fullgraph=True, backend="aot_eager")
    assert_close(library.jacrev(compiled)(W), torch.diag(3 * W**2) + 1, loose=True)


@COMPILING.row(
    "`jvp` or `hessian` of `torch.cond`, `while_loop` or `scan`",
    torch="raises",
    fails="UncapturedHigherOrderOpError|AssertionError: ",
    ours="right",
    alone=(),
)
def derivatives_of_control_flow(library: Any) -> None:
    def branch(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y**3, lambda y: y**2, (x,)).sum()

    def loop(x: Tensor) -> Tensor:
        start = torch.tensor(0), torch.ones_like(x)
        return torch.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, y * x), start)[1].sum()

    def steps(x: Tensor) -> Tensor:
        return scan(lambda c, row: (c + row**3, c.clone()), torch.zeros(()), x * 1.0)[0]

    for func in (branch, loop, steps):
        assert_close(library.jvp(func, (W,), (X[0],))[1], (3 * W**2 * X[0]).sum(), loose=True)
        assert_close(library.hessian(func)(W), torch.diag(6 * W), loose=True)


@COMPILING.row(
    "`torch.compile` of `vmap(hessian(f))`, and of Hessians in mixed modes, through layer_norm and logcumsumexp",
    torch="fails to trace",
    fails="(TorchRuntimeError|Unsupported): ",
    ours="one graph, right",
    needs="2.13",
    alone=(),
)
def compiled_derivatives_of_norms(library: Any) -> None:
    x, v = X.double(), W.double()

    def norm_by_hand(x: Tensor) -> Tensor:
        centred = x - x.mean()
        return centred / (centred.square().mean() + 1e-5).sqrt()

    def sums_by_hand(x: Tensor) -> Tensor:
        return torch.stack([x[: i + 1].exp().sum().log() for i in range(3)])

    for func, by_hand in (
        (lambda x: layer_norm(x, (3,)), norm_by_hand),
        (lambda x: x.logcumsumexp(0), sums_by_hand),
    ):

        def cubed(x: Tensor, func: Any = func) -> Tensor:
            return func(x).pow(3).sum()

        def derivatives(x: Tensor, cubed: Any = cubed) -> tuple[Tensor, Tensor]:
            mixed = library.jacrev(lambda x: library.jvp(cubed, (x,), (v,))[1])
            return library.vmap(library.hessian(cubed))(x), mixed(x[0])

        per_sample, mixed = torch.compile(derivatives, fullgraph=True, backend="aot_eager")(x)
        expected = [
            torch.autograd.functional.hessian(lambda x, f=by_hand: f(x).pow(3).sum(), sample) for sample in x
        ]
        assert_close(per_sample, torch.stack(expected))
        assert_close(mixed, expected[0] @ v)
