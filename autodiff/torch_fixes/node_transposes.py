"""Transposes of the pullbacks of nodes, for pushforwards of recorded functions: what torch computes with much waste.

Each `of_` here is given the node that torch made of a pullback. It gives the constants that the transpose needs and the
transpose itself, or None: torch's is to be used.
"""

from __future__ import annotations

from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autodiff import _torch
from autodiff.torch_fixes.formulas import upcast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autodiff.core.hooks import Transpose

    Vectors = Sequence[Tensor | None]


def of_convolution(pullback: Any) -> tuple[Sequence[Tensor], Transpose] | None:
    """Of ConvolutionBackward0: v * weight + input * w + b, for vectors v, w, b in input, weight and bias.

    Torch's transpose also computes what v and w give for weight and input, which are two more convolutions.
    """
    if type(pullback).__name__ != "ConvolutionBackwardBackward0":
        return None  # a hook has changed what the pullback gave
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    options = [_torch.saved_by(pullback, name) for name in names]
    shape = _torch.saved_by(pullback, "grad_output").shape

    def transpose(constants: Sequence[Tensor], vectors: Vectors) -> Vectors:
        x, weight = constants
        in_input, in_weight, in_bias = vectors
        terms = []
        for image, kernel in ((x, in_weight), (in_input, weight)):
            if image is not None and kernel is not None:
                terms.append(torch.convolution(image, kernel, in_bias, *options))
                in_bias = None  # once
        if in_bias is not None:
            terms.append(in_bias.view(-1, *[1] * (len(shape) - 2)).expand(shape))
        return [reduce(torch.add, terms) if terms else None]

    return _if_plain([_torch.saved_by(pullback, name) for name in ("input", "weight")], transpose)


def of_layer_norm(pullback: Any) -> tuple[Sequence[Tensor], Transpose] | None:
    """Of NativeLayerNormBackward0. Torch's transpose also computes what the vectors give for input and weight."""
    if type(pullback).__name__ != "NativeLayerNormBackwardBackward0":
        return None
    x, mean, scale = (_torch.saved_by(pullback, name) for name in ("input", "mean", "rstd"))
    shape = _torch.saved_by(pullback, "normalized_shape")
    return _of_norm(pullback, x, mean, scale, list(range(x.dim() - len(shape), x.dim())), shape)


def of_batch_norm(pullback: Any) -> tuple[Sequence[Tensor], Transpose] | None:
    """Of NativeBatchNormBackward0, as `of_layer_norm`."""
    if type(pullback).__name__ != "NativeBatchNormBackwardBackward0":
        return None
    x = _torch.saved_by(pullback, "input")
    shape, dims = [1, -1, *[1] * (x.dim() - 2)], [dim for dim in range(x.dim()) if dim != 1]
    if _torch.saved_by(pullback, "train"):
        mean, scale = (_torch.saved_by(pullback, name) for name in ("save_mean", "save_invstd"))
        return _of_norm(pullback, x, mean.view(shape), scale.view(shape), dims, shape)
    mean, variance = (_torch.saved_by(pullback, name) for name in ("running_mean", "running_var"))
    scale = (upcast(variance.detach()) + _torch.saved_by(pullback, "eps")).rsqrt()
    return _of_norm(pullback, x, mean.view(shape), scale.view(shape), [], shape)


def _of_norm(
    pullback: Any, x: Tensor, mean: Tensor, scale: Tensor, dims: list[int], shape: Sequence[int]
) -> tuple[Sequence[Tensor], Transpose] | None:
    """Of (x - mean) scale weight + bias: mean and scale are those over ``dims``, or constants where there are none.

    The weight is of ``shape`` there.
    """
    weight = _torch.saved_by(pullback, "weight")

    def transpose(constants: Sequence[Tensor], vectors: Vectors) -> Vectors:
        x, mean, scale, *weights = map(upcast, constants)
        v, in_weight, in_bias = (None if vector is None else upcast(vector) for vector in vectors)
        y = (x - mean) * scale
        terms = []
        if v is not None:
            if dims:
                v = v - v.mean(dims, keepdim=True) - y * (v * y).mean(dims, keepdim=True)
            terms.append(v * (scale * weights[0].view(shape) if weights else scale))
        if in_weight is not None:
            terms.append(y * in_weight.view(shape))
        if in_bias is not None:
            terms.append(in_bias.view(shape).expand(x.shape))
        return [reduce(torch.add, terms).to(constants[0].dtype) if terms else None]

    return _if_plain([x, mean, scale] if weight is None else [x, mean, scale, weight], transpose)


def _if_plain(constants: Sequence[Tensor], transpose: Transpose) -> tuple[Sequence[Tensor], Transpose] | None:
    """Both, unless a constant is of a class or a layout of its own."""
    plain = all(type(one) in _PLAIN and one.layout == torch.strided for one in constants)
    return (constants, transpose) if plain else None


_PLAIN = {Tensor, torch.nn.Parameter}
