"""Peak memory, each side in a process of its own.

Counts the bytes that torch's allocator hands out, those inside its operations included, by the profiler's
events; on a GPU the allocator counts itself. So a peak is exact, and the same every time.
"""

from __future__ import annotations

import multiprocessing
import warnings
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch.autograd.profiler import profile

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.rows.row import Place, Row, Side

# Forks of a process that has imported all of this, and has run nothing.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["benchmarks.growth", "benchmarks.measure"])


def peak(module: str, name: str, column: str, place: Place) -> int:
    """The most bytes that a run of a side holds at a time, its arguments aside, of a row in this module's ROWS."""
    with PROCESSES.Pool(1) as pool:
        return pool.apply(_peak_of, (module, name, column, place))


def _peak_of(module: str, name: str, column: str, place: Place) -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return peak_here(row_of(module, name).sides(place)[column], place.device)


def row_of(module: str, name: str) -> Row:
    """The row of this name in this module's ROWS."""
    (row,) = (row for row in import_module(module).ROWS if row.name == name)
    return row


def peak_here(side: Side, device: str) -> int:
    side.run()  # what torch loads at first use is not the row's
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return _most_at_a_time(side.run)


def _most_at_a_time(run: Callable[[], object]) -> int:
    with profile(profile_memory=True) as profiled:
        result = run()
    changes = [
        (event.start_ns(), at, event.nbytes())
        for at, event in enumerate(profiled.kineto_results.events())
        if event.name() == "[memory]"
    ]
    del result
    held = most = 0
    for _, _, change in sorted(changes):
        held += change
        most = max(most, held)
    return most
