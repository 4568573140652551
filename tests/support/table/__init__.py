"""Where torch is wrong, slow or refuses: every row a body of its own, in sections.

test_table.py runs each with autodiff and with torch; page.py makes docs/where_torch_is_wrong.md of them.
"""

from __future__ import annotations

from table.attention_rows import ATTENTION
from table.calls import CALLS
from table.compiling import COMPILING
from table.graphs import GRAPHS
from table.operations import OPERATIONS
from table.row import Trial
from table.threads import THREADS
from table.twice_forward import TWICE

SECTIONS = [THREADS, TWICE, OPERATIONS, ATTENTION, GRAPHS, CALLS, COMPILING]
ROWS = [row for section in SECTIONS for row in section.rows]
TRIALS = [Trial(row, value) for row in ROWS for value in row.over or [None]]
