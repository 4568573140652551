"""Row 10: large tensors, where memory decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.autograd.functional as legacy

from benchmarks import by_hand
from benchmarks.rows.dense import perceptron
from benchmarks.rows.row import BY_HAND, FUNCTIONAL, Row, Side, of_autodiff, transformed

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.rows.row import Place, Sides


def waves(x: Tensor) -> Tensor:
    for step in range(20):
        x = x.sin() if step % 2 else x.cos()
    return x.sum()


def _gradient(place: Place) -> Sides:
    x = place.numbers(1024, 1024)
    return {
        **transformed(place, lambda library: library.grad(waves), x),
        BY_HAND: Side(by_hand.gradient, (waves, x)),
    }


def _gradients(place: Place) -> Sides:
    x = place.numbers(4, 512, 512)
    return {
        **transformed(place, lambda library: library.vmap(library.grad(waves)), x),
        BY_HAND: Side(by_hand.gradient, (waves, x)),
    }


def _matrix(place: Place, name: str) -> Sides:
    """A matrix of a network of 256 inputs by autodiff.functional and its model."""
    model, x = place.put(perceptron(256, 256, 256)), place.numbers(256, seed=2)

    def energy(x: Tensor) -> Tensor:
        return model(x).square().sum()

    func = energy if name == "hessian" else model
    return {
        **of_autodiff(place, lambda library: getattr(library.functional, name), func, x),
        FUNCTIONAL: Side(getattr(legacy, name), (func, x)),
        BY_HAND: Side(getattr(by_hand, name), (func, x)),
    }


def _of_many_samples(place: Place) -> Sides:
    inputs, weights = place.numbers(4096, 20), place.numbers(402, seed=1) / 10

    def loss(w: Tensor) -> Tensor:
        hidden = (inputs @ w[:380].view(20, 19)).tanh()
        return (hidden @ w[380:399].view(19, 1) + w[399]).sin().square().mean() + w[400:].square().sum()

    return {
        **of_autodiff(place, lambda library: library.functional.hessian, loss, weights),
        FUNCTIONAL: Side(legacy.hessian, (loss, weights)),
        BY_HAND: Side(by_hand.hessian_row_by_row, (loss, weights)),
    }


ROWS = [
    Row("gradient, 20 sin and cos of 1024 x 1024", 10, _gradient, short=True, compiles=()),
    Row("gradients, 20 sin and cos of 4 x 512 x 512", 10, _gradients, short=True, compiles=()),
    Row(
        "functional.hessian, MLP of 256 inputs", 10, lambda p: _matrix(p, "hessian"), short=True, compiles=()
    ),
    Row(
        "functional.jacobian, MLP of 256 inputs",
        10,
        lambda p: _matrix(p, "jacobian"),
        short=True,
        compiles=(),
    ),
    Row("functional.hessian, 402 parameters, 4096 samples", 10, _of_many_samples, short=True, compiles=()),
]
