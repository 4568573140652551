"""Floor 1: the batching level.

Hands on `run`, a vmap level over flat leaves, and `remember_randomness`, by which pieces of a batch see
the same random numbers. Never sees a tree; imports only `_torch`.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from autodiff import _torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

Randomness: TypeAlias = Literal["error", "different", "same"]


@_torch.whole
def run(
    func: Callable[[list[Any]], list[Any]],
    leaves: Sequence[Any],
    dims: Sequence[int | None],
    size: int,
    randomness: Randomness,
    out_dims: Callable[[list[Any], list[bool]], Sequence[int | None]],
) -> list[Any]:
    """Run ``func`` once on leaves that hide their dimension ``dims[i]`` as a batch of ``size``.

    ``out_dims`` is told the outputs, and which of them are batched, and says where each batch goes;
    None leaves an output as it is.
    """
    if _torch.compiling():
        return _run_traced(func, leaves, dims, randomness, out_dims)
    with _torch.batch_level(size, randomness) as level:
        entered = [
            leaf if dim is None else _torch.add_batch(leaf, dim, level)
            for leaf, dim in zip(leaves, dims, strict=True)
        ]
        outputs = func(entered)
        batched = [isinstance(output, Tensor) and _torch.is_batched_at(output, level) for output in outputs]
        return [
            output if dim is None else _torch.remove_batch(output, dim, size, level)
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
    return [output if dim is None else _moved(next(coming), dim) for output, dim in kept]


def _moved(output: Tensor, dim: int) -> Tensor:
    # Each operation that is left out is one less to trace.
    return output.movedim(0, dim) if dim else output


def over_rows(
    func: Callable[[list[Tensor]], list[Tensor | None]],
    rows: Sequence[Tensor],
    size: int,
    randomness: Randomness,
) -> list[Tensor | None]:
    """``func`` of each row of ``rows``, in one batch: what a Jacobian does to a basis."""

    def leading(outputs: list[Any], _: list[bool]) -> list[int | None]:
        return [None if output is None else 0 for output in outputs]

    return run(func, rows, [0] * len(rows), size, randomness, leading)


def the_same_for_all(leaves: Sequence[Any], rows: Sequence[Tensor]) -> list[Any]:
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
            mask = _torch.bottom(torch.zeros(sizes, dtype=torch.bool, device=tensor.device))
            for level, _ in levels:
                mask = _torch.add_batch(mask, 0, level)
            masks[tensor.device] = mask
        # A choice between equals keeps every bit, and takes the batches of all three.
        return torch.where(masks[tensor.device], tensor, tensor)

    return copied


def random_state() -> dict[str, Tensor]:
    """The state of the default generators: that of the CPU, and those of CUDA once it is in use."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"cuda:{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
    return states


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Take the generators back to where they were."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


def has_drawn(since: Mapping[str, Tensor]) -> bool:
    """Whether random numbers were drawn since the generators were in these states."""
    now = random_state()
    return any(not torch.equal(state, now[device]) for device, state in since.items())


@contextmanager
def random_numbers_from(states: Mapping[str, Tensor]) -> Iterator[None]:
    """Draw once more what was drawn from these states on; afterwards the generators go on where they were."""
    before = random_state()
    set_random_state(states)
    try:
        yield
    finally:
        set_random_state(before)


def remember_randomness() -> Callable[[], None]:
    """A function that takes the generators back to where they are now."""
    return partial(set_random_state, random_state())
