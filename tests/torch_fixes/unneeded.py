"""Print the fixes whose tests pass without them on the installed torch: ``python tests/torch_fixes/unneeded.py``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

_TESTS = Path(__file__).parents[1]
sys.path[:0] = map(str, (_TESTS.parent, _TESTS, _TESTS / "support"))

from autodiff.torch_fixes import FIXES, Fix  # noqa: E402  found by the path above
from table import TRIALS  # noqa: E402
from table.row import has_torch  # noqa: E402


def is_needed(fix: Fix) -> bool:
    """Whether one of the fix's tests fails without it."""
    trials = [trial for trial in TRIALS if {trial.row.name, str(trial)} & fix.tests_here()]
    for trial in trials:
        if has_torch(trial.row.needs):
            torch.manual_seed(20)
            if trial.failure("autodiff", without=fix.name) is not None:
                return True
    return False


def main() -> None:
    """A line for each row of the table."""
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}")
    for fix in FIXES:
        if not fix.is_needed:
            print(f"{fix.name}: not active")
            continue
        with fix.switched_off():
            needed = is_needed(fix)
        print(f"{fix.name}: {'needed' if needed else 'UNNECESSARY'}")


if __name__ == "__main__":
    main()
