"""Seeds: the vectors that a derivative is multiplied by. Never sees a tree; imports `_torch` and `specs`.

A product takes any class with the methods of `Seeds`.
"""

from __future__ import annotations

import functools
from math import prod
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from autodiff import _torch
from autodiff.core.specs import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Sequence


class Seeds(Protocol):
    """A number of vectors in the space that some leaves span together."""

    @property
    def count(self) -> int:
        """How many vectors there are."""
        ...

    def vectors(self, start: int, stop: int) -> list[Tensor]:
        """Vectors ``start`` to ``stop``, a tensor ``[stop - start, *leaf.shape]`` for each leaf."""
        ...


class StandardBasis:
    """The standard basis of the space that the leaves span, or its vectors ``first`` to ``end``.

    >>> [part.tolist() for part in StandardBasis([torch.zeros(()), torch.zeros(2)]).vectors(1, 3)]
    [[0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]]]
    """

    __slots__ = ("_first", "_leaves", "count")

    def __init__(self, leaves: Sequence[Tensor], first: int = 0, end: int | None = None) -> None:
        self._leaves, self._first = leaves, first
        self.count = (size_of(leaves) if end is None else end) - first

    def vectors(self, start: int, stop: int) -> list[Tensor]:
        """Vectors ``start`` to ``stop``."""
        parts, offset, count = [], self._first + start, stop - start
        for leaf in self._leaves:
            size = leaf.numel()
            if size == 1 and count == 1 and len(self._leaves) == 1:
                return [_filled(leaf, (1, *leaf.shape), 1)]  # the gradient's, in a third of the time
            part = zeros(leaf, (count, size))
            # Row r is vector offset + r, counted from this leaf's first; it is inside the leaf where its index is.
            if -count < offset < size:
                part.diagonal(offset).fill_(1)
            parts.append(part.view((count, *leaf.shape)))
            offset -= size
        return parts


class Given:
    """Vectors that are there already: ``[count, *leaf.shape]`` for each leaf."""

    __slots__ = ("_vectors", "count")

    def __init__(self, vectors: Sequence[Tensor], count: int) -> None:
        self._vectors, self.count = vectors, count

    def vectors(self, start: int, stop: int) -> list[Tensor]:
        """Vectors ``start`` to ``stop``."""
        return [vector[start:stop] for vector in self._vectors]


def size_of(leaves: Sequence[Tensor]) -> int:
    """How many numbers the leaves hold together."""
    return sum(prod(leaf.shape) for leaf in leaves)


def zeros(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros of the tensor's dtype and device, the same for every sample of a batch."""
    return _filled(like, shape, 0)


def _filled(like: Tensor, shape: tuple[int, ...], value: int) -> Tensor:
    if type(like) is Tensor:
        # Not new_full: of a batched tensor that would be batched, one basis for every sample.
        return torch.full(shape, value, dtype=like.dtype, device=like.device)
    return like.new_full(shape, value)


# A generic vector repeats after so many numbers.
_PERIOD = 4093


def generic_vector(like: Tensor | TensorSpec, *, elsewhere: bool = False) -> Tensor:
    """A vector that has nothing to do with any function, the same one each time; it draws no random numbers.

    Its numbers are from 0.5 to 1.5, or ``elsewhere`` of both signs and large, beyond most bounds.

    >>> generic_vector(torch.ones(3)), generic_vector(torch.ones(3), elsewhere=True)
    (tensor([1.2071, 1.3284, 0.8640]), tensor([-366.7504, -467.0017,  699.2462]))
    """
    shape, device = tuple(like.shape), like.device
    if not _torch.computes_numbers(()):
        return TensorSpec(shape, like.dtype, device).full(1.0)
    if prod(shape) <= _PERIOD:
        vector = _short_vector(shape, like.dtype, device, elsewhere).clone()
    else:
        times = -(-prod(shape) // _PERIOD)
        period = _short_vector((_PERIOD,), like.dtype, device, elsewhere)
        vector = period.repeat(times)[: prod(shape)].view(shape)
    if isinstance(like, TensorSpec) or type(like) is Tensor:
        return vector
    return torch.zeros_like(like) + vector


@functools.lru_cache(64)
def _short_vector(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, elsewhere: bool
) -> Tensor:
    # The fractions of multiples of squares are spread evenly, and no two of them are correlated. Of these two sequences
    # the first three numbers are in opposite orders.
    factor = 11**0.5 if elsewhere else 0.5**0.5
    numbers = [factor * i * i % 1 for i in range(1, prod(shape) + 1)]
    large = min(2e3, torch.finfo(dtype).max ** 0.25)
    numbers = [large * (one - 0.5) if elsewhere else one + 0.5 for one in numbers]
    with torch.inference_mode(mode=False):
        vector = torch.tensor(numbers, dtype=dtype, device=device).view(shape)
        if dtype.is_complex:
            vector = vector * (1 + 0.5j)
    # A level wraps what is made inside it, and this outlives the level.
    return _torch.fully_unwrapped(vector)
