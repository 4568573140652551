"""Time of several functions as medians of interleaved runs in one process, on one thread."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ROUNDS = 21
SECONDS_PER_BURST = 0.02


def medians(sides: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Seconds per call of each side: the median over rounds in which every side has its turn.

    A turn is a burst of calls that lasts about 20 ms, so that a clock tick or a switch of tasks does
    not decide it; sides take turns, so that whatever else the machine does hits them alike.
    """
    bursts = {name: _burst_length(run) for name, run in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            for _ in range(bursts[name]):
                run()
            times[name].append((time.perf_counter() - start) / bursts[name])
    return {name: statistics.median(of_side) for name, of_side in times.items()}


def _burst_length(run: Callable[[], object]) -> int:
    for _ in range(3):
        run()
    start = time.perf_counter()
    run()
    return max(1, int(SECONDS_PER_BURST / max(time.perf_counter() - start, 1e-6)))
