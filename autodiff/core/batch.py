"""The batching level.

Provides `run`, a vmap level over flat leaves: tensors, and containers that hide a batch dimension themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autodiff import _torch
from autodiff.core import trees

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autodiff.types import Randomness


def container_with_dim(container: Any, dim: int | None) -> Any:
    """The container, whose batch dimensions include ``dim`` if they can, and into which a function may write.

    What all samples share is not to keep what the function writes into it. All tensors of a container may have the
    dimension although it was made without naming any.
    """
    if dim is None:
        return container.clone(recurse=False)
    if isinstance(dim, int) and dim >= container.dim():
        return container.clone(recurse=False).auto_batch_size_(dim + 1)
    return container


def narrow(leaf: Any, dim: int, start: int, count: int) -> Any:
    """``count`` samples, from ``start`` on."""
    if isinstance(leaf, Tensor):
        return leaf.narrow(dim, start, count)
    return leaf[(slice(None),) * dim + (slice(start, start + count),)]


def select(leaf: Any, dim: int, sample: int) -> Any:
    """One sample."""
    return leaf.select(dim, sample) if isinstance(leaf, Tensor) else leaf[(slice(None),) * dim + (sample,)]


def _hidden(leaf: Any, dim: int, level: int) -> Any:
    if isinstance(leaf, Tensor):
        return _torch.add_batch(leaf, dim, level)
    return leaf._add_batch_dim(in_dim=dim, vmap_level=level)  # noqa: SLF001  what torch.func.vmap calls as well


def _shown(output: Any, dim: int, size: int, level: int) -> Any:
    if isinstance(output, Tensor):
        return _torch.remove_batch(output, dim, size, level)
    return output._maybe_remove_batch_dim("vmap", vmap_level=level, batch_size=size, out_dim=dim)  # noqa: SLF001


def _holds_batch(output: Any, level: int) -> bool:
    return trees.hides_batches(output) and any(
        isinstance(leaf, Tensor) and _torch.is_batched_at(leaf, level) for leaf in trees.leaves(output)
    )


@_torch.traced_inline_only
def run(
    func: Callable[[list[Any]], list[Any]],
    leaves: Sequence[Any],
    dims: Sequence[int | None],
    size: int,
    randomness: Randomness,
    out_dims: Callable[[list[Any], list[bool]], Sequence[int | None]],
) -> list[Any]:
    """Run ``func`` once on leaves that hide their dimension ``dims[i]`` as a batch of ``size``.

    ``out_dims`` gets the outputs, and which of them are batched, and says where each batch goes;
    None leaves an output as it is.
    """
    if _torch.compiling():
        return _run_traced(func, leaves, dims, randomness, out_dims)
    return _torch.under_guard(_run_on_level, func, leaves, dims, size, randomness, out_dims)


def _run_on_level(
    func: Callable[[list[Any]], list[Any]],
    leaves: Sequence[Any],
    dims: Sequence[int | None],
    size: int,
    randomness: Randomness,
    out_dims: Callable[[list[Any], list[bool]], Sequence[int | None]],
) -> list[Any]:
    with _torch.batch_level(size, randomness) as level:
        entered = [
            leaf if dim is None else _hidden(leaf, dim, level) for leaf, dim in zip(leaves, dims, strict=True)
        ]
        outputs = func(entered)
        batched = [
            _torch.is_batched_at(output, level) if isinstance(output, Tensor) else _holds_batch(output, level)
            for output in outputs
        ]
        return [
            output if dim is None else _shown(output, dim, size, level)
            for output, dim in zip(outputs, out_dims(outputs, batched), strict=True)
        ]


def _run_traced(
    func: Callable[[list[Any]], list[Any]],
    leaves: Sequence[Any],
    dims: Sequence[int | None],
    randomness: Randomness,
    out_dims: Callable[[list[Any], list[bool]], Sequence[int | None]],
) -> list[Any]:
    """torch.func.vmap, which torch.compile's tracer knows; it does not tell which outputs are batched."""
    kept: list[tuple[Any, int | None]] = []

    def of_samples(*samples: Tensor) -> tuple[Tensor, ...]:
        coming = iter(samples)
        outputs = func(
            [leaf if dim is None else next(coming) for leaf, dim in zip(leaves, dims, strict=True)]
        )
        destinations = out_dims(outputs, [False] * len(outputs))
        for output, dim in zip(outputs, destinations, strict=True):
            kept.append((output if dim is None else None, dim))
        return tuple(output for output, dim in zip(outputs, destinations, strict=True) if dim is not None)

    mapped = [leaf for leaf, dim in zip(leaves, dims, strict=True) if dim is not None]
    in_dims = tuple(dim for dim in dims if dim is not None)
    coming = iter(torch.func.vmap(of_samples, in_dims, randomness=randomness)(*mapped))
    return [output if dim is None else _with_batch_at(next(coming), dim) for output, dim in kept]


def _with_batch_at(output: Tensor, dim: int) -> Tensor:
    # Each operation that is left out is one less to trace.
    return output.movedim(0, dim) if dim else output


def run_rows(
    func: Callable[[list[Tensor]], list[Tensor | None]],
    rows: Sequence[Tensor],
    size: int,
    randomness: Randomness,
) -> list[Tensor | None]:
    """``func`` of each row of ``rows``, in one batch: what a Jacobian does to a basis."""

    def leading(outputs: list[Any], _: list[bool]) -> list[int | None]:
        return [None if output is None else 0 for output in outputs]

    return run(func, rows, [0] * len(rows), size, randomness, leading)


def without_row_batch(leaves: Sequence[Any], rows: Sequence[Tensor]) -> list[Any]:
    """Leaves whose values do not depend on the row, as seen from outside the batch that ``rows`` are of.

    Such a leaf may be batched nonetheless: a buffer that was copied for every sample.
    """
    level, size = (_torch.vmap_levels() or [(0, 0)])[-1]
    if not rows or not _torch.is_batched_at(rows[0], level):
        return list(leaves)
    return [
        _torch.remove_batch(leaf, 0, size, level)[0]
        if isinstance(leaf, Tensor) and _torch.is_batched_at(leaf, level)
        else leaf
        for leaf in leaves
    ]


def copy_for_every_sample() -> Callable[[Tensor], Tensor]:
    """A function that copies a tensor, batched at every vmap level that is active here.

    Whatever is batched can then be written into the copy, and each sample's copy is its own.
    """
    levels = _torch.vmap_levels()
    masks: dict[torch.device, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        if not levels:
            return tensor.clone()
        if tensor.device not in masks:
            sizes = [size for _, size in levels]
            mask = _torch.fully_unwrapped(torch.zeros(sizes, dtype=torch.bool, device=tensor.device))
            for level, _ in levels:
                mask = _torch.add_batch(mask, 0, level)
            masks[tensor.device] = mask
        # where(mask, t, t) is t to the bit, batched at every level.
        return torch.where(masks[tensor.device], tensor, tensor)

    return copied
