"""One row by the present package and by the one before it, in turns: what ``--before`` adds."""

from __future__ import annotations

import statistics
import warnings
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import before, memory
from benchmarks.check import check
from benchmarks.clock import Here, ratio
from benchmarks.rows.row import AUTODIFF, BEFORE, BY_HAND, Place

if TYPE_CHECKING:
    from benchmarks.rows.row import Row

# What a row may take over what it took, of time and of memory.
TIME_BAR, PEAK_BAR = 1.03, 1.02


def compared(module: str, row: Row, place: Place) -> dict[str, Any]:
    """The present time over that before, and both peaks, of a row in this module's ROWS; ``place`` has the copy.

    A row that comes out slower than its bar is measured two more times, each in a new process, and the median of the
    three ratios counts. What the package could not do before is told, and not compared.
    """
    found = {"row": row.name, "number": row.number}
    try:
        ratios = [_in_a_process(module, row.name, place)]
        if ratios[0] > TIME_BAR:
            ratios += [_in_a_process(module, row.name, place) for _ in range(2)]
    except UnableBeforeError as error:
        return {**found, "unable before": str(error)}
    peaks = {column: memory.peak(module, row.name, column, place) for column in (AUTODIFF, BEFORE)}
    return {**found, "time": statistics.median(ratios), "times": ratios, "bytes": peaks}


class UnableBeforeError(Exception):
    """The package raised before, or was off the result in float64."""


def _in_a_process(module: str, name: str, place: Place) -> float:
    with ProcessPoolExecutor(1, memory.PROCESSES) as process:
        return process.submit(_time, module, name, place).result()


def _time(module: str, name: str, place: Place) -> float:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return time_here(memory.row_of(module, name), place)


def time_here(row: Row, place: Place) -> float:
    """The present time over that before; both results are checked first."""
    reference = row.sides(Place(torch.float64, place.device))[BY_HAND].run()
    before.library(place.before)  # what is wrong with the copy itself is an error
    try:
        sides = row.sides(place)
        check(f"{row.name}: {BEFORE}", sides[BEFORE].run(), reference)
    except Exception as error:
        raise UnableBeforeError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    check(f"{row.name}: {AUTODIFF}", sides[AUTODIFF].run(), reference)
    return ratio(*(Here(sides[column].run, place.device) for column in (AUTODIFF, BEFORE)))
