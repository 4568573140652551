"""Products of a derivative with seeds: batched, in chunks, and put together into the blocks of a Jacobian.

Works on flat lists of tensors. Never sees a tree.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from autodiff import _torch
from autodiff.core.batch import run_rows
from autodiff.core.chunks import Chunks, Sizes
from autodiff.core.seeds import StandardBasis, size_of, zeros

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from autodiff.core.linearization import Linearization
    from autodiff.core.seeds import Seeds
    from autodiff.types import Randomness

# A block for each output and each primal, zeros where the one does not depend on the other.
Blocks: TypeAlias = "list[list[Tensor]]"

# So many numbers in a strip of rows, over all samples of a batch, that a pull of its own pays off: a heuristic.
# The Hessian of one sample of an MLP with 433 parameters is 1.1 x slower in strips, that of 64 takes 0.35 x.
_MIN_GROUP_SIZE = 2**18


# A linear function of vectors, with ``last=`` for whether it is called for the last time; None stands for zero.
Product: TypeAlias = "Callable[..., list[Tensor | None]]"


def products(
    product: Product,
    seeds: Seeds,
    sizes: Sizes,
    randomness: Randomness = "same",
    keep: Callable[[Tensor, int], Tensor] = lambda rows, _: rows,
) -> list[Tensor | None]:
    """``product`` of every seed, stacked.

    A single seed needs no batch: its product is taken as it is. ``keep`` is shown the products of each chunk and the
    number of its first seed, and says what to keep of them before the next chunk is made.
    """
    chunks = Chunks(seeds.count, sizes)

    def of_seeds(start: int, stop: int) -> list[Tensor | None]:
        vectors = seeds.vectors(start, max(stop, 1))
        # A chunk of a learnt size may have to be repeated.
        last = stop == chunks.total and not sizes.adapts
        if stop - start > 1:
            results = run_rows(partial(product, last=last), vectors, stop - start, randomness)
        else:
            # One vector; or none, and then one product gives the shapes.
            results = product([vector.squeeze(0) for vector in vectors], last=last)
            results = [None if result is None else result.unsqueeze(0) for result in results]
            if stop == start:
                results = [None if result is None else result[:0] for result in results]
        return [None if result is None else keep(result, start) for result in results]

    count = 0

    def add(start: int, stop: int, pieces: list[Tensor | None]) -> None:
        nonlocal count
        count = len(pieces)
        for key, piece in enumerate(pieces):
            chunks.add(key, start, stop, piece)

    chunks.each(of_seeds, add)
    return [chunks.assembled(key) for key in range(count)]


# Blocks.


def blocks_by_rows(
    pull: Product,
    linearized: Linearization,
    primals: Sequence[Tensor],
    sizes: Sizes,
) -> Blocks:
    """The blocks of a linearized function's Jacobian, by a pull for every number of its outputs."""
    outputs = linearized.outputs
    blocks: Blocks = []
    groups = _output_groups(linearized, primals)
    for group in groups:
        pull_group = restricted_to_outputs(pull, group, len(outputs), is_last=group is groups[-1])
        rows = products(pull_group, StandardBasis(outputs[group]), sizes)
        blocks += blocks_from_rows(rows, outputs[group], primals)
    return blocks


def restricted_to_outputs(pull: Product, group: slice, count: int, *, is_last: bool = True) -> Product:
    """``pull`` of the cotangents of a group of the ``count`` outputs alone."""
    before, after = [None] * group.start, [None] * (count - group.stop)

    def pull_group(vectors: Sequence[Tensor], *, last: bool) -> list[Tensor | None]:
        return pull([*before, *vectors, *after], last=last and is_last)

    return pull_group


def _output_groups(linearized: Linearization, primals: Sequence[Tensor]) -> list[slice]:
    """Which outputs are pulled together: a large one alone, small neighbours in one batch.

    Rows of one output leave out the operations that lead to the others, which a batch over all of them
    would feed with zeros. But every pull costs some 0.2 ms, whatever its size.
    """
    outputs = linearized.outputs
    if len(outputs) == 1 or _torch.compiling():
        return [slice(0, len(outputs))]
    # A row's pull computes at least the row; inside a batch the graph's sizes say less.
    width = max(size_of(primals), linearized.bytes_of_a_pull()[0] // 4)
    groups, start, waiting = [], 0, 0
    for position, output in enumerate(outputs):
        strip = _torch.fully_unwrapped(output).numel() * width
        if strip >= _MIN_GROUP_SIZE:
            if waiting:
                groups.append(slice(start, position))
            groups.append(slice(position, position + 1))
            start, waiting = position + 1, 0
            continue
        waiting += strip
        if waiting >= _MIN_GROUP_SIZE:
            groups.append(slice(start, position + 1))
            start, waiting = position + 1, 0
    if start < len(outputs):
        groups.append(slice(start, len(outputs)))
    return groups


def blocks_from_rows(
    rows: Sequence[Tensor | None], outputs: Sequence[Tensor], primals: Sequence[Tensor]
) -> Blocks:
    """The blocks of a Jacobian from the stacked rows for each primal."""
    by_primal = [
        split_rows(of_primal, outputs, primal) for of_primal, primal in zip(rows, primals, strict=True)
    ]
    return [list(of_output) for of_output in zip(*by_primal, strict=True)]


def blocks_from_columns(
    columns: Sequence[Tensor | None], outputs: Sequence[Tensor], primals: Sequence[Tensor]
) -> Blocks:
    """The blocks of a Jacobian from the stacked columns for each output."""
    return [
        split_columns(of_output, output, primals) for of_output, output in zip(columns, outputs, strict=True)
    ]


def split_rows(rows: Tensor | None, outputs: Sequence[Tensor], primal: Tensor) -> list[Tensor]:
    """Split stacked rows of one primal into its block for each output.

    # rows: [sum of output sizes, *in_shape] -> J[k]: [*outputs[k].shape, *in_shape]
    """
    if rows is None:
        return [zeros(primal, (*output.shape, *primal.shape)) for output in outputs]
    # No split into one piece: its derivative would copy what it is given.
    pieces = [rows] if len(outputs) == 1 else rows.split([output.numel() for output in outputs])
    return [
        piece.reshape((*output.shape, *primal.shape)) for piece, output in zip(pieces, outputs, strict=True)
    ]


def split_columns(columns: Tensor | None, output: Tensor, primals: Sequence[Tensor]) -> list[Tensor]:
    """Split stacked columns of one output into its block for each primal.

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
