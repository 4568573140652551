"""``python tests/soak``: 20,000 random compositions, and what they leave; see machine.py for what is asserted.

``--only INDEX`` runs one of them again, with everything that there is to know about it. ``--interrupts 10000`` presses
Ctrl-C so often, at random instants of other calls; see interrupts.py.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from conftest import CLEAN
from soak import interrupts, machine
from soak.compositions import compose

# After so many failures the rest would say little.
MOST_FAILURES = 20
MOST_GROWTH = 5.0


@dataclass
class Tally:
    """What is counted over all compositions."""

    returned: int = 0
    tracked: int = 0
    by_differences: int = 0
    error: float = 0.0
    error_of_differences: float = 0.0
    raised: Counter[str] = field(default_factory=Counter)
    transforms: Counter[str] = field(default_factory=Counter)
    depths: Counter[int] = field(default_factory=Counter)
    failures: list[int] = field(default_factory=list)

    def add(self, outcome: machine.Outcome) -> None:
        self.transforms.update(outcome.composition.names)
        self.depths[len(outcome.composition.layers)] += 1
        if outcome.raised:
            self.raised[outcome.raised] += 1
            return
        self.returned += 1
        self.tracked += bool(outcome.composition.tracked)
        self.error = max(self.error, outcome.error)
        if outcome.by_differences is not None:
            self.by_differences += 1
            self.error_of_differences = max(self.error_of_differences, outcome.by_differences)


def memory() -> tuple[float, int]:
    """Resident MiB and living tensors, once all that can be freed is."""
    gc.collect()
    if sys.platform == "linux":
        # Pages that glibc keeps for later are not in use; how many it keeps is chance.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)
    tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
    return psutil.Process().memory_info().rss / 2**20, tensors


def progress(numbers: range) -> object:
    """The numbers with a bar, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return numbers
    return tqdm(numbers, mininterval=1.0, unit="composition")


def soak(seed: int, numbers: range) -> int:
    """Run them all; the exit code."""
    tally, began, warm = Tally(), time.perf_counter(), (0.0, 0)
    for index in progress(numbers):
        if index == numbers.start + len(numbers) // 10:
            warm = memory()
        try:
            tally.add(machine.check(seed, index))
        except Exception:  # noqa: BLE001  whatever it is, it is a finding
            tally.failures.append(index)
            say(
                f"\ncomposition {index}: python tests/soak --seed {seed} --only {index}",
                traceback.format_exc(),
            )
            torch.set_grad_enabled(True)
        if len(tally.failures) == MOST_FAILURES:
            break
    grown, more = (now - then for now, then in zip(memory(), warm, strict=True))
    # What the library keeps itself is at rest where it is zero.
    left = {name: value for name, value in machine.state().items() if value != CLEAN.get(name, 0)}
    report(tally, grown, int(more), left, time.perf_counter() - began)
    return int(bool(tally.failures) or bool(left) or grown > MOST_GROWTH)


def interrupt(seed: int, count: int) -> int:
    """Interrupt so many calls; the exit code."""
    began = time.perf_counter()
    came, left = interrupts.run(seed, count, progress)
    say(*(f"{times} x {what}" for what, times in left.most_common()))
    say(
        f"interrupts: {came} of {count} came in time; {left.total()} left something behind",
        f"seconds: {time.perf_counter() - began:.0f}",
    )
    return int(bool(left))


def report(tally: Tally, grown: float, more: int, left: dict[str, object], seconds: float) -> None:
    raised = sum(tally.raised.values())
    say(
        f"compositions: {tally.returned + raised}, {tally.returned} returned, {raised} raised {dict(tally.raised)}",
        f"transforms: {dict(tally.transforms.most_common())}",
        f"depths: {dict(sorted(tally.depths.items()))}",
        f"largest error: {tally.error:.1e} from raw autograd; {tally.error_of_differences:.1e} from differences, "
        f"which checked {tally.by_differences}; {tally.tracked} were tracked from outside",
        f"memory: {grown:+.1f} MiB and {more:+d} tensors since the first tenth",
        f"left behind: {left or 'no level, no lock, no mode'}",
        f"failures: {tally.failures or 'none'}",
        f"seconds: {seconds:.0f}",
    )


def say(*lines: str) -> None:
    sys.stdout.write("\n".join([*lines, ""]))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/soak", description=__doc__)
    parser.add_argument("--compositions", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--interrupts", type=int, help="how many calls to interrupt, in place of all compositions"
    )
    parser.add_argument("--only", type=int, help="the number of one composition to run again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for message in machine.QUIET:
        warnings.filterwarnings("ignore", message)
    if options.interrupts is not None:
        warnings.simplefilter("ignore")
        return interrupt(options.seed, options.interrupts)
    if options.only is None:
        return soak(options.seed, range(options.compositions))
    say(str(compose(options.seed, options.only)))
    say(str(machine.check(options.seed, options.only)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
