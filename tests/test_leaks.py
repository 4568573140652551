"""Nothing is kept of what went through a transform: functions, their captures, modules, autograd Functions, rules."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autodiff as ad
from autodiff import functional
from autodiff.errors import SampleError
from every_transform import EVERY, X

TIMES = 10


class Big:
    """What is captured."""


Made = tuple[Callable[[Tensor], Tensor], list[Any]]


def closure() -> Made:
    big = torch.zeros(100)

    def func(x: Tensor) -> Tensor:
        return (x**3).sum() + big.sum()

    return func, [func, big]


def autograd_function() -> Made:
    big = Big()

    class Cube(torch.autograd.Function):
        generate_vmap_rule = True
        captured = big

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

    return lambda x: Cube.apply(x).sum(), [Cube, big]


def custom_vjp() -> Made:
    big = torch.zeros(100)
    cube = ad.custom_vjp(lambda x: x**3 + big.sum())
    cube.defvjp(lambda x: (x**3 + big.sum(), x), lambda x, c: (3 * x**2 * c,))
    return lambda x: cube(x).sum(), [cube, big]


def custom_jvp() -> Made:
    big = torch.zeros(100)
    cube = ad.custom_jvp(lambda x: x**3 + big.sum())
    cube.defjvps(lambda t, _, x: 3 * x**2 * t)
    return lambda x: cube(x).sum(), [cube, big]


def module() -> Made:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 1, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).pow(2).sum()

    layer = Layer()
    return layer, [layer, Layer, layer.linear.weight]


def checkpointed() -> Made:
    func, kept = closure()
    return ad.checkpoint(func), kept


def raising() -> Made:
    big = torch.zeros(100)

    def func(x: Tensor) -> Tensor:
        y = (x**3).sum() + big.sum()
        raise ValueError(y.shape)

    return func, [func, big]


KINDS = [closure, autograd_function, custom_vjp, custom_jvp, module, checkpointed, raising]
# Classes are in cycles of their own, and so are rules that call their function; others die with the last name for them.
IN_CYCLES = (autograd_function, custom_jvp, module)
TRANSFORMS: dict[str, Callable[[Any, Tensor], Any]] = {
    **{every.name: every.apply for every in EVERY},
    "per_sample": lambda f, x: ad.per_sample(ad.grad(f), chunk_size=1)(torch.stack([x, x])),
    "functional.jacobian": functional.jacobian,
    "functional.hessian": functional.hessian,
    "functional.jvp": lambda f, x: functional.jvp(f, x, x),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_nothing_is_kept(make: Callable[[], Made]) -> None:
    references: dict[str, list[Any]] = {name: [] for name in TRANSFORMS}
    for time in range(TIMES + 1):
        for name, apply in TRANSFORMS.items():
            func, kept = make()
            if time:  # not of the first call, at which torch loads this and that
                references[name] += map(weakref.ref, kept)
            with pytest.raises((ValueError, SampleError)) if make is raising else contextlib.nullcontext():
                apply(func, X)
            del func, kept
    if make in IN_CYCLES:
        gc.collect()
    alive = {name: sum(one() is not None for one in kept) for name, kept in references.items()}
    assert {name: count for name, count in alive.items() if count} == {}
