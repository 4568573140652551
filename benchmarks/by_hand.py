"""Derivatives by torch.autograd alone, as somebody writes them who knows it well.

Each is as lean as its problem allows: graphs only where they are needed, rows in one batch where that is
faster, samples through the sum of their values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, grad

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def watched(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def gradient(func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return grad(func(x), x)[0]


def gradients(func: Callable[..., Tensor], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    leaves = watched(tensors)
    return grad(func(leaves), leaves)


def vjp(func: Callable[[Tensor], Tensor], x: Tensor, v: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    output = func(x)
    return output.detach(), grad(output, x, v)[0]


def jvp(func: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        output, tangent = forward_ad.unpack_dual(func(forward_ad.make_dual(x, v)))
    return output, tangent


def hvp(func: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    value = func(x)
    (gradient,) = grad(value, x, create_graph=True)
    return value.detach(), grad(gradient, x, v)[0]


def hvps(
    func: Callable[..., Tensor], tensors: Sequence[Tensor], vectors: Sequence[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    leaves = watched(tensors)
    value = func(leaves)
    gradients = grad(value, leaves, create_graph=True)
    return value.detach(), grad(gradients, leaves, vectors)


def jacobian_row_by_row(func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return _rows(func(x), x)


def hessian_row_by_row(func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return _rows(grad(func(x), x, create_graph=True)[0], x)


def _rows(outputs: Tensor, x: Tensor) -> Tensor:
    last = len(outputs) - 1
    return torch.stack(
        [grad(output, x, retain_graph=at < last)[0] for at, output in enumerate(outputs.unbind())]
    )


def jacobian(func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    outputs = func(x)
    return grad(outputs, x, _identity(outputs), is_grads_batched=True)[0]


def hessian(func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (gradient,) = grad(func(x), x, create_graph=True)
    return grad(gradient, x, _identity(gradient), is_grads_batched=True)[0]


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.numel(), dtype=like.dtype, device=like.device).view(-1, *like.shape)


def hessians_of_samples(func: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Of ``func: [samples, n] -> [samples]`` in the inputs of each sample: ``[samples, n, n]``."""
    x = x.detach().requires_grad_()
    (gradient,) = grad(func(x).sum(), x, create_graph=True)
    samples, size = x.shape
    basis = torch.eye(size, dtype=x.dtype, device=x.device)[:, None, :].expand(size, samples, size)
    return grad(gradient, x, basis, is_grads_batched=True)[0].transpose(0, 1)


def hessian_blocks(func: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Of a scalar function of several tensors: ``blocks[i][j]`` is ``[*shape_i, *shape_j]``."""
    leaves = watched(tensors)
    gradients = grad(func(leaves), leaves, create_graph=True)
    blocks = []
    for gradient in gradients:
        rows = grad(
            gradient, leaves, _identity(gradient), is_grads_batched=True, retain_graph=True, allow_unused=True
        )
        blocks.append(
            [
                (leaf.new_zeros(gradient.numel(), *leaf.shape) if of_leaf is None else of_leaf).view(
                    *gradient.shape, *leaf.shape
                )
                for of_leaf, leaf in zip(rows, leaves, strict=True)
            ]
        )
    return blocks


def sample_by_sample(func: Callable[..., Any], samples: Sequence[Tensor]) -> list[Tensor]:
    """Per-sample gradients, one sample after the other, stacked leaf by leaf."""
    each = [func(*sample) for sample in zip(*samples, strict=True)]
    return [torch.stack(of_leaf) for of_leaf in zip(*each, strict=True)]
