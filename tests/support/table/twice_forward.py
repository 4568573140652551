"""Second derivatives in which forward mode takes part, against closed forms and difference quotients."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from matrix_functions import CASES, MATRICES, Case
from scenarios import assert_close, difference
from table.row import NO_FORWARD, WRONG, Section

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


@TWICE.row(
    "`jvp` of `jvp` through a distance of triplet_margin_with_distance_loss that has a layer_norm",
    torch="wrong numbers",
    fails=WRONG,
    ours="right",
)
def jvp_of_jvp_inside_a_triplet_loss(library: Any) -> None:
    anchor, positive, negative = _normal(3, 2, 4).unbind(0)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        return ((functional.layer_norm(x, (4,)) - y) ** 2).sum(-1)

    def func(x: Tensor) -> Tensor:
        return functional.triplet_margin_with_distance_loss(
            x, positive, negative, distance_function=distance, margin=20.0
        )

    jvp_of_jvp_of_normalisations(library, (func, anchor))


@TWICE.row(
    "third derivatives of layer_norm, instance_norm, batch_norm in pure reverse mode",
    torch="wrong numbers: mean and deviation are taken for constants",
    fails=WRONG,
    ours="right",
    over=NORMALISED,
)
def third_derivatives_of_normalisations(library: Any, case: tuple[Function, Tensor]) -> None:
    func, x = case
    t = x.flip(0).cos()
    scalar = lambda x: (func(x) ** 3).sum()
    for _ in range(3):
        scalar = lambda x, scalar=scalar: (library.grad(scalar)(x) * t).sum()
    expected = difference(lambda x: differed_twice(lambda x: (func(x) ** 3).sum(), x, t), x, t)
    torch.testing.assert_close(scalar(x), expected, rtol=1e-5, atol=1e-5)


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


@TWICE.row(
    "`vmap(jacfwd(grad(f)))` through eigvals", torch="wrong numbers", fails=WRONG, ours="right", mended="2.15"
)
def forward_over_reverse_of_eigenvalues_per_sample(library: Any) -> None:
    # The sum of their cubes is the trace of A^3, whose gradient is 3 A^2, transposed.
    func = lambda a: (torch.linalg.eigvals(a) ** 3).sum().real
    a, t = _normal(2, 3, 3), _normal(3, 3)
    hessians = library.vmap(library.jacfwd(library.grad(func)))(a)
    assert_close(torch.tensordot(hessians, t, 2), 3 * (t @ a + a @ t).mT)


LOSSES: dict[str, tuple[Function, Function]] = {
    # Each with its second derivative.
    "huber_loss": (
        lambda x: functional.huber_loss(x, torch.zeros_like(x), reduction="sum"),
        lambda x: (x.abs() < 1).to(x),
    ),
    "hardsigmoid": (lambda x: (functional.hardsigmoid(x) ** 2).sum(), lambda x: (x.abs() < 3).to(x) / 18),
    "soft_margin_loss": (
        lambda x: functional.soft_margin_loss(x, torch.ones_like(x), reduction="sum"),
        lambda x: x.sigmoid() * (1 - x.sigmoid()),
    ),
}


@TWICE.row(
    "`jvp(grad(f))` and `grad` of `jvp` through huber_loss, hardsigmoid, soft_margin_loss",
    torch="NotImplementedError",
    fails=NO_FORWARD,
    ours="right",
    over=LOSSES,
)
def both_combinations_of_losses_and_activations(library: Any, case: tuple[Function, Function]) -> None:
    func, second = case
    x, t = torch.tensor([0.3, -0.6, 1.7, 3.5], dtype=torch.float64), _normal(4)
    assert_close(library.jvp(library.grad(func), (x,), (t,))[1], second(x) * t)
    assert_close(library.grad(lambda x: library.jvp(func, (x,), (t,))[1])(x), second(x) * t)


@TWICE.row(
    "`grad` of `jvp` through glu", torch="RuntimeError", fails="RuntimeError: .*glu_jvp is not", ours="right"
)
def reverse_over_forward_of_glu(library: Any) -> None:
    x, t = _normal(2, 4).unbind(0)
    slope = library.grad(
        lambda x: library.jvp(lambda x: functional.glu(torch.cat([torch.ones_like(x), x])).sum(), (x,), (t,))[
            1
        ]
    )
    y = x.sigmoid()
    assert_close(slope(x), y * (1 - y) * (1 - 2 * y) * t)


@TWICE.row(
    "Hessians of layer_norm per sample",
    torch="right",
    fails=None,
    ours="right",
)
def hessians_of_layer_norm_per_sample(library: Any) -> None:
    func = lambda x: (functional.layer_norm(x, (3,)) * torch.tensor([1.0, 2.0, -1.0])).sum()
    rows, t = torch.tensor([[0.3, -1.2, 0.8], [1.5, 0.1, -0.4]], dtype=torch.float64), IMAGE[0, 0, :3]
    hessians = library.vmap(library.jacrev(library.jacrev(func)))(rows)
    expected = torch.stack([differed_twice(func, row, t) for row in rows])
    torch.testing.assert_close(hessians @ t @ t, expected, rtol=1e-6, atol=1e-6)


SIDES = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
WRITING: dict[str, tuple[Function, Function]] = {
    # Each with its second derivative.
    "mvlgamma": (
        lambda x: torch.mvlgamma(x + 4, 2).sum(),
        lambda x: torch.polygamma(1, x + 4) + torch.polygamma(1, x + 3.5),
    ),
    "hinge_embedding_loss": (
        lambda x: functional.hinge_embedding_loss(x, SIDES, reduction="none").square().sum(),
        lambda x: 2 * ((SIDES == 1) | (x < 1)).to(x),
    ),
}


@TWICE.row(
    "`vmap(jacfwd(grad(f)))` through mvlgamma, hinge_embedding_loss",
    torch="right",
    fails=None,
    ours="right",
    over=WRITING,
)
def hessians_by_columns_per_sample(library: Any, case: tuple[Function, Function]) -> None:
    func, second = case
    x = torch.tensor([[0.3, -0.6, 1.7, 3.5], [1.2, 0.4, -0.3, 2.0]], dtype=torch.float64)
    hessians = library.vmap(library.jacfwd(library.grad(func)))(x)
    assert_close(hessians, torch.diag_embed(second(x)))


@TWICE.row(
    "`jvp` of a gradient of silu, mish, group_norm that is taken without grad mode",
    torch="right",
    fails=None,
    ours="right",
    over={
        "silu": functional.silu,
        "mish": functional.mish,
        "group_norm": lambda x: functional.group_norm(x.view(1, 2, 2), 1),
    },
)
def jvp_of_gradients_without_grad_mode(library: Any, func: Function) -> None:
    scalar = lambda x: (func(x) ** 3).sum()
    x = torch.tensor([0.3, -1.2, 0.8, 2.1], dtype=torch.float64)
    t = x.flip(0).cos()

    def slope(x: Tensor) -> Tensor:
        with torch.no_grad():
            return library.grad(scalar)(x)

    expected = difference(library.grad(scalar), x, t)
    torch.testing.assert_close(library.jvp(slope, (x,), (t,))[1], expected, rtol=1e-6, atol=1e-6)
