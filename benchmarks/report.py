"""The results as tables, for a terminal and for a page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.rows.row import AUTODIFF, BEFORE, COLUMNS, EAGER, JAX

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

NUMBERS = {
    1: "tiny functions of 4 numbers",
    2: "chains of small operations",
    3: "Hessians in the inputs",
    4: "Hessians in the parameters",
    5: "a transformer's encoder layer",
    6: "a small convolutional network",
    7: "second derivatives at many points",
    8: "trees",
    10: "large tensors",
    11: "per_sample",
}
_HEADS = {
    "torch.func": "torch.func",
    "autograd.functional": "functional",
    "by hand": "by hand",
    "autodiff compiled": "compiled",
    "torch.func compiled": "func comp.",
    JAX: "JAX",
}


def seconds(value: float) -> str:
    """A time with a unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def size(value: float) -> str:
    """Bytes with a unit that suits them."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


class Lines:
    """Prints the table while it is measured."""

    def __init__(self, *, before: bool = False) -> None:
        heads = [f"{_HEADS[column]:>12s}" for column in COLUMNS[1:]]
        print("Times of the others are multiples of autodiff's: above 1.00 they are slower.\n")
        last = f" {'now/before':>10s} {'its peak':>8s}" if before else ""
        print(f"{'':60s} {'autodiff':>9s} {''.join(heads)} {'limit':>8s} {'peak':>9s} {'by hand':>8s}{last}")

    def add(self, row: dict[str, Any], before: dict[str, Any] | None = None) -> None:
        ours, peaks = row["seconds"][AUTODIFF], row["bytes"]
        cells = "".join(f"{_multiple(row, column):>12s}" for column in COLUMNS[1:])
        name = f"{row['number']:2d} {row['row']}"
        peak = f"{size(peaks[AUTODIFF]):>9s} {peaks['by hand'] / max(peaks[AUTODIFF], 1):8.2f}"
        limit = f"{ours / row['least seconds']:.3g}"
        last = "" if before is None else _over_before(before)
        print(f"{name:60s} {seconds(ours):>9s} {cells} {limit:>8s} {peak}{last}", flush=True)


def _multiple(row: dict[str, Any], column: str) -> str:
    if column in row["seconds"]:
        return f"{row['seconds'][column] / row['seconds'][AUTODIFF]:.2f}"
    return "fails" if column in row["does not compile"] else ""


def before_line(compared: dict[str, Any]) -> str:
    """A size of row 9, over the package before."""
    return f" {compared['number']} {compared['row']:57s} now/before{_over_before(compared)}"


def _over_before(compared: dict[str, Any]) -> str:
    """Time and peak over those before, and how often the time was measured where that was more than once."""
    if "unable before" in compared:
        return f" {'none':>10s}  before: {compared['unable before']}"
    peaks, times = compared["bytes"], compared["times"]
    again = f"  the median of {', '.join(f'{time:.3f}' for time in times)}" if len(times) > 1 else ""
    return f" {compared['time']:10.3f} {peaks[AUTODIFF] / max(peaks[BEFORE], 1):8.3f}{again}"


def growth_lines(growth: dict[str, Any]) -> str:
    """One column of row 9."""
    sizes = "  ".join(
        f"{at}: {seconds(time)}, {size(peak)}"
        for at, time, peak in zip(growth["sizes"], growth["seconds"], growth["bytes"], strict=True)
    )
    exponents = f"time n^{growth['exponent of time']:.2f}, memory n^{growth['exponent of memory']:.2f}"
    return f" 9 {growth['name']:45s} {growth['column']:10s} {exponents}   ({sizes})"


# A page.


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown, numbers to the right."""
    yield "| " + " | ".join(head) + " |"
    yield "|---" + "|--:" * (len(head) - 1) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def times(results: dict[str, Any]) -> Iterator[str]:
    """Times, the others' as multiples of autodiff's."""
    columns = [c for c in COLUMNS[1:] if any(c in row["seconds"] for row in results["rows"])]
    body = [
        [
            row["row"],
            seconds(row["seconds"][AUTODIFF]),
            *(_multiple(row, column) for column in columns),
            f"{row['seconds'][AUTODIFF] / row['least seconds']:.3g}",
        ]
        for row in results["rows"]
    ]
    yield from table(["", AUTODIFF, *columns, "over the limit"], body)


def peaks(results: dict[str, Any]) -> Iterator[str]:
    """Peaks of memory, the others' as multiples of autodiff's."""
    body = [
        [
            row["row"],
            size(row["bytes"][AUTODIFF]),
            *(
                f"{row['bytes'][column] / row['bytes'][AUTODIFF]:.2f}" if column in row["bytes"] else ""
                for column in EAGER[1:]
            ),
        ]
        for row in results["rows"]
        if row["bytes"][AUTODIFF] >= 2**17
    ]
    yield from table(["", AUTODIFF, *EAGER[1:]], body)


def growths(results: dict[str, Any]) -> Iterator[str]:
    """The exponents of row 9."""
    body = [
        [
            f"{one['name']}, {one['sizes'][0]} to {one['sizes'][-1]}" if one["column"] == AUTODIFF else "",
            one["column"],
            f"{one['exponent of time']:.2f}",
            f"{one['exponent of memory']:.2f}",
            seconds(one["seconds"][-1]),
            size(one["bytes"][-1]),
        ]
        for one in results["growth"]
    ]
    yield from table(["number of", "", "time", "memory", "time of the largest", "its peak"], body)
