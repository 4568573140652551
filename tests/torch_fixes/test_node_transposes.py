"""Pushforwards through convolutions and norms: dense Jacobians of plain autograd, and which operations they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import autodiff as ad
from autodiff import operators
from autodiff.core import graph
from autodiff.torch_fixes import FIXES
from scenarios import assert_close
from scenarios import difference as difference_with_step

Function: TypeAlias = Callable[..., Tensor]

FIX = next(fix for fix in FIXES if fix.name == "wasteful_transposes")
_generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=_generator)


class Operations(TorchDispatchMode):
    """Counts them, beneath autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    def convolutions(self) -> int:
        return self.counts["convolution"] + self.counts["convolution_backward"]


def convolutions_of(func: Callable[..., Any], *args: Any) -> int:
    with Operations() as operations:
        func(*args)
    return operations.convolutions()


# A function of input, weight and bias, or of some of these; and the most of any one operation that a push may run.
MEAN, VARIANCE = normal(4), normal(4).exp()
CONVOLUTIONS: dict[str, tuple[Function, tuple[Tensor, ...], int]] = {
    "conv1d": (
        lambda x, w, b: functional.conv1d(x, w, b, stride=2, padding=1, groups=2),
        (normal(3, 4, 7), normal(6, 2, 3), normal(6)),
        2,
    ),
    "conv2d": (
        lambda x, w: functional.conv2d(x, w, padding="same", dilation=(1, 2)),
        (normal(2, 3, 5, 6), normal(4, 3, 1, 3)),
        2,
    ),
    "conv2d-of-one": (functional.conv2d, (normal(3, 5, 4), normal(2, 3, 2, 2), normal(2)), 2),
    "conv3d": (functional.conv3d, (normal(2, 2, 4, 3, 3), normal(3, 2, 2, 2, 1), normal(3)), 2),
    "conv_transpose2d": (
        lambda x, w, b: functional.conv_transpose2d(x, w, b, stride=2, output_padding=1, groups=2),
        (normal(2, 4, 3, 2), normal(4, 3, 2, 3), normal(6)),
        2,
    ),
    "weight alone": (lambda w: functional.conv1d(MEAN.view(1, 1, 4), w), (normal(3, 1, 2),), 1),
    "input alone": (lambda x: functional.conv1d(x, MEAN.view(2, 1, 2)), (normal(2, 1, 5),), 1),
    "bias alone": (
        lambda b: functional.conv2d(MEAN.view(1, 1, 2, 2), VARIANCE.view(2, 1, 2, 1), b),
        (normal(2),),
        0,
    ),
}
NORMS: dict[str, tuple[Function, tuple[Tensor, ...], int]] = {
    "layer_norm": (
        lambda x, w, b: functional.layer_norm(x, (4, 3), w, b),
        (normal(2, 4, 3), normal(4, 3), normal(4, 3)),
        7,
    ),
    "layer_norm-plain": (lambda x: functional.layer_norm(x, (3,)), (normal(2, 4, 3),), 7),
    "layer_norm-weight": (lambda w: functional.layer_norm(VARIANCE, (4,), w), (normal(4),), 7),
    "batch_norm": (
        lambda x, w, b: functional.batch_norm(x, MEAN.clone(), VARIANCE.clone(), w, b, training=True),
        (normal(3, 4, 2), normal(4), normal(4)),
        7,
    ),
    "batch_norm-frozen": (
        lambda x, w, b: functional.batch_norm(x, MEAN, VARIANCE, w, b),
        (normal(3, 4, 2), normal(4), normal(4)),
        5,
    ),
    "batch_norm-plain": (
        lambda x: functional.batch_norm(x, None, None, training=True),
        (normal(5, 4),),
        7,
    ),
    "instance_norm": (
        lambda x, w: functional.instance_norm(x, weight=w),
        (normal(2, 4, 3), normal(4)),
        7,
    ),
}
CASES = CONVOLUTIONS | NORMS
difference = partial(difference_with_step, step=2e-3)
each = pytest.mark.parametrize("name", CASES)


