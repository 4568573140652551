"""Second derivatives in which forward mode takes part, against closed forms and difference quotients."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from matrix_functions import CASES, MATRICES, Case
from scenarios import assert_close, difference
from table.row import WRONG, Section

if TYPE_CHECKING:
    from collections.abc import Callable

    Function = Callable[[Tensor], Tensor]

TWICE = Section("Forward mode in batches and at second order")
SOLVING = {name: CASES[name] for name in ("slogdet", "det", "logdet", "solve")}
_generator = torch.Generator().manual_seed(3)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=_generator)


@TWICE.row(
    "`vmap(jacfwd(f))` through slogdet, det, logdet, solve",
    torch="wrong numbers",
    fails=WRONG,
    ours="right",
    over=SOLVING,
    mended="2.15",
)
def jacfwd_of_solvers_per_sample(library: Any, case: Case) -> None:
    expected = torch.stack([case.gradient(a) for a in MATRICES])
    assert_close(library.vmap(library.jacfwd(case.func))(MATRICES), expected)


ORDERS = [("jacfwd", "jacrev"), ("jacrev", "jacfwd"), ("jacfwd", "jacfwd")]


@TWICE.row(
    "`vmap` of Hessians with a forward mode in them (`torch.func.hessian` has one), the same operations",
    torch="wrong numbers",
    fails=WRONG,
    ours="right",
    over={
        f"{outer}-{inner}-{name}": (outer, inner, case)
        for (outer, inner), (name, case) in itertools.product(ORDERS, SOLVING.items())
    },
    mended="2.15",
)
def hessians_of_solvers_per_sample(library: Any, case: tuple[str, str, Case]) -> None:
    outer, inner, (func, _, hessian) = case
    expected = torch.stack([hessian(a) for a in MATRICES])
    transform = getattr(library, outer)(getattr(library, inner)(func))
    assert_close(library.vmap(transform)(MATRICES), expected)


@TWICE.row(
    "`jvp` of `jvp` through slogdet, det, logdet, solve",
    torch="wrong numbers",
    fails=WRONG,
    ours="right",
    over=SOLVING,
    mended="2.15",
)
def jvp_of_jvp_of_solvers(library: Any, case: Case) -> None:
    a, t = MATRICES
    expected = torch.einsum("ijkl,ij,kl->", case.hessian(a), t, t)
    assert_close(pushed_twice(library, case.func, a, t), expected)


def pushed_twice(library: Any, func: Function, x: Tensor, t: Tensor) -> Tensor:
    return library.jvp(lambda x: library.jvp(func, (x,), (t,))[1], (x,), (t,))[1]


def differed_twice(func: Function, x: Tensor, t: Tensor) -> Tensor:
    """The same from values alone; the error is about 1e-10."""
    return difference(lambda x: difference(func, x, t), x, t)


A, SIDE, IMAGE = MATRICES[0], _normal(3, 2), _normal(2, 3, 4)
NORMALISED: dict[str, tuple[Function, Tensor]] = {
    "layer_norm": (lambda x: functional.layer_norm(x, (4,)), IMAGE),
    "instance_norm": (functional.instance_norm, IMAGE),
    "batch_norm": (lambda x: functional.batch_norm(x, None, None, training=True), IMAGE),
}


@TWICE.row(
    "`jvp` of `jvp` through layer_norm, instance_norm, batch_norm",
    torch="wrong numbers: mean and deviation are taken for constants",
    fails=WRONG,
    ours="right",
    over=NORMALISED,
)
def jvp_of_jvp_of_normalisations(library: Any, case: tuple[Function, Tensor]) -> None:
    func, x = case
    t = x.flip(0).cos()
    expected = differed_twice(func, x, t)
    torch.testing.assert_close(pushed_twice(library, func, x, t), expected, rtol=1e-6, atol=1e-6)


SAVING: dict[str, tuple[Function, Tensor]] = {
    "triangular_solve": (lambda a: torch.triangular_solve(SIDE, a).solution, A),
    "cumprod": (lambda a: (a - A[0, 0]).cumprod(0), A),
    "cholesky_inverse": (lambda a: torch.cholesky_inverse(a.tril()), A),
    "householder_product": (lambda a: torch.linalg.householder_product(a / 5, a[0] / 5), A),
}


@TWICE.row(
    "`jvp` of `jvp` through triangular_solve, cumprod with a zero, cholesky_inverse, householder_product",
    torch="wrong numbers",
    fails=WRONG,
    ours="right",
    over=SAVING,
)
def jvp_of_jvp_of_other_operations(library: Any, case: tuple[Function, Tensor]) -> None:
    jvp_of_jvp_of_normalisations(library, case)


class Cube(torch.autograd.Function):
    """x^3 with rules for both modes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * cotangent

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * tangent


@TWICE.row(
    "`jacfwd` of `jacfwd` through an autograd Function with a `jvp` of its own",
    torch="zeros",
    fails=WRONG,
    ours="right, or an error where the Function keeps an intermediate value",
    issue="pytorch#197867",
)
def jacfwd_of_jacfwd_of_a_function(library: Any) -> None:
    x = torch.tensor(2.0, dtype=torch.float64)
    assert_close(library.jacfwd(library.jacfwd(Cube.apply))(x), 6 * x)


@TWICE.row(
    "`jvp(grad(mse_loss))`",
    torch='"ZeroTensors are immutable"',
    fails="RuntimeError: ZeroTensors are immutable",
    ours="right",
    issue="pytorch PR#197723",
)
def forward_over_reverse_of_mse_loss(library: Any) -> None:
    x, y, t = _normal(3, 4, 2).unbind(0)
    product = library.jvp(library.grad(lambda x: functional.mse_loss(x, y)), (x,), (t,))[1]
    assert_close(product, 2 * t / x.numel())


@TWICE.row(
    "`linearize` inside `grad`",
    torch="garbage that changes from call to call",
    fails=WRONG,
    ours="right",
)
def linearize_inside_grad(library: Any) -> None:
    x, t = _normal(2, 3).unbind(0)
    slope = library.grad(lambda x: library.linearize(torch.sin, x)[1](t).sum())(x)
    assert_close(slope, -x.sin() * t)
