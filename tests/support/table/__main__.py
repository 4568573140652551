"""``python -m table TRIAL LIBRARY FIX`` runs one trial of the table without a fix, or with all, and says how it fails."""

from __future__ import annotations

import sys
from contextlib import ExitStack

from autodiff.torch_fixes import FIXES
from table import TRIALS
from table.row import failure_of

name, library, without = sys.argv[1:]
trial = next(trial for trial in TRIALS if str(trial) == name)
with ExitStack() as stack:
    for fix in FIXES:
        if fix.name == without:
            stack.enter_context(fix.switched_off())
    failure = failure_of(lambda: trial.run(library))
if failure is not None:
    sys.stdout.write(failure)
    sys.exit(1)
