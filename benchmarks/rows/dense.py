"""Rows 3, 4 and 7: multilayer perceptrons, where matrix products decide."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.autograd.functional as legacy
from torch import Tensor, nn
from torch.autograd import grad

from benchmarks import by_hand
from benchmarks.rows.row import (
    BY_HAND,
    FUNCTIONAL,
    JAX,
    OfJax,
    Row,
    Side,
    transformed,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.rows.row import Place, Sides


def perceptron(*widths: int) -> Callable[[], nn.Module]:
    """A multilayer perceptron with tanh between its layers."""

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    return make


def _samplewise(library: Any, in_chunks: bool) -> Any:
    """What runs a function over samples: vmap, or of autodiff per_sample, which learns the size of its chunks."""
    return library.per_sample if in_chunks and library is not torch.func else library.vmap


def input_hessians(place: Place, samples: int, *widths: int, in_chunks: bool = False) -> Sides:
    """The Hessian of a network's value in its inputs, for each sample."""
    model, x = place.put(perceptron(*widths)), place.numbers(samples, widths[0], seed=1)

    def height(x: Tensor) -> Tensor:
        return model(x).squeeze(-1)

    return {
        **transformed(place, lambda library: _samplewise(library, in_chunks)(library.hessian(height)), x),
        BY_HAND: Side(by_hand.hessians_of_samples, (height, x)),
        JAX: OfJax("hessian_of_samples", "perceptron", (x, list(model.parameters()))),
    }


def _error(model: nn.Module, call: Any) -> Callable[..., Tensor]:
    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (call(model, params, (x,)).squeeze(-1) - y).square().mean()

    return loss


def _errors_by_hand(params: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The same loss of parameters with or without a leading dimension for samples, summed over these."""
    *hidden, weight, bias = params
    x = x.unsqueeze(-2)
    for hidden_weight, hidden_bias in zip(hidden[::2], hidden[1::2], strict=True):
        x = (x @ hidden_weight.mT + hidden_bias.unsqueeze(-2)).tanh()
    return ((x @ weight.mT + bias.unsqueeze(-2)).flatten() - y.flatten()).square().sum()


def parameter_hessians(place: Place, samples: int = 64, *, in_chunks: bool = False) -> Sides:
    """The Hessian of each sample's loss in all parameters."""
    model = place.put(perceptron(8, 16, 16, 1))
    params = dict(model.named_parameters())
    x, y = place.numbers(samples, 8, seed=1), place.numbers(samples, seed=2)

    def of(library: Any) -> Callable[..., Any]:
        hessian = library.hessian(_error(model, library.functional_call))
        return _samplewise(library, in_chunks)(hessian, (None, 0, 0))

    def by_expanding(params: dict[str, Tensor], x: Tensor, y: Tensor) -> list[list[Tensor]]:
        """Every sample has parameters of its own, and the losses are summed."""
        leaves = [p.expand(len(x), *p.shape).detach().requires_grad_() for p in params.values()]
        gradients = grad(_errors_by_hand(leaves, x, y), leaves, create_graph=True)
        blocks = []
        for gradient in gradients:
            size, samples = gradient[0].numel(), len(x)
            eye = torch.eye(size, dtype=x.dtype, device=x.device)
            basis = eye.view(size, 1, *gradient[0].shape).expand(size, samples, *gradient[0].shape)
            rows = grad(gradient, leaves, basis, is_grads_batched=True, retain_graph=True)
            blocks.append(
                [row.transpose(0, 1).reshape(samples, *gradient[0].shape, *row.shape[2:]) for row in rows]
            )
        return blocks

    return {
        **transformed(place, of, params, x, y),
        BY_HAND: Side(by_expanding, (params, x, y)),
        JAX: OfJax("hessian_of_samples", "error_of_perceptron", (list(params.values()), x, y)),
    }


def _hessian_of_a_batch(place: Place) -> Sides:
    """The Hessian of a batch's mean loss in all parameters."""
    model = place.put(perceptron(8, 16, 16, 1))
    params = dict(model.named_parameters())
    x, y = place.numbers(64, 8, seed=1), place.numbers(64, seed=2)

    def of_leaves(leaves: Sequence[Tensor]) -> Tensor:
        named = dict(zip(params, leaves, strict=True))
        return _error(model, torch.func.functional_call)(named, x, y)

    return {
        **transformed(
            place, lambda library: library.hessian(_error(model, library.functional_call)), params, x, y
        ),
        FUNCTIONAL: Side(legacy.hessian, (lambda *leaves: of_leaves(leaves), tuple(params.values()))),
        BY_HAND: Side(by_hand.hessian_blocks, (of_leaves, tuple(params.values()))),
        JAX: OfJax("hessian", "error_of_perceptron", (list(params.values()), x, y)),
    }


def _informed_step(place: Place) -> Sides:
    """The gradient of the mean squared Laplacian in the parameters: a step of physics-informed training."""
    model = place.put(perceptron(2, 64, 64, 1))
    params, x = dict(model.named_parameters()), place.numbers(4096, 2, seed=1)

    def of(library: Any) -> Callable[..., Any]:
        def residual(params: dict[str, Tensor], x: Tensor) -> Tensor:
            def height(x: Tensor) -> Tensor:
                return library.functional_call(model, params, (x,)).squeeze(-1)

            hessians = library.vmap(library.hessian(height))(x)
            return hessians.diagonal(dim1=-2, dim2=-1).sum(-1).square().mean()

        return library.grad(residual)

    def step(params: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
        leaves, x = by_hand.watched(tuple(params.values())), x.detach().requires_grad_()
        heights = torch.func.functional_call(model, dict(zip(params, leaves, strict=True)), (x,))
        (slopes,) = grad(heights.sum(), x, create_graph=True)
        laplacian = sum(
            grad(slopes[:, at].sum(), x, create_graph=True)[0][:, at] for at in range(x.shape[-1])
        )
        return grad(laplacian.square().mean(), leaves, allow_unused=True, materialize_grads=True)

    return {
        **transformed(place, of, params, x),
        BY_HAND: Side(step, (params, x)),
        JAX: OfJax("grad", "squared_laplacian", (list(params.values()), x)),
    }


ROWS = [
    Row(
        "input Hessians, MLP 32-256-256-1, 64 samples",
        3,
        lambda place: input_hessians(place, 64, 32, 256, 256, 1),
        short=True,
    ),
    Row(
        "input Hessians, 8 layers of 512, 64 inputs, 64 samples",
        3,
        lambda place: input_hessians(place, 64, 64, *[512] * 7, 1),
    ),
    Row("parameter Hessians, MLP 8-16-16-1, 64 samples", 4, parameter_hessians, short=True),
    Row("parameter Hessian of a batch, MLP 8-16-16-1", 4, _hessian_of_a_batch, short=True),
    Row(
        "second derivatives, MLP 2-64-64-1, 4096 points",
        7,
        lambda place: input_hessians(place, 4096, 2, 64, 64, 1),
        short=True,
    ),
    Row("a training step through them", 7, _informed_step, short=True),
    Row(
        "per_sample of input Hessians, MLP 32-256-256-1, 64 samples",
        11,
        lambda place: input_hessians(place, 64, 32, 256, 256, 1, in_chunks=True),
        short=True,
        compiles=(),
    ),
    Row(
        "per_sample of parameter Hessians, MLP 8-16-16-1, 64 samples",
        11,
        lambda place: parameter_hessians(place, in_chunks=True),
        short=True,
        compiles=(),
    ),
]
