"""Rows 5 and 6: a transformer's encoder layer and a small convolutional network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.autograd.functional as legacy
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import by_hand
from benchmarks.rows.row import (
    BY_HAND,
    FUNCTIONAL,
    JAX,
    TORCH_FUNC,
    OfJax,
    Row,
    Side,
    of_autodiff,
    transformed,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.rows.row import Place, Sides

Params = dict[str, Tensor]


def _encoder(place: Place) -> tuple[nn.Module, Params]:
    model = place.put(lambda: nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True))
    return model, dict(model.named_parameters())


def _height(model: nn.Module, call: Any) -> Callable[[Params, Tensor], Tensor]:
    def height(params: Params, x: Tensor) -> Tensor:
        return call(model, params, (x,)).sin().mean()

    return height


def _of_leaves(model: nn.Module, params: Params, x: Tensor) -> Callable[[Sequence[Tensor]], Tensor]:
    """The same as a function of a list, for torch.autograd."""
    height = _height(model, torch.func.functional_call)
    return lambda leaves: height(dict(zip(params, leaves, strict=True)), x)


def _encoder_gradient(place: Place) -> Sides:
    (model, params), x = _encoder(place), place.numbers(32, 16, 64, seed=1)
    return {
        **transformed(
            place, lambda library: library.grad(_height(model, library.functional_call)), params, x
        ),
        BY_HAND: Side(by_hand.gradients, (_of_leaves(model, params, x), tuple(params.values()))),
        JAX: OfJax("grad", "encoder", (list(params.values()), x)),
    }


def _with_rules(func: Callable[..., Any]) -> Callable[..., Any]:
    """Attention by the backend that has second derivatives, which torch does not choose by itself."""

    def run(*args: Any) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return func(*args)

    return run


def _encoder_hvp(place: Place) -> Sides:
    (model, params), x = _encoder(place), place.numbers(32, 16, 64, seed=1)
    vectors = {name: place.numbers(*p.shape, seed=2 + at) for at, (name, p) in enumerate(params.items())}
    of_leaves = _of_leaves(model, params, x)
    leaves, tangents = tuple(params.values()), tuple(vectors.values())

    def of(library: Any) -> Callable[[Params, Params], Any]:
        def product(params: Params, vectors: Params) -> Any:
            height = _height(model, library.functional_call)
            return library.hvp(lambda params: height(params, x), (params,), (vectors,))

        return product

    def of_torch_func(params: Params, vectors: Params) -> Any:
        height = _height(model, torch.func.functional_call)
        slope = torch.func.grad_and_value(lambda params: height(params, x))
        _, product, value = torch.func.jvp(slope, (params,), (vectors,), has_aux=True)
        return value, product

    return {
        **of_autodiff(place, of, params, vectors),
        TORCH_FUNC: Side(_with_rules(of_torch_func), (params, vectors)),
        FUNCTIONAL: Side(_with_rules(legacy.hvp), (lambda *leaves: of_leaves(leaves), leaves, tangents)),
        BY_HAND: Side(_with_rules(by_hand.hvps), (of_leaves, leaves, tangents)),
        JAX: OfJax("hvp", "encoder", (list(leaves), list(tangents), x)),
    }


def _per_sample_gradients(
    place: Place, height: Callable[[Any], Callable[..., Tensor]], params: Params, *data: Tensor
) -> Sides:
    in_dims = (None, *(0 for _ in data))
    one = height(torch.func.functional_call)

    def by_hand_of_one(*sample: Tensor) -> tuple[Tensor, ...]:
        return by_hand.gradients(
            lambda leaves: one(dict(zip(params, leaves, strict=True)), *sample), tuple(params.values())
        )

    return {
        **transformed(
            place,
            lambda library: library.vmap(library.grad(height(library.functional_call)), in_dims),
            params,
            *data,
        ),
        BY_HAND: Side(by_hand.sample_by_sample, (by_hand_of_one, data)),
    }


def _encoder_per_sample(place: Place) -> Sides:
    (model, params), x = _encoder(place), place.numbers(32, 16, 64, seed=1)
    return {
        **_per_sample_gradients(place, lambda call: _height(model, call), params, x),
        JAX: OfJax("grad_of_samples", "encoder", (list(params.values()), x)),
    }


class Convolutions(nn.Module):
    """Two convolutions, the mean over places, and a linear layer with 170 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.last = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).tanh()).tanh().mean((-2, -1)))