def bent(func: Function) -> Function:
    """What reaches the operation is not what the function is given, and its output is not the last."""
    return lambda *primals: func(*(one + one**2 / 4 for one in primals)).sin()


def dense(func: Function, primals: tuple[Tensor, ...]) -> list[Tensor]:
    """Blocks ``[*out, *in]``, row by row."""
    return list(torch.autograd.functional.jacobian(func, primals))


def applied(blocks: list[Tensor], vectors: tuple[Tensor, ...]) -> Tensor:
    return sum(
        (torch.tensordot(block, vector, vector.dim()) for block, vector in zip(blocks, vectors, strict=True)),
        torch.zeros((), dtype=torch.float64),
    )


def directions(primals: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(normal(*one.shape) for one in primals)


@each
def test_products(name: str) -> None:
    """Along all primals and along each alone; a batch of directions; and what is differentiated in the direction."""
    func, primals, _ = CASES[name]
    func, vectors = bent(func), directions(primals)
    blocks = dense(func, primals)
    value, push = ad.linearize(func, *primals)
    expected = applied(blocks, vectors)
    for _ in range(2):
        assert_close(push(*vectors), expected)
        assert not push(*vectors).requires_grad
    for i in range(len(primals)):
        alone = tuple(v if i == j else torch.zeros_like(v) for j, v in enumerate(vectors))
        assert_close(push(*alone), applied(blocks, alone))
        assert_close(
            ad.linearize(lambda one, i=i: func(*primals[:i], one, *primals[i + 1 :]), primals[i])[1](
                vectors[i]
            ),
            applied(blocks, alone),
        )
    batch = tuple(torch.stack([v, 2 * v, v.flip(0)]) for v in vectors)
    assert_close(
        ad.vmap(push)(*batch), torch.stack([applied(blocks, tuple(b[k] for b in batch)) for k in range(3)])
    )
    weights = normal(*value.shape)
    slopes = ad.grad(lambda *v: (push(*v) ** 2 * weights).sum(), tuple(range(len(primals))))(*vectors)
    rows = 2 * weights * expected
    assert_close(list(slopes), [torch.tensordot(rows, block, rows.dim()) for block in blocks])
    others = directions(primals)
    assert_close(ad.jvp(push, vectors, others)[1], applied(blocks, others))


@each
def test_operations_of_a_product(name: str) -> None:
    """By the product rule a convolution takes one for its input and one for its weight."""
    func, primals, most = CASES[name]
    vectors = directions(primals)
    counts = []
    for fixes in (True, False):
        if fixes:
            push = ad.linearize(func, *primals)[1]
        else:
            with FIX.switched_off():
                push = ad.linearize(func, *primals)[1]
        with Operations() as operations:
            push(*vectors)
        counts.append(operations.convolutions() if name in CONVOLUTIONS else max(operations.counts.values()))
    assert counts[0] == most if name in CONVOLUTIONS else counts[0] <= most
    assert counts[1] > counts[0] or name == "bias alone"


def network(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    h = functional.conv1d(x, weight, padding=1)
    return functional.layer_norm(functional.batch_norm(h, None, None, scale, training=True), (5,)).sin()


ARGS = (normal(2, 3, 5), normal(4, 3, 3), normal(4))


@pytest.mark.parametrize("which", range(3))
def test_where_primals_are_tracked(which: int) -> None:
    """The derivative of a push in what the function was evaluated at."""
    vectors, target, move = directions(ARGS), normal(2, 4, 5), normal(*ARGS[which].shape)

    def pushed(one: Tensor) -> Tensor:
        args = (*ARGS[:which], one, *ARGS[which + 1 :])
        return (ad.linearize(network, *args)[1](*vectors) * target).sum()

    expected = difference(pushed, ARGS[which], move)
    one = ARGS[which].clone().requires_grad_()
    (slope,) = torch.autograd.grad(pushed(one), one)
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close((slope * move).sum(), expected, **close)
    torch.testing.assert_close((ad.grad(pushed)(ARGS[which]) * move).sum(), expected, **close)
    torch.testing.assert_close(ad.jvp(pushed, (ARGS[which],), (move,))[1], expected, **close)
    batched = ad.vmap(ad.grad(pushed))(torch.stack([ARGS[which], ARGS[which] + move]))
    torch.testing.assert_close((batched[0] * move).sum(), expected, **close)


def test_captured_parameters_that_require_grad() -> None:
    x, weight, scale = ARGS
    v, move = normal(*x.shape), normal(*weight.shape)
    pushed = lambda weight: ad.linearize(lambda x: network(x, weight, scale), x)[1](v).square().sum()
    parameter = weight.clone().requires_grad_()
    (slope,) = torch.autograd.grad(pushed(parameter), parameter)
    torch.testing.assert_close((slope * move).sum(), difference(pushed, weight, move), rtol=1e-6, atol=1e-6)


def test_operators_and_pullbacks_that_are_differentiated() -> None:
    """What is recorded for pushes leaves the pulls alone."""
    func = lambda weight: network(ARGS[0], weight, ARGS[2])
    (block,) = dense(func, ARGS[1:2])
    A = operators.jacobian(func)(ARGS[1])
    v, u = normal(*ARGS[1].shape), normal(2, 4, 5).requires_grad_()
    assert_close(A @ v, torch.tensordot(block, v, 3))
    pulled = A.H @ u
    assert_close(pulled.detach(), torch.tensordot(u.detach(), block, 3))
    (slope,) = torch.autograd.grad((pulled * v).sum(), u)
    assert_close(slope, torch.tensordot(block, v, 3))
    # First the convolution of the output, and then two products for each of the directions.
    assert convolutions_of(lambda: A @ v) == 1


def test_linearized_gradient() -> None:
    func = lambda weight: (network(ARGS[0], weight, ARGS[2]) ** 3).sum()
    v = normal(*ARGS[1].shape)
    expected = torch.tensordot(torch.autograd.functional.hessian(func, ARGS[1]), v, 3)
    assert_close(ad.linearize(ad.grad(func), ARGS[1])[1](v), expected)
    assert_close(ad.jacobian(ad.linearize(func, ARGS[1])[1])(v), ad.grad(func)(ARGS[1]))


def on_cpu(func: Function, *args: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return func(*args)


def with_hook(func: Function, *args: Tensor) -> Tensor:
    out = func(*args)
    out.register_hook(lambda cotangent: 3 * cotangent)
    return out / 3


SURROUNDED: dict[str, Callable[..., Tensor]] = {
    "checkpoint": lambda func, *args: checkpoint(func, *args, use_reentrant=False),
    "save_on_cpu": on_cpu,
    "autodiff.checkpoint": lambda func, *args: ad.checkpoint(func)(*args),
    "hook on a tensor": with_hook,
}


@pytest.mark.parametrize("name", SURROUNDED)
def test_functions_with_hooks(name: str) -> None:
    vectors = directions(ARGS)
    push = ad.linearize(lambda *args: SURROUNDED[name](network, *args), *ARGS)[1]
    assert_close(push(*vectors), applied(dense(network, ARGS), vectors))


def test_hooks_around_all_of_it() -> None:
    """What a hook of the caller's does to saved tensors counts for these too."""
    vectors = directions(ARGS)
    expected = applied(dense(network, ARGS), vectors)
    with torch.autograd.graph.save_on_cpu():
        push = ad.linearize(network, *ARGS)[1]
    assert_close(push(*vectors), expected)


def test_checkpoint_around_a_linearization() -> None:
    """Its second run saves as many tensors as the first."""
    weight, v, target = normal(4, 3, 3), normal(2, 3, 5), normal(2, 4, 3)
    func = lambda x: functional.conv1d(x, weight).sin()
    scaled = lambda x, fixed: ad.linearize(func, fixed)[1](v) * ad.linearize(func, x)[1](v) * target
    x, fixed, move = (normal(2, 3, 5) for _ in range(3))
    tracked = x.clone().requires_grad_()
    pushed = checkpoint(scaled, tracked, fixed, use_reentrant=False)
    (slope,) = torch.autograd.grad(pushed.sum(), tracked)
    by_values = difference(lambda x: scaled(x, fixed).sum(), x, move)
    torch.testing.assert_close((slope * move).sum(), by_values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["conv1d", "input alone", "layer_norm-plain", "batch_norm-plain"])
def test_hook_on_the_node_itself(name: str) -> None:
    """A hook that changes what the pullback gives is part of the linear map."""
    func, primals, _ = CASES[name]

    def doubled(*primals: Tensor) -> Tensor:
        out = func(*primals)
        assert out.grad_fn is not None
        out.grad_fn.register_hook(lambda own, _: tuple(one if one is None else 2 * one for one in own))
        return out

    vectors = directions(primals)
    assert_close(ad.linearize(doubled, *primals)[1](*vectors), 2 * applied(dense(func, primals), vectors))


@each
def test_linearized_inside_other_transforms(name: str) -> None:
    """There torch's own transposes remain."""
    if name == "batch_norm":
        pytest.skip("writes to buffers that have no batch")
    func, primals, _ = CASES[name]
    func, vectors, others = bent(func), directions(primals), directions(primals)
    expected = torch.stack([applied(dense(func, one), vectors) for one in (primals, others)])
    batch = [torch.stack(pair) for pair in zip(primals, others, strict=True)]
    assert_close(ad.vmap(lambda *args: ad.linearize(func, *args)[1](*vectors))(*batch), expected)
    scaled = lambda factor: ad.linearize(func, *primals)[1](*(factor * v for v in vectors))
    one = torch.ones((), dtype=torch.float64)
    assert_close(ad.jvp(scaled, (one,), (one,))[1], expected[0])
    assert_close(ad.vmap(ad.jacobian(scaled))(torch.ones(2, dtype=torch.float64))[1], expected[0])


def test_own_hooks_are_not_the_users() -> None:
    """A function that linearizes another one registers none: else a gradient of it would make a graph."""
    before = graph.hooks_of_others()
    push = ad.linearize(network, *ARGS)[1]
    assert graph.hooks_of_others() == before
    torch.ones(1, requires_grad=True).register_hook(lambda _: None)
    assert graph.hooks_of_others() == before + 1
    assert push(*ARGS).shape == (2, 4, 5)


def test_writes_after_the_evaluation_are_refused() -> None:
    """As by torch's own nodes."""
    weight = normal(3, 2, 2)
    push = ad.linearize(lambda x: functional.conv1d(x, weight), normal(2, 2, 4))[1]
    weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        push(normal(2, 2, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex128])
def test_other_dtypes(dtype: torch.dtype) -> None:
    func = lambda x, w: functional.conv1d(x, w, padding=1)
    primals, vectors = (
        [one.to(dtype) * (1 + 2j if dtype.is_complex else 1) for one in (normal(2, 3, 5), normal(4, 3, 3))]
        for _ in range(2)
    )
    pushed = ad.linearize(func, *primals)[1](*vectors)
    expected = func(vectors[0], primals[1]) + func(primals[0], vectors[1])
    torch.testing.assert_close(pushed, expected)


def test_norm_in_half_precision() -> None:
    func = lambda x: functional.layer_norm(x, (8,), MEAN.repeat(2).to(x.dtype))
    x, v = normal(3, 8), normal(3, 8)
    pushed = ad.linearize(func, x.bfloat16())[1](v.bfloat16())
    torch.testing.assert_close(pushed, ad.linearize(func, x)[1](v).bfloat16(), rtol=0.05, atol=0.05)


def test_empty_batches_and_inference_mode() -> None:
    weight = normal(3, 2, 2)
    func = functional.conv1d
    assert ad.linearize(func, normal(0, 2, 4), weight)[1](normal(0, 2, 4), weight).shape == (0, 3, 3)
    with torch.inference_mode():
        x, v = normal(2, 2, 4), normal(2, 2, 4)
        pushed = ad.linearize(func, x, weight)[1](v, weight)
        assert_close(pushed, functional.conv1d(v + x, weight))
