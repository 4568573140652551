"""torch.compile over the transforms."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops import scan
from torch.nn.functional import mse_loss

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
    "`jvp` or `hessian` of `torch.compile(det, fullgraph=True)`",
    torch="fails to trace",
    fails="Unsupported: ",
    ours="right; the function runs uncompiled",
    over={"jvp": "jvp", "hessian": "hessian"},
    alone=(),
)
def compiled_functions_inside(library: Any, name: str) -> None:
    compiled = torch.compile(torch.linalg.det, fullgraph=True, backend="aot_eager")
    a, b = torch.diag(X[0]), torch.eye(3)  # det(a + t b) is the product of a's diagonal and t
    if name == "jvp":
        result = library.jvp(compiled, (a,), (b,))[1]
        expected = X[0, 0] * X[0, 1] + X[0, 0] * X[0, 2] + X[0, 1] * X[0, 2]
    else:
        result = library.hessian(compiled)(a).diagonal(dim1=0, dim2=1).diagonal(dim1=0, dim2=1)
        # Of the product of three numbers: each mixed derivative is the third.
        expected = torch.stack([X[0].flip(0)[[0, 0, 1]], X[0].flip(0)[[0, 0, 2]], X[0].flip(0)[[1, 2, 0]]])
        expected = expected * (1 - b)
    assert_close(result, expected, loose=True)


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
    fails="UncapturedHigherOrderOpError|AssertionError: Expected FakeTensor|AssertionError: ",
    ours="right",
    over={"cond": "cond", "while_loop": "while_loop", "scan": "scan"},
    alone=(),
)
def derivatives_of_control_flow(library: Any, name: str) -> None:
    def func(x: Tensor) -> Tensor:
        if name == "cond":
            return torch.cond(x.sum() > 0, lambda y: y**3, lambda y: y**2, (x,)).sum()
        if name == "while_loop":
            start = torch.tensor(0), torch.ones_like(x)
            return torch.while_loop(lambda i, _: i < 3, lambda i, y: (i + 1, y * x), start)[1].sum()
        return scan(lambda c, row: (c + row**3, c.clone()), torch.zeros(()), x * 1.0)[0]

    assert_close(library.jvp(func, (W,), (X[0],))[1], (3 * W**2 * X[0]).sum(), loose=True)
    assert_close(library.hessian(func)(W), torch.diag(6 * W), loose=True)
