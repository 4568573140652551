"""The times of every library, row by row, as multiples of autodiff's, from the results on the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

_RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu.json"
# Okabe and Ito's palette, which colour-blind readers can distinguish.
_COLOURS = {
    "torch.func": "#E69F00",
    "autograd.functional": "#CC79A7",
    "by hand": "#999999",
    "autodiff compiled": "#0072B2",
    "torch.func compiled": "#F0E442",
    "JAX jitted": "#009E73",
}


def draw(folder: Path) -> None:
    rows = json.loads(_RESULTS.read_text())["rows"]
    height = sum(0.16 * len(_others(row)) + 0.22 for row in rows)
    figure, axes = plt.subplots(figsize=(9, height + 1))
    place, ticks, names = 0.0, [], []
    for row in rows:
        others = _others(row)
        ticks.append(place + (len(others) - 1) / 2)
        names.append(f"{row['row']}")
        for column in others:
            ratio = row["seconds"][column] / row["seconds"]["autodiff"]
            # Bars start at autodiff's time; bars to the right are slower.
            axes.barh(place, ratio - 1, left=1, height=0.9, color=_COLOURS[column])
            place += 1
        place += 1.4
    axes.set_yticks(ticks, names, fontsize=8)
    axes.set_ylim(place - 0.9, -1)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1)
    axes.grid(axis="x", which="major", color="#dddddd")
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("time as a multiple of autodiff's (left: faster, right: slower)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in _COLOURS.values()]
    axes.legend(
        handles,
        list(_COLOURS),
        ncols=3,
        loc="lower center",
        bbox_to_anchor=(0.4, 1.0),
        frameon=False,
        fontsize=9,
    )
    figure.savefig(folder / "benchmarks.svg", bbox_inches="tight", facecolor="white")
    plt.close(figure)


def _others(row: dict[str, Any]) -> list[str]:
    return [column for column in _COLOURS if column in row["seconds"]]
