"""Floor 1: standard bases in chunks, and Jacobian blocks put together.

A Jacobian is found row by row (reverse) or column by column (forward); here the basis vectors come
from and here the stacked results become blocks. Never sees a tree; imports only torch.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence


def standard_basis(leaves: Sequence[Tensor], start: int, stop: int) -> list[Tensor]:
    """Basis vectors ``start`` to ``stop`` of the space that the leaves span together.

    # basis[k]: [stop - start, *leaves[k].shape]

    >>> [part.tolist() for part in standard_basis([torch.zeros(()), torch.zeros(2)], 1, 3)]
    [[0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]]
    """
    parts, offset = [], 0
    for leaf in leaves:
        size = leaf.numel()
        if size == 1 and stop - start == 1 and len(leaves) == 1:
            return [_filled(leaf, (1, *leaf.shape), 1)]  # the gradient's, in a third of the time
        part = zeros(leaf, (stop - start, size))
        # Row r of the chunk is vector start + r; it is inside this leaf where its index is.
        if offset < stop and start < offset + size:
            part.diagonal(start - offset).fill_(1)
        parts.append(part.view((stop - start, *leaf.shape)))
        offset += size
    return parts


def row_blocks(rows: Tensor | None, outputs: Sequence[Tensor], primal: Tensor) -> list[Tensor]:
    """Split stacked rows of one input into its block for each output.

    # rows: [sum of output sizes, *in_shape] -> J[k]: [*outputs[k].shape, *in_shape]
    """
    if rows is None:
        return [zeros(primal, (*output.shape, *primal.shape)) for output in outputs]
    # No split into one piece: its derivative would copy what it is given.
    pieces = [rows] if len(outputs) == 1 else rows.split([output.numel() for output in outputs])
    return [
        piece.reshape((*output.shape, *primal.shape)) for piece, output in zip(pieces, outputs, strict=True)
    ]


def column_blocks(columns: Tensor | None, output: Tensor, primals: Sequence[Tensor]) -> list[Tensor]:
    """Split stacked columns of one output into its block for each input.

    # columns: [sum of input sizes, *out_shape] -> J[k]: [*out_shape, *primals[k].shape]
    """
    if columns is None:
        return [zeros(output, (*output.shape, *primal.shape)) for primal in primals]
    columns = columns.movedim(0, -1)
    sizes = [primal.numel() for primal in primals]
    pieces = [columns] if len(sizes) == 1 else columns.split(sizes, dim=-1)
    return [
        piece.reshape((*output.shape, *primal.shape)) for piece, primal in zip(pieces, primals, strict=True)
    ]


def size_of(leaves: Sequence[Tensor]) -> int:
    """How many numbers the leaves hold together."""
    return sum(prod(leaf.shape) for leaf in leaves)


def zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros of the tensor's kind, the same for every sample of a batch."""
    return _filled(like, shape, 0)


def _filled(like: Tensor, shape: tuple[int, ...], value: int) -> Tensor:
    if type(like) is Tensor:
        # Not new_full: of a batched tensor that would be batched, one basis for every sample.
        return torch.full(shape, value, dtype=like.dtype, device=like.device)
    return like.new_full(shape, value)
