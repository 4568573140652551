"""Time of several sides of a comparison, as medians of interleaved runs."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SECONDS_PER_BURST = 0.02
LEAST_ROUNDS = 41  # of a ratio


class Timed(Protocol):
    """What can be timed: ``seconds(n)`` is what n runs take."""

    def seconds(self, runs: int) -> float: ...


class Here:
    """A function in this process. On a GPU the clock stands there: events, and a wait for them."""

    def __init__(self, run: Callable[[], object], device: str = "cpu") -> None:
        self._run, self._on_gpu = run, device != "cpu"

    def seconds(self, runs: int) -> float:
        if self._on_gpu:
            return self._seconds_on_gpu(runs)
        run = self._run
        start = time.perf_counter()
        for _ in range(runs):
            run()
        return time.perf_counter() - start

    def _seconds_on_gpu(self, runs: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(runs):
            self._run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


def medians(sides: Mapping[str, Timed], rounds: int) -> dict[str, float]:
    """Seconds per run of each side: the median over rounds in which every side has its turn.

    A turn is a burst of runs that lasts about 20 ms, so that a clock tick or a switch of tasks does
    not decide it; sides take turns, so that whatever else the machine does hits them alike.
    """
    bursts = {name: _burst_length(side) for name, side in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            times[name].append(side.seconds(bursts[name]) / bursts[name])
    return {name: statistics.median(of_side) for name, of_side in times.items()}


def ratio(ours: Timed, other: Timed, seconds: float = 2.0) -> float:
    """The time of ours over that of the other: the median over rounds of what the two bursts of a round give.

    At least 41 rounds, and as many as fit into these seconds; in every second one the other goes first. A ratio is
    taken of neighbours in time, so that a machine that is busier in some rounds does not come into it. The bursts
    are short, and of as many runs each: on a busy machine 800 rounds of 1 ms are twice as exact as 41 of 20 ms.
    """
    runs = min(_burst_length(side, 0.001) for side in (ours, other))
    ratios: list[float] = []
    end = time.perf_counter() + seconds
    while len(ratios) < LEAST_ROUNDS or time.perf_counter() < end:
        first, second = (ours, other) if len(ratios) % 2 else (other, ours)
        times = {side: side.seconds(runs) for side in (first, second)}
        ratios.append(times[ours] / times[other])
    return statistics.median(ratios)


def _burst_length(side: Timed, seconds: float = SECONDS_PER_BURST) -> int:
    side.seconds(3)
    return max(1, int(seconds / max(side.seconds(1), 1e-6)))
