"""What is timed: a row for each claim, its sides, and the bar that autodiff is to stay under."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.autograd.functional as legacy
import torch.func as torch_func

import autodiff
from autodiff import functional
from benchmarks.problems import chain_of_sin, network, numbers, tiny
from benchmarks.timing import medians

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True)
class Row:
    """One comparison: autodiff is to take at most ``bar`` of what ``against`` takes."""

    name: str
    against: str
    bar: float
    ours: Callable[[], Any]
    theirs: Callable[[], Any]


def rows() -> Iterator[Row]:
    yield from _against_torch_func()
    yield from _against_legacy()
    yield from _per_sample()


def _against_torch_func() -> Iterator[Row]:
    x = numbers(4)
    for name, func, gradient_bar, hessian_bar in (
        ("x sin x, 4 inputs", tiny, 0.5, 0.25),
        ("chain of 100 sin", chain_of_sin, 0.7, 0.6),
    ):
        for transform, bar in (("grad", gradient_bar), ("hessian", hessian_bar)):
            ours, theirs = getattr(autodiff, transform)(func), getattr(torch_func, transform)(func)
            yield _row(f"{transform}, {name}", "torch.func", bar, ours, theirs, x)
    inputs = numbers(64, 32, seed=1)
    model = network(32, 256, 256, 1)

    def height(x: torch.Tensor) -> torch.Tensor:
        return model(x).squeeze()

    ours = autodiff.vmap(autodiff.hessian(height))
    theirs = torch_func.vmap(torch_func.hessian(height))
    yield _row("vmap(hessian), MLP 32-256-256-1, 64 samples", "torch.func", 0.7, ours, theirs, inputs)


def _against_legacy() -> Iterator[Row]:
    x, v = numbers(4), numbers(4, seed=1)
    bars = {
        "x sin x, 4 inputs": (tiny, {"vjp": 1.2, "vhp": 1.2, "jvp": 0.9, "hvp": 0.9}),
        "chain of 100 sin": (chain_of_sin, {"vjp": 1.05, "vhp": 1.05, "jvp": 0.7, "hvp": 0.55}),
    }
    for name, (func, products) in bars.items():
        for product, bar in products.items():
            vector = None if product == "vjp" else v
            ours, theirs = getattr(functional, product), getattr(legacy, product)
            yield _row(
                f"functional.{product}, {name}",
                "torch.autograd.functional",
                bar,
                ours,
                theirs,
                func,
                x,
                vector,
            )
    model, point = network(256, 256, 256), numbers(256, seed=2)

    def energy(x: torch.Tensor) -> torch.Tensor:
        return model(x).square().sum()

    for matrix, func, bar in (("hessian", energy, 0.15), ("jacobian", model, 0.3)):
        ours, theirs = getattr(functional, matrix), getattr(legacy, matrix)
        name = f"functional.{matrix}, MLP of 256 inputs"
        yield _row(name, "torch.autograd.functional", bar, ours, theirs, func, point)


def _row(name: str, against: str, bar: float, ours: Any, theirs: Any, *args: Any) -> Row:
    return Row(name, against, bar, lambda: ours(*args), lambda: theirs(*args))


def _per_sample() -> Iterator[Row]:
    """autodiff.per_sample, which learns its chunk sizes, against torch.func.vmap and against itself."""
    model, inputs = network(32, 256, 256, 1), numbers(64, 32, seed=1)

    def height(x: torch.Tensor) -> torch.Tensor:
        return model(x).squeeze()

    ours: Any = autodiff.per_sample(autodiff.hessian(height))
    theirs = torch_func.vmap(torch_func.hessian(height))
    yield _row("per_sample(hessian), MLP 32-256-256-1, 64 inputs", "torch.func", 0.7, ours, theirs, inputs)

    small = network(8, 16, 16, 1)
    params = {name: param.clone() for name, param in small.named_parameters()}

    def loss(call: Any, params: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (call(small, params, (x,)).squeeze() - y) ** 2

    in_dims = (None, 0, 0)
    function = partial(loss, autodiff.functional_call)
    ours = autodiff.per_sample(autodiff.hessian(function), in_dims)
    theirs = torch_func.vmap(torch_func.hessian(partial(loss, torch_func.functional_call)), in_dims)
    args = params, numbers(64, 8, seed=1), numbers(64, seed=2)
    name = "per_sample(hessian), MLP 8-16-16-1, parameters, 64 samples"
    yield _row(name, "torch.func", 0.65, ours, theirs, *args)

    args = params, numbers(1024, 8, seed=1), numbers(1024, seed=2)
    fixed = {
        size: partial(autodiff.vmap(autodiff.hessian(function), in_dims, chunk_size=size), *args)
        for size in (4, 8, 16, 32, 64, 128, None)
    }
    times = medians(fixed, rounds=3)
    best = min(times, key=times.__getitem__)
    for what, auto in (
        ("vmap", autodiff.vmap(autodiff.hessian(function), in_dims, chunk_size="auto")),
        ("per_sample", ours),
    ):
        name = f"{what}(chunk_size='auto'), the same, 1024 samples"
        yield Row(name, f"chunk_size={best}", 1.1, partial(auto, *args), fixed[best])
