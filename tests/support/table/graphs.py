"""What the function may do, what the recorded graph takes, and what is left behind."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autodiff._torch import DispatchMode
from autodiff.core.memory import Meter
from conftest import state_of_torch
from scenarios import assert_close, difference
from table.row import Section
from table.twice_forward import differed_twice

if TYPE_CHECKING:
    from collections.abc import Callable

    Function = Callable[[Tensor], Tensor]

GRAPHS = Section("What the function may do")
X, W, T = torch.tensor([[0.5, -1.0, 2.0], [1.0, 3.0, -0.5], [1.0, -2.0, 0.25]], dtype=torch.float64)


def cubic(x: Tensor) -> Tensor:
    return (W * x**3).sum()


def checkpointed(x: Tensor) -> Tensor:
    return checkpoint(cubic, x, use_reentrant=False)


def on_cpu(x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return cubic(x)


class OldCubic(torch.autograd.Function):
    """An autograd Function without setup_context, as all were before torch 2.0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return cubic(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * W * x**2 * cotangent


TRANSFORMS = {"grad": 3 * W * X**2, "jacrev": 3 * W * X**2, "hessian": torch.diag(6 * W * X)}


def by_transform(funcs: dict[str, Function]) -> dict[str, Any]:
    return {
        f"{name}-{transform}": (func, transform)
        for (name, func), transform in itertools.product(funcs.items(), TRANSFORMS)
    }


@GRAPHS.row(
    "`torch.utils.checkpoint`, `save_on_cpu` inside `grad`, `jacrev`, `hessian`",
    torch="RuntimeError",
    fails="RuntimeError: (torch.func.*saved tensor hooks|You tried to vmap over _NoopSaveInputs)",
    ours="right where no other transform is active",
    over=by_transform({"checkpoint": checkpointed, "save_on_cpu": on_cpu}),
    issue="pytorch#122729",
)
def saved_tensor_hooks(library: Any, case: tuple[Function, str]) -> None:
    func, transform = case
    assert_close(getattr(library, transform)(func)(X), TRANSFORMS[transform])


def checkpoint_of(library: Any) -> Any:
    """torch's works eagerly alone."""
    if hasattr(library, "checkpoint"):
        return library.checkpoint
    return lambda func: lambda x: checkpoint(func, x, use_reentrant=False)


@GRAPHS.row(
    "`checkpoint(func)` inside `vmap(grad)`, `vmap(hessian)`, and a `jvp` of `grad`",
    torch="RuntimeError (`torch.utils.checkpoint`)",
    fails="(RuntimeError: |NotImplementedError: You must implement the jvp)",
    ours="right, captured tensors and random numbers included",
    over={
        "vmap-grad": (lambda library, f: library.vmap(library.grad(f))(X[None])[0], 3 * W * X**2),
        "vmap-hessian": (
            lambda library, f: library.vmap(library.hessian(f))(X[None])[0],
            torch.diag(6 * W * X),
        ),
        "jvp-grad": (lambda library, f: library.jvp(library.grad(f), (X,), (T,))[1], 6 * W * X * T),
    },
    issue="pytorch#141845",
)
def checkpoint_inside_other_transforms(library: Any, case: tuple[Any, Tensor]) -> None:
    derivative, expected = case
    assert_close(derivative(library, checkpoint_of(library)(cubic)), expected)


LAYER = nn.Linear(3, 3, dtype=torch.float64)
with torch.no_grad():
    LAYER.weight.copy_(torch.tensor([[1.0, 2.0, 0.5], [-1.0, 3.0, 1.0], [2.0, 0.0, -1.5]]))
    LAYER.bias.copy_(T)


@GRAPHS.row(
    "`torch.utils.checkpoint` of a linear layer for one sample inside `jacrev`, whose pull runs it again under `vmap`",
    torch="RuntimeError",
    fails="RuntimeError: torch.func.*saved tensor hooks",
    ours="right, also for `functional.jacobian` and Hessians",
)
def batched_pulls_of_checkpoints(library: Any) -> None:
    jacobian = library.jacrev(lambda x: checkpoint(LAYER, x, use_reentrant=False) ** 2)(X)
    assert_close(jacobian, 2 * (LAYER.weight.detach() @ X + T)[:, None] * LAYER.weight.detach())


@GRAPHS.row(
    "an autograd Function without `setup_context` inside `grad`, `jacrev`, `hessian`",
    torch="RuntimeError",
    fails="RuntimeError: .*setup_context",
    ours="right outside other transforms",
    over=by_transform({"Function": OldCubic.apply}),
    issue="pytorch#87222",
)
def old_style_function(library: Any, case: tuple[Function, str]) -> None:
    saved_tensor_hooks(library, case)


# Derivatives along a direction, and the same from values alone.
ALONG = {
    "grad": (lambda library, func, x, t: (library.grad(func)(x) * t).sum(), difference),
    "jvp": (lambda library, func, x, t: library.jvp(func, (x,), (t,))[1], difference),
    "hessian": (
        lambda library, func, x, t: torch.einsum("ij,ijkl,kl->", t, library.hessian(func)(x), t),
        differed_twice,
    ),
}
BATCH, DIRECTIONS = torch.stack([X, W, T, X * T, W - X]), torch.stack([T, X, W, X, T])


def normed_by_hand(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return ((centred / ((centred**2).mean(0) + 1e-5).sqrt()) ** 3).sum()


@GRAPHS.row(
    "BatchNorm in training mode inside `grad`, `jvp`, `hessian`",
    torch="RuntimeError: its buffers are written in place",
    fails="RuntimeError: .*in-place operation",
    ours="right outside other transforms, the buffers updated",
    over=ALONG,
    issue="pytorch#85533",
)
def batch_norm_in_training_mode(library: Any, case: tuple[Any, Any]) -> None:
    derivative, reference = case
    module = nn.BatchNorm1d(3).double()
    result = derivative(library, lambda x: (module(x) ** 3).sum(), BATCH, DIRECTIONS)
    expected = reference(normed_by_hand, BATCH, DIRECTIONS)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    assert_close([module.running_mean, module.running_var], [0.1 * BATCH.mean(0), 0.9 + 0.1 * BATCH.var(0)])


BUFFERS: dict[str, Any] = {
    "torch": "RuntimeError: its buffers are written in place",
    "fails": "RuntimeError: .*in-place",
    "ours": "right with `return_buffers=True`: each sample's updated buffers are returned, nothing is written",
    "issue": "functorch#986",
}


@GRAPHS.row(
    "BatchNorm in training mode by `functional_call`, inside `vmap(grad)` and `vmap` of `jvp`",
    over={name: ALONG[name] for name in ("grad", "jvp")},
    **BUFFERS,
)
def batch_norm_returns_its_buffers(library: Any, case: tuple[Any, Any]) -> None:
    derivative, reference = case
    module = nn.BatchNorm1d(3).double()
    options = {"return_buffers": True} if hasattr(library, "per_sample") else {}

    def run(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        result = library.functional_call(module, {}, (x,), **options)
        output, buffers = result if options else (result, {})
        return (output**3).sum(), buffers

    samples = torch.stack([BATCH, DIRECTIONS])
    result = library.vmap(lambda x, t: derivative(library, lambda x: run(x)[0], x, t))(
        samples, samples.flip(0)
    )
    expected = [reference(normed_by_hand, x, t) for x, t in zip(samples, samples.flip(0), strict=True)]
    torch.testing.assert_close(result, torch.stack(expected), rtol=1e-6, atol=1e-6)
    updated = library.vmap(run)(samples)[1]
    assert_close(updated["running_mean"], 0.1 * samples.mean(1))
    assert_close(updated["running_var"], 0.9 + 0.1 * samples.var(1))
    assert_close(module.running_mean, torch.zeros_like(X))


@GRAPHS.row(
    "the same inside `vmap(hessian)`",
    untrue=(
        "2.15",
        'torch\'s second derivative raises "accessing `data` under vmap transform" where a weight requires grad',
    ),
    **BUFFERS,
)
def batch_norm_returns_its_buffers_at_second_order(library: Any) -> None:
    batch_norm_returns_its_buffers(library, ALONG["hessian"])


@GRAPHS.row(
    "peak memory of `grad` on a chain of sin and cos",
    torch="at least 1.5 times that of autograd: the graph of the gradient is always made",
    fails="AssertionError: grad takes (1[.][5-9]|[2-9])",
    ours="at most 1.1 times that of autograd",
    issue="pytorch#134612",
)
def peak_memory_of_grad(library: Any) -> None:
    x = torch.randn(64, 64)

    def func(x: Tensor) -> Tensor:
        for _ in range(8):
            x = x.sin().cos()
        return x.sum()

    def by_autograd() -> None:
        y = x.clone().requires_grad_()
        torch.autograd.grad(func(y), y)

    ratio = peak(lambda: library.grad(func)(x)) / peak(by_autograd)
    assert ratio < 1.1, f"grad takes {ratio:.2f} times the memory of autograd"


def peak(compute: Callable[[], object]) -> int:
    with Meter(torch.device("cpu")) as meter:
        compute()
    return meter.peak


# A scalar of a scalar function's derivative.
WRAPPERS: dict[str, Callable[[Any, Function, Tensor], Tensor]] = {
    "grad": lambda library, func, x: library.grad(func)(x).sum(),
    "jvp": lambda library, func, x: library.jvp(func, (x,), (T,))[1],
    "linearize": lambda library, func, x: library.linearize(func, x)[1](T),
    "vmap": lambda library, func, x: library.vmap(func)(torch.stack([x, x])).sum(),
    "jacrev": lambda library, func, x: library.jacrev(func)(x).sum(),
    "jacfwd": lambda library, func, x: library.jacfwd(func)(x).sum(),
    "hessian": lambda library, func, x: library.hessian(func)(x).sum(),
}


@GRAPHS.row(
    "an exception inside the function, whatever is nested in what",
    torch="nothing is left behind",
    fails=None,
    ours="nothing is left behind",
    over={f"{outer}-{inner}": (outer, inner) for outer, inner in itertools.product(WRAPPERS, repeat=2)},
)
def exception_inside(library: Any, names: tuple[str, str]) -> None:
    outer, inner = names
    before = state_of_torch()

    def raising(x: Tensor) -> Tensor:
        cubic(x)
        raise ValueError("inside")

    try:
        WRAPPERS[outer](library, lambda x: WRAPPERS[inner](library, raising, x), X)
    except ValueError:
        assert state_of_torch() == before, "something is left behind"
    else:
        raise AssertionError("the exception is lost")


@GRAPHS.row(
    '`jacrev(chunk_size="auto")`, which measures memory, of a product with a tangent of zeros',
    torch="ValueError: there are no chunks that are learnt",
    fails="ValueError|RuntimeError|TypeError|AssertionError",
    ours="right",
    alone=(),
)
def measured_zeros(library: Any) -> None:
    one, x = torch.ones(2), torch.tensor([0.5, 0.2])

    def slope(y: Tensor) -> Tensor:
        return library.jvp(torch.tanh, (y,), (one,))[1].sum()

    def product(x: Tensor) -> Tensor:
        return library.grad(lambda x: library.jvp(slope, (x,), (one,))[1])(x)

    # tanh'' = -2 tanh (1 - tanh^2), differentiated twice more.
    y = x.tanh()
    fourth = 8 * y * (1 - y**2) * (2 - 3 * y**2)
    hessian = library.jacrev(product, chunk_size="auto")(x)
    torch.testing.assert_close(hessian, torch.diag(fourth), rtol=1e-4, atol=1e-4)


def normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, (3,), weight, bias)


def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.conv1d(x.view(1, 1, 3), weight.view(1, 1, 3), bias[:1], padding=1)


class Operations(DispatchMode):
    """How often each runs, beneath autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@GRAPHS.row(
    "a pushforward of `linearize` through convolutions and norms",
    torch="no needless gradients",
    fails=None,
    ours="no needless gradients",
    over={
        "convolution": (convolved, ("convolution",), 3),
        "layer_norm": (normed, ("mul", "sum", "mean"), 18),
        "batch_norm": (
            lambda x, *affine: nn.functional.batch_norm(x.outer(x), None, None, *affine, training=True),
            ("mul", "sum", "mean"),
            18,
        ),
    },
)
def linearize_computes_nothing_else(library: Any, case: tuple[Any, tuple[str, ...], int]) -> None:
    func, counted, most = case
    _, pushforward = library.linearize(func, X, W, T)
    with Operations() as operations:
        pushforward(W, T, X)
    assert sum(operations.counts[name] for name in counted) <= most
