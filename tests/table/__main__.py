"""``python -m table TRIAL LIBRARY`` runs one trial of the table, and says how it fails."""

from __future__ import annotations

import sys

from table import TRIALS
from table.row import failure_of

name, library = sys.argv[1:]
trial = next(trial for trial in TRIALS if str(trial) == name)
failure = failure_of(lambda: trial.run(library))
if failure is not None:
    sys.stdout.write(failure)
    sys.exit(1)
