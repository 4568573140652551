"""Ctrl-C at a random instant of a random call, thousands of times: nothing may be left, and the call works again.

Each few are tried in a process of their own, which a lock that is held for ever would stop.
"""

from __future__ import annotations

import ast
import os
import random
import select
import signal
import time
import traceback
from collections import Counter
from typing import TYPE_CHECKING, Any

from interrupted_calls import calls, state
from soak.containers import distance

if TYPE_CHECKING:
    from collections.abc import Callable

POSSIBLE = hasattr(os, "fork") and hasattr(signal, "setitimer")
# How many are tried in one process, and for how long, in seconds.
IN_ONE_PROCESS, MOST_SECONDS = 25, 20


class Interrupt(KeyboardInterrupt):
    """What the signal raises."""


def run(
    seed: int, count: int, progress: Callable[[range], Any] = lambda numbers: numbers
) -> tuple[int, Counter[str]]:
    """Interrupt ``count`` times; how many interrupts came in time, and how often what was left behind."""
    every = calls()
    durations, expected = {}, {}
    for name, call in every.items():
        call()
        began = time.perf_counter()
        expected[name] = call()
        durations[name] = time.perf_counter() - began
    came, left = 0, Counter[str]()
    index = 0
    for _ in progress(range(0, count, IN_ONE_PROCESS)):
        last = min(index + IN_ONE_PROCESS, count)
        while index < last:
            tried, interrupted, found = _in_a_process(seed, range(index, last), every, durations, expected)
            came += interrupted
            index += tried
            left.update([found] if found else [])
    return came, left


def _in_a_process(seed: int, numbers: range, *known: Any) -> tuple[int, int, str]:
    """How many were tried, how many of them interrupted a call, and what the last one left behind."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.signal(signal.SIGALRM, _interrupt)
        with os.fdopen(writing, "w") as report:
            for index in numbers:
                try:
                    found = _one(random.Random(f"{seed}/{index}"), *known)
                except BaseException:  # noqa: BLE001  whatever it is, it is a finding
                    found = f"{index}: {traceback.format_exc()}"
                report.write(f"{found!r}\n")
                report.flush()
                if found:
                    break
        os._exit(0)
    os.close(writing)
    found = _read(reading, child)
    interrupted = sum(one is not False for one in found)
    if found and found[-1]:
        return len(found), interrupted, found[-1]
    if len(found) < len(numbers):
        return len(found) + 1, interrupted, f"{numbers[len(found)]}: the process hangs, or has ended"
    return len(found), interrupted, ""


def _read(reading: int, child: int) -> list[Any]:
    """What the child reports; it is ended if it takes too long."""
    until, text = time.monotonic() + MOST_SECONDS, b""
    while select.select([reading], [], [], max(0.0, until - time.monotonic()))[0]:
        more = os.read(reading, 65536)
        if not more:
            break
        text += more
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    return [ast.literal_eval(line) for line in text.decode().splitlines()]


def _interrupt(*_: object) -> None:
    raise Interrupt


def _one(
    draw: random.Random,
    every: dict[str, Callable[[], Any]],
    durations: dict[str, float],
    expected: dict[str, Any],
) -> Any:
    """What the interrupt left behind, "" for nothing; False if it came too late."""
    name = draw.choice(sorted(every))
    before = state()
    try:
        signal.setitimer(signal.ITIMER_REAL, max(1e-6, draw.uniform(0, 1.1) * durations[name]))
        every[name]()
        signal.setitimer(signal.ITIMER_REAL, 0)
        came = False
    except BaseException as error:
        # torch's own generators may raise something else on the way.
        first: BaseException | None = error
        while first is not None and not isinstance(first, Interrupt):
            first = first.__context__
        if first is None:
            raise
        came, where = True, traceback.format_exc()
    if not came:
        return False
    # The interrupt's frames are gone now, and what they hold.
    after = state()
    left = {what: value for what, value in after.items() if value != before[what]}
    if left:
        return f"{name}: {left}\n{where}"
    error = distance(every[name](), expected[name])
    return "" if error < 1e-12 else f"{name}: off by {error}"
