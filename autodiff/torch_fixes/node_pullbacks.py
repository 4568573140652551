"""Pullbacks of nodes of a graph, as formulas that can be differentiated to any order.

Torch's own pullback of a norm's pullback takes mean and deviation for constants when it is differentiated in turn; that
of logcumsumexp takes the logarithm of its cotangent. Each function here is given a node and its cotangents, and gives a
cotangent for each of the node's inputs, or None: torch's are right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from autodiff import _torch
from autodiff.core.call import spread
from autodiff.core.reverse import rerecord
from autodiff.torch_fixes.formulas import upcast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    Cotangents = Sequence[Tensor | None]


def of_layer_norm(node: Any, cotangents: Cotangents) -> Cotangents:
    """Of NativeLayerNormBackwardBackward: to (grad_out, input, mean, rstd, weight, bias)."""
    x, deviation = _torch.saved_by(node, "input"), _torch.saved_by(node, "rstd")
    first = x.dim() - len(_torch.saved_by(node, "normalized_shape"))
    dims, summed = list(range(first, x.dim())), list(range(first))
    pulled = _pulled_back(node, x.shape[first:], dims, summed, deviation, cotangents)
    return pulled[0], pulled[1], None, None, pulled[2], None


def of_batch_norm(node: Any, cotangents: Cotangents) -> Cotangents | None:
    """Of NativeBatchNormBackwardBackward: to (grad_out, input, weight, mean, deviation)."""
    if not _torch.saved_by(node, "train"):
        return None  # mean and deviation are constants
    x = _torch.saved_by(node, "input")
    shape = [1, -1, *[1] * (x.dim() - 2)]
    dims = [dim for dim in range(x.dim()) if dim != 1]
    deviation = _torch.saved_by(node, "save_invstd").view(shape)
    return *_pulled_back(node, shape, dims, dims, deviation, cotangents), None, None


def _pulled_back(
    node: Any,
    shape: Sequence[int],
    dims: list[int],
    summed: list[int],
    inverse_deviation: Tensor,
    cotangents: Cotangents,
) -> list[Tensor | None]:
    """Cotangents of what came back, of the input and of the weight, from those of all gradients.

    The input was standardised over ``dims``, and then multiplied by the weight, which is of ``shape`` there and has the
    same numbers along ``summed``.
    """
    named = [_torch.saved_by(node, name) for name in ("grad_out", "input", "weight")]
    saved = [one for one in named if one is not None]
    inverse_variance = upcast(inverse_deviation.detach()) ** 2
    given = [(i, cotangent) for i, cotangent in enumerate(cotangents) if cotangent is not None]

    def gradients(tensors: Sequence[Tensor]) -> list[Any]:
        grad_out, x, *weights = map(upcast, tensors)
        centred = x - x.mean(dims, keepdim=True)
        variance = (centred * centred).mean(dims, keepdim=True)
        # The deviation that forward has saved, as a function of the input: eps is in it.
        scale = (variance - variance.detach() + 1 / inverse_variance).rsqrt()
        y = centred * scale
        g = grad_out * weights[0].view(shape) if weights else grad_out
        results = [scale * (g - g.mean(dims, keepdim=True) - y * (g * y).mean(dims, keepdim=True))]
        # Of weight and bias.
        results += [
            _summed(one, summed).reshape(weights[0].shape) for one in (grad_out * y, grad_out) if weights
        ]
        return [results[i].to(cotangent.dtype) for i, cotangent in given]

    tape, reached = rerecord(gradients, saved, [True] * len(saved))
    pulled = tape.pull([cotangent for _, cotangent in given], create_graph=True)
    return list(spread(pulled, reached, 3))


def _summed(x: Tensor, dims: list[int]) -> Tensor:
    return x.sum(dims) if dims else x  # no dims are all of them


def of_logcumsumexp(node: Any, cotangents: Cotangents) -> Cotangents | None:
    """Of LogcumsumexpBackward: to (input,).

    With x for the input and y for the result, which grows: the sum over all j from i on of g[j] exp(x[i] - y[j]), over
    windows that double; of complex numbers the conjugates. No factor of real numbers is larger than one.
    """
    g, x, y, dim = cotangents[0], *(_torch.saved_by(node, name) for name in ("self", "result", "dim"))
    if g is None:
        return None
    if x.dim() == 0 or x.numel() == 0:
        return [g.clone()]
    count, shift = x.size(dim), 1
    nothing = y.real == -torch.inf
    earlier, later = y.narrow(dim, 0, count - 1), y.narrow(dim, 1, count - 1)
    decay = (earlier - later).masked_fill(nothing.narrow(dim, 0, count - 1), -torch.inf).exp().conj()
    while shift < count:
        rest = count - shift
        longer = g.narrow(dim, 0, rest) + decay * g.narrow(dim, shift, rest)
        g = torch.cat([longer, g.narrow(dim, rest, shift)], dim)
        kept = max(rest - shift, 0)
        decay = decay.narrow(dim, 0, kept) * decay.narrow(dim, shift, kept) if kept else decay
        shift *= 2
    return [g * (x - y).masked_fill(nothing, -torch.inf).exp().conj()]
