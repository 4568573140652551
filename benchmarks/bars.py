"""What has to be reached, and whether it is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.growth import COLUMNS as GROWING
from benchmarks.pair import PEAK_BAR, TIME_BAR
from benchmarks.rows.row import AUTODIFF, BEFORE, BY_HAND, COMPILED, FUNCTIONAL, JAX, TORCH_FUNC

if TYPE_CHECKING:
    from collections.abc import Iterator

# Peaks below are one and the same: the Python objects of a call take more.
_NEGLIGIBLE = 2**17
# Of a row and a column: the time of autodiff over that of the other.
_TIMES = {
    ("tiny grad", TORCH_FUNC): 0.5,
    ("tiny hessian", TORCH_FUNC): 0.25,
    ("tiny jvp", TORCH_FUNC): 0.6,
    ("chain of 100, grad", TORCH_FUNC): 0.7,
    ("chain of 100, hessian", TORCH_FUNC): 0.6,
    ("tiny functional.jvp", FUNCTIONAL): 0.9,
    ("tiny functional.hvp", FUNCTIONAL): 0.9,
    ("chain of 100, functional.jvp", FUNCTIONAL): 0.7,
    ("chain of 100, functional.hvp", FUNCTIONAL): 0.55,
    ("input Hessians, MLP 32-256-256-1, 64 samples", TORCH_FUNC): 0.7,
    ("per_sample of input Hessians, MLP 32-256-256-1, 64 samples", TORCH_FUNC): 0.7,
    ("per_sample of parameter Hessians, MLP 8-16-16-1, 64 samples", TORCH_FUNC): 0.65,
    ("functional.hessian, MLP of 256 inputs", FUNCTIONAL): 0.15,
    ("functional.jacobian, MLP of 256 inputs", FUNCTIONAL): 0.3,
    ("gradient in a tree of 1000 leaves", BY_HAND): 1.15,
}
_PEAKS = {
    ("gradients, 20 sin and cos of 4 x 512 x 512", TORCH_FUNC): 0.5,
    ("functional.hessian, MLP of 256 inputs", FUNCTIONAL): 1.5,
    ("functional.hessian, 402 parameters, 4096 samples", FUNCTIONAL): 1.5,
}


class Bar(NamedTuple):
    """A measured value, which is to be at most the bound."""

    name: str
    value: float
    bound: float

    @property
    def met(self) -> bool:
        return self.value <= self.bound

    def __str__(self) -> str:
        return f"{self.name}: {self.value:.2f}, bar {self.bound:.2f}"


def bars(results: dict[str, Any]) -> list[Bar]:
    """All that these results can be held against."""
    rows = results["rows"]
    return [
        *_of_time(rows),
        *_of_memory(rows),
        *_of_compiled(rows),
        *_of_growth(results["growth"]),
        *(Bar(promise["name"], promise["value"], promise["bound"]) for promise in results["promises"]),
        *_of_before(results.get("before", [])),
    ]


def _of_time(rows: list[dict[str, Any]]) -> Iterator[Bar]:
    ratios = []
    for row in rows:
        name, seconds = row["row"], row["seconds"]
        ours = seconds[AUTODIFF]
        others = [seconds[column] for column in (TORCH_FUNC, FUNCTIONAL) if column in seconds]
        if others:
            ratios.append(ours / min(others))
            yield Bar(f"time of {name}, over torch's better", ratios[-1], 1.05)
        if 1 <= row["number"] <= 7:
            yield Bar(
                f"time of {name}, over by hand", ours / seconds[BY_HAND], 1.8 if row["number"] == 1 else 1.25
            )
        for (of_row, column), bound in _TIMES.items():
            if of_row == name:
                yield Bar(f"time of {name}, over {column}", ours / seconds[column], bound)
    yield Bar("geometric mean of the times over torch's better", _geometric_mean(ratios), 0.6)


def _of_memory(rows: list[dict[str, Any]]) -> Iterator[Bar]:
    for row in rows:
        name, peaks = row["row"], {c: max(peak, _NEGLIGIBLE) for c, peak in row["bytes"].items()}
        yield Bar(f"peak of {name}, over by hand", peaks[AUTODIFF] / peaks[BY_HAND], 1.1)
        if row["number"] in {3, 4, 7}:
            yield Bar(f"peak of {name}, over torch.func", peaks[AUTODIFF] / peaks[TORCH_FUNC], 0.75)
        for (of_row, column), bound in _PEAKS.items():
            if of_row == name:
                yield Bar(f"peak of {name}, over {column}", peaks[AUTODIFF] / peaks[column], bound)


def _of_compiled(rows: list[dict[str, Any]]) -> Iterator[Bar]:
    ratios = []
    for row in rows:
        name, seconds = row["row"], row["seconds"]
        if COMPILED in seconds and JAX in seconds and row["number"] in {3, 4, 7}:
            ratios.append(seconds[COMPILED] / seconds[JAX])
            yield Bar(f"time of {name}, compiled, over JAX", ratios[-1], 1.3)
        if COMPILED in seconds and name == "tiny hessian":
            yield Bar(f"time of {name}, compiled, over eager", seconds[COMPILED] / seconds[AUTODIFF], 0.1)
    if ratios:
        yield Bar("geometric mean of the compiled times over JAX", _geometric_mean(ratios), 1.0)


def _of_growth(growths: list[dict[str, Any]]) -> Iterator[Bar]:
    for first in range(0, len(growths), len(GROWING)):
        of_column = {one["column"]: one for one in growths[first : first + len(GROWING)]}
        for what in ("exponent of time", "exponent of memory"):
            excess = of_column[AUTODIFF][what] - of_column[BY_HAND][what]
            yield Bar(f"{what} over {of_column[AUTODIFF]['name']}, above that by hand", excess, 0.05)


def _of_before(compared: list[dict[str, Any]]) -> Iterator[Bar]:
    for one in compared:
        if "unable before" not in one:
            peaks = {column: max(peak, _NEGLIGIBLE) for column, peak in one["bytes"].items()}
            yield Bar(f"time of {one['row']}, over before", one["time"], TIME_BAR)
            yield Bar(f"peak of {one['row']}, over before", peaks[AUTODIFF] / peaks[BEFORE], PEAK_BAR)


def _geometric_mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))
