"""The rows of the benchmark, by the kind of problem."""

from benchmarks.rows import dense, large, layers, small, trees

ROWS = sorted([*small.ROWS, *dense.ROWS, *layers.ROWS, *trees.ROWS, *large.ROWS], key=lambda row: row.number)
