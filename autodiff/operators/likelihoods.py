"""Losses as negative log-likelihoods: which losses are known, and how targets are drawn from a model's prediction."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Likelihood(NamedTuple):
    """A loss whose targets have a known distribution, given the model's output.

    ``draw(output, target, generator)`` gives a target of the same form as the one that it is shown; what a loss ignores
    in that, it ignores in this. The loss is a sum, or with ``mean`` a mean, over ``terms(output, target)`` independent
    negative log-likelihoods.
    """

    draw: Callable[[Tensor, Any, torch.Generator | None], Tensor]
    terms: Callable[[Tensor, Any], int | Tensor]
    mean: bool


def _class_rows(output: Tensor) -> Tensor:
    """The probabilities of the classes, which are along dimension 1, or along the only one, as ``[..., classes]``."""
    dim = min(1, output.dim() - 1)
    return output.softmax(dim).movedim(dim, -1)


def _classes(ignored: int, output: Tensor, target: Tensor, generator: torch.Generator | None) -> Tensor:
    """Targets of cross entropy: numbers of classes."""
    probabilities = _class_rows(output)
    rows = probabilities.reshape(-1, probabilities.shape[-1])
    drawn: Tensor = torch.multinomial(rows, 1, generator=generator).reshape(probabilities.shape[:-1])
    if target.is_floating_point():
        return drawn
    kept: Tensor = drawn.where(target != ignored, ignored)
    return kept


def _counted_rows(ignored: int, output: Tensor, target: Tensor) -> int | Tensor:
    if target.is_floating_point():
        return _class_rows(output)[..., 0].numel()
    return (target != ignored).sum()


def _gaussian(output: Tensor, _: Any, generator: torch.Generator | None) -> Tensor:
    """Targets of a squared error without the factor 1/2: Gaussian, of variance 1/2."""
    noise = torch.randn(output.shape, generator=generator, dtype=output.dtype, device=output.device)
    return output.add(noise, alpha=0.5**0.5)


def _bits(output: Tensor, _: Any, generator: torch.Generator | None) -> Tensor:
    """Targets of binary cross entropy of logits."""
    return torch.bernoulli(output.sigmoid(), generator=generator)


def _numbers(output: Tensor, _: Any) -> int:
    return output.numel()


_FUNCTIONS: dict[type[nn.Module], Any] = {
    nn.CrossEntropyLoss: nn.functional.cross_entropy,
    nn.MSELoss: nn.functional.mse_loss,
    nn.BCEWithLogitsLoss: nn.functional.binary_cross_entropy_with_logits,
}
# Options that do not change what a loss is, apart from its reduction. Those that are switched off do not count.
_HARMLESS = {"reduction", "ignore_index", "training"}


def likelihood_of(loss: Any) -> Likelihood | None:
    """What is known of a loss: of torch's own, as a function, as a partial of one with keywords, or as a module."""
    options: dict[str, Any] = {}
    if isinstance(loss, partial) and not loss.args:
        loss, options = loss.func, loss.keywords
    elif type(loss) in _FUNCTIONS:
        shown = {name: value for name, value in vars(loss).items() if not name.startswith("_")}
        options = {**shown, **dict(loss.named_buffers())}  # weights are buffers
        loss = _FUNCTIONS[type(loss)]
    reduction = options.get("reduction", "mean")
    switched_on = {
        name for name, value in options.items() if isinstance(value, Tensor) or value not in (None, 0.0)
    }
    if switched_on - _HARMLESS or reduction not in ("mean", "sum"):
        return None
    if loss is nn.functional.cross_entropy:
        ignored = options.get("ignore_index", -100)
        return Likelihood(partial(_classes, ignored), partial(_counted_rows, ignored), reduction == "mean")
    if loss is nn.functional.mse_loss:
        return Likelihood(_gaussian, _numbers, reduction == "mean")
    if loss is nn.functional.binary_cross_entropy_with_logits:
        return Likelihood(_bits, _numbers, reduction == "mean")
    return None
