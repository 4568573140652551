"""Operations as formulas, which torch differentiates in every mode and to any order.

torch's own normalisations take mean and deviation for constants from the third derivative on, and from the second on
in forward mode; the others lack a rule. Imports nothing from the package.
"""

from __future__ import annotations

from math import isinf, log, pi, prod
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def layer_norm(
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """As torch.nn.functional.layer_norm and torch.layer_norm."""
    del cudnn_enable
    dims = list(range(input.dim() - len(normalized_shape), input.dim()))
    return _affine(_standardised(upcast(input), dims, eps)[0], weight, bias).to(input.dtype)


def batch_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As torch.nn.functional.batch_norm: the channels are dimension 1."""
    dims = [dim for dim in range(input.dim()) if dim != 1]
    return _by_channel(input, dims, running_mean, running_var, weight, bias, training, momentum, eps)


def instance_norm(
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """As torch.nn.functional.instance_norm: the channels are dimension 1."""
    dims = list(range(2, input.dim()))
    return _by_channel(input, dims, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _by_channel(
    x: Tensor,
    dims: list[int],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    by_batch: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    dtype, x = x.dtype, upcast(x)
    channels = [1, -1, *[1] * (x.dim() - 2)]
    weight, bias = (None if one is None else one.view(channels) for one in (weight, bias))
    if not by_batch:
        assert running_mean is not None
        assert running_var is not None
        centred = x - running_mean.view(channels)
        return _affine(centred * (upcast(running_var).view(channels) + eps).rsqrt(), weight, bias).to(dtype)
    count = prod([x.shape[dim] for dim in dims])
    if count == 1:
        raise ValueError(f"Expected more than 1 value for each mean when training, got input size {x.shape}")
    y, mean, variance = _standardised(x, dims, eps)
    with torch.no_grad():
        for running, new in ((running_mean, mean), (running_var, variance * count / max(count - 1, 1))):
            if running is not None:
                # An average over the instances too, where there is one for each.
                running.mul_(1 - momentum).add_(momentum * new.mean(0).flatten())
    return _affine(y, weight, bias).to(dtype)


def upcast(x: Tensor) -> Tensor:
    """The tensor as torch computes with it: the square of 256 is infinite in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _standardised(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The tensor with mean 0 and variance 1 over the dimensions, and the two as they were."""
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    variance = (centred * centred).mean(dims, keepdim=True)
    return centred * (variance + eps).rsqrt(), mean, variance


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: str = "") -> Tensor:
    """As torch.cdist."""
    del compute_mode
    distances: Tensor = torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, dim=-1)
    return distances


def pdist(input: Tensor, p: float = 2.0) -> Tensor:  # noqa: A002
    """As torch.nn.functional.pdist."""
    one, other = torch.triu_indices(len(input), len(input), 1, device=input.device)
    distances: Tensor = torch.linalg.vector_norm(input[one] - input[other], p, dim=-1)
    return distances


def cumprod(
    input: Tensor,  # noqa: A002
    dim: int,
    *,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As torch.cumprod: products of ever longer windows, in n log n; there is no division, so a zero is a number.

    A window's product may overflow where what stands before it has become zero: then NaN, where torch has zero.
    """
    x = input if dtype is None else input.to(dtype)
    if out is not None or not (x.is_floating_point() or x.is_complex()):
        return torch.cumprod(input, dim, dtype=dtype, out=out)
    x, result = upcast(x), x.dtype
    count = x.size(dim) if x.dim() else 1
    shift = 1
    while shift < count:
        longer = x.narrow(dim, shift, count - shift) * x.narrow(dim, 0, count - shift)
        x = torch.cat([x.narrow(dim, 0, shift), longer], dim)
        shift *= 2
    return x.to(result) if count > 1 else x.to(result).clone()


def mvlgamma(input: Tensor, p: int, *, out: Tensor | None = None) -> Tensor:  # noqa: A002
    """As torch.mvlgamma, which writes in place to what may have fewer batches."""
    if out is not None or not input.is_floating_point():
        return torch.mvlgamma(input, p) if out is None else torch.special.multigammaln(input, p, out=out)
    x = upcast(input)
    steps = torch.arange(p, dtype=x.dtype, device=x.device) / 2
    logarithms = (x.unsqueeze(-1) - steps).lgamma().sum(-1)
    return (logarithms + p * (p - 1) / 4 * log(pi)).to(input.dtype)


def logcumsumexp(input: Tensor, dim: int) -> Tensor:  # noqa: A002
    """As torch.logcumsumexp: in each of log2(n) steps every number takes in twice as many before it."""
    result, distance, size = input, 1, input.size(dim) if input.dim() else 1
    while distance < size:
        before, here = result.narrow(dim, 0, size - distance), result.narrow(dim, distance, size - distance)
        result = torch.cat([result.narrow(dim, 0, distance), torch.logaddexp(before, here)], dim)
        distance *= 2
    return result


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:  # noqa: A002
    """As torch.nn.functional.hardsigmoid."""
    result = functional.relu6(input + 3) / 6
    return input.copy_(result) if inplace else result


def mse_loss(
    input: Tensor,  # noqa: A002
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    """As torch.nn.functional.mse_loss: of torch's own, only the mean cannot be pushed forward twice."""
    reduction = _reduction(size_average, reduce, reduction)
    if weight is not None:
        return functional.mse_loss(input, target, None, None, reduction, weight)  # type: ignore[call-arg]
    if reduction != "mean":
        return functional.mse_loss(input, target, reduction=reduction)
    loss = functional.mse_loss(upcast(input), upcast(target), reduction="sum")
    return _of_torch_dtype(loss / _pairs(input, target), input, target)


def huber_loss(
    input: Tensor,  # noqa: A002
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    """As torch.nn.functional.huber_loss: a smooth L1 loss, which torch differentiates in every mode."""
    if weight is not None:
        weighted = huber_loss(input, target, "none", delta) * weight
        return {"none": weighted, "sum": weighted.sum(), "mean": weighted.mean()}[reduction]
    if isinf(delta):
        return 0.5 * mse_loss(input, target, reduction=reduction)
    loss = delta * functional.smooth_l1_loss(upcast(input), upcast(target), reduction=reduction, beta=delta)
    return _of_torch_dtype(loss, input, target)


def _pairs(one: Tensor, other: Tensor) -> int:
    return prod(torch.broadcast_shapes(one.shape, other.shape))


def _of_torch_dtype(loss: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """The loss in the dtype of its arguments; under autocast it stays in float32."""
    autocast = torch.is_autocast_enabled(one.device.type)
    return loss if autocast else loss.to(torch.promote_types(one.dtype, other.dtype))


def _reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """What the two deprecated options mean."""
    if size_average is None and reduce is None:
        return reduction
    return "none" if reduce is False else "sum" if size_average is False else "mean"


def glu(input: Tensor, dim: int = -1) -> Tensor:  # noqa: A002
    """As torch.nn.functional.glu."""
    if input.dim() == 0 or input.size(dim) % 2:
        return functional.glu(input, dim)  # raises
    values, gates = upcast(input).chunk(2, dim)
    return (values * gates.sigmoid()).to(input.dtype)


def soft_margin_loss(
    input: Tensor,  # noqa: A002
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """As torch.nn.functional.soft_margin_loss."""
    reduction = _reduction(size_average, reduce, reduction)
    margin = (target.expand_as(input) * input).to(input.dtype)
    loss = torch.log1p(torch.exp(-margin)) if input.is_complex() else functional.softplus(-margin)
    return _reduced(loss, reduction)


def hinge_embedding_loss(
    input: Tensor,  # noqa: A002
    target: Tensor,
    margin: float = 1.0,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """As torch.nn.functional.hinge_embedding_loss, which writes in place to what may have fewer batches."""
    apart = (margin - input).clamp_min(0).where(target != 1, 0)
    return _reduced(apart + input.where(target != -1, 0), _reduction(size_average, reduce, reduction))


def _reduced(loss: Tensor, reduction: str) -> Tensor:
    match reduction:
        case "mean":
            return loss.mean()
        case "sum":
            return loss.sum()
        case _:
            return loss


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As torch.nn.functional.scaled_dot_product_attention, whose dropout in a batch of batches ends the process."""
    if dropout_p == 0:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if enable_gqa:
        key, value = (one.repeat_interleave(query.size(-3) // one.size(-3), -3) for one in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.size(-1) ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(query.size(-2), key.size(-2), dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        scores = scores + attn_mask if attn_mask.is_floating_point() else scores.where(attn_mask, -torch.inf)
    hidden = scores.isneginf().all(-1, keepdim=True)
    weights = torch.softmax(scores.where(~hidden, 0), -1).where(~hidden, 0)
    return functional.dropout(weights, dropout_p) @ value