def _convolutions(place: Place) -> tuple[nn.Module, Params, Tensor, Tensor]:
    model = place.put(Convolutions)
    x, y = place.numbers(64, 1, 28, 28, seed=1), place.numbers(64, 10, seed=2).argmax(1)
    return model, dict(model.named_parameters()), x, y


def _entropy(model: nn.Module, call: Any) -> Callable[..., Tensor]:
    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        logits = call(model, params, (x.unsqueeze(0),)).squeeze(0)
        return nn.functional.cross_entropy(logits, y)

    return loss


def _convolutions_per_sample(place: Place) -> Sides:
    model, params, x, y = _convolutions(place)

    def by_expanding(params: Params, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Every sample has parameters of its own, which convolutions take as groups."""
        leaves = [p.expand(len(x), *p.shape).detach().requires_grad_() for p in params.values()]
        *convolutions, weight, bias = leaves
        images = x.flatten(0, 1).unsqueeze(0)
        for filters, offsets in zip(convolutions[::2], convolutions[1::2], strict=True):
            images = nn.functional.conv2d(
                images, filters.flatten(0, 1), offsets.flatten(), stride=2, padding=1, groups=len(x)
            ).tanh()
        features = images.view(len(x), -1, *images.shape[-2:]).mean((-2, -1))
        logits = (weight @ features.unsqueeze(-1)).squeeze(-1) + bias
        return torch.autograd.grad(nn.functional.cross_entropy(logits, y, reduction="sum"), leaves)

    return {
        **_per_sample_gradients(place, lambda call: _entropy(model, call), params, x, y),
        BY_HAND: Side(by_expanding, (params, x, y)),
        JAX: OfJax("grad_of_samples", "entropy_of_convolutions", (list(params.values()), x, y)),
    }


def _last_layer(place: Place) -> Sides:
    """The Hessian of each sample's loss in the last layer's 170 parameters."""
    model, params, x, y = _convolutions(place)
    last = {name: params.pop(name) for name in ("last.weight", "last.bias")}

    def of(library: Any) -> Callable[..., Any]:
        loss = _entropy(model, library.functional_call)

        def of_last(last: Params, x: Tensor, y: Tensor) -> Tensor:
            return loss({**params, **last}, x, y)

        return library.vmap(library.hessian(of_last), (None, 0, 0))

    def sample_by_sample(last: Params, x: Tensor, y: Tensor) -> list[Tensor]:
        """The features once, then the Hessian of each sample by batched pulls."""
        features = model.second(model.first(x).tanh()).tanh().mean((-2, -1))

        def of_one(feature: Tensor, label: Tensor) -> list[Tensor]:
            blocks = by_hand.hessian_blocks(
                lambda leaves: nn.functional.cross_entropy(nn.functional.linear(feature, *leaves), label),
                tuple(last.values()),
            )
            return [block for of_row in blocks for block in of_row]

        return by_hand.sample_by_sample(of_one, (features, y))

    return {
        **transformed(place, of, last, x, y),
        BY_HAND: Side(sample_by_sample, (last, x, y)),
        JAX: OfJax(
            "hessian_of_samples", "entropy_of_last", (list(last.values()), x, y, list(params.values()))
        ),
    }


ROWS = [
    Row("encoder layer, parameter gradient", 5, _encoder_gradient, short=True),
    Row("encoder layer, hvp", 5, _encoder_hvp, short=True),
    Row("encoder layer, gradients of 32 samples", 5, _encoder_per_sample),
    Row("CNN 28 x 28, gradients of 64 samples", 6, _convolutions_per_sample, short=True),
    Row("CNN 28 x 28, last-layer Hessians of 64 samples", 6, _last_layer),
]
