"""Row 9: how time and peak memory grow with the number of inputs, of samples, and of leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from benchmarks import memory
from benchmarks.clock import Here, medians
from benchmarks.rows import dense, trees
from benchmarks.rows.row import AUTODIFF, BY_HAND, TORCH_FUNC, Place, Row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.rows.row import Sides

COLUMNS = (AUTODIFF, TORCH_FUNC, BY_HAND)


class Growth(NamedTuple):
    """A problem of several sizes: ``of_size(place, size)``."""

    name: str
    sizes: tuple[int, ...]
    of_size: Callable[[Place, int], Sides]

    def row(self, size: int) -> Row:
        return Row(f"{self.name}: {size}", 9, lambda place: self.of_size(place, size))


GROWTHS = (
    Growth(
        "inputs, Hessian of an MLP n-64-1",
        (16, 64, 256, 1024, 4096),
        lambda place, size: dense.input_hessians(place, 1, size, 64, 1),
    ),
    Growth(
        "samples, input Hessians of an MLP 8-16-16-1",
        (1, 8, 64, 512, 4096),
        lambda place, size: dense.input_hessians(place, size, 8, 16, 16, 1),
    ),
    Growth("leaves, gradient in a tree", (1, 16, 128, 1024, 4096), trees.of_count),
)
ROWS = [growth.row(size) for growth in GROWTHS for size in growth.sizes]


def measured(growth: Growth, place: Place, rounds: int) -> Iterator[dict[str, object]]:
    """For each column the seconds and bytes at every size, and the exponents fitted to them."""
    seconds: dict[str, list[float]] = {column: [] for column in COLUMNS}
    peaks: dict[str, list[int]] = {column: [] for column in COLUMNS}
    for size in growth.sizes:
        row = growth.row(size)
        sides = row.sides(place)
        times = medians({c: Here(sides[c].run, place.device) for c in COLUMNS}, rounds)
        for column in COLUMNS:
            seconds[column].append(times[column])
            peaks[column].append(memory.peak(__name__, row.name, column, place))
    for column in COLUMNS:
        yield {
            "name": growth.name,
            "sizes": growth.sizes,
            "column": column,
            "seconds": seconds[column],
            "bytes": peaks[column],
            "exponent of time": exponent(growth.sizes, seconds[column]),
            "exponent of memory": exponent(growth.sizes, peaks[column]),
        }


def exponent(sizes: tuple[int, ...], values: list[float] | list[int]) -> float:
    """The slope of a straight line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
