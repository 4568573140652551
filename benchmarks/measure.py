"""One row, measured: every side checked, then timed side by side; peaks one by one."""

from __future__ import annotations

import logging
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import memory
from benchmarks.check import check
from benchmarks.clock import Here, medians
from benchmarks.jax_client import Jax, JaxError
from benchmarks.limits import needs
from benchmarks.rows import ROWS
from benchmarks.rows.row import (
    AUTODIFF,
    BY_HAND,
    COMPILED_FROM,
    EAGER,
    JAX,
    OfJax,
    Place,
    Side,
)

if TYPE_CHECKING:
    from benchmarks.clock import Timed
    from benchmarks.limits import Rates
    from benchmarks.rows.row import Row


def measured(
    row: Row, place: Place, rates: Rates, *, rounds: int, compiled: bool, jax: str
) -> dict[str, Any]:
    """Seconds and bytes of each column, seconds to compile, and the least seconds by the machine's rates.

    A side that raises, or is off the result in float64, is an error; but what torch or JAX cannot compile is noted.
    Each row has a process of its own: what torch.func cannot compile leaves torch unable to compile others.
    """
    with ProcessPoolExecutor(1, memory.PROCESSES) as process:
        timed = process.submit(_timed, row.name, place, rates, rounds, compiled, jax).result()
    peaks = {c: memory.peak("benchmarks.rows", row.name, c, place) for c in EAGER if c in row.sides(place)}
    return {"row": row.name, "number": row.number, **timed, "bytes": peaks}


def _timed(name: str, place: Place, rates: Rates, rounds: int, compiled: bool, python: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.CRITICAL)  # what does not compile is told in the table
    (row,) = (row for row in ROWS if row.name == name)
    with Jax(python) if python and JAX in row.sides(place) else nullcontext() as jax:
        return _timed_here(row, place, rates, rounds, compiled, jax)


def _timed_here(
    row: Row, place: Place, rates: Rates, rounds: int, compiled: bool, jax: Jax | None
) -> dict[str, Any]:
    reference = row.sides(Place(torch.float64, place.device))[BY_HAND].run()
    sides = row.sides(place)
    clocks: dict[str, Timed] = {}
    for column in EAGER:
        if column in sides:
            check(f"{row.name}: {column}", sides[column].run(), reference)
            clocks[column] = Here(sides[column].run, place.device)
    compiling, failed = {}, {}
    for column, eager in COMPILED_FROM.items() if compiled else ():
        if eager in row.compiles and eager in sides:
            try:
                clocks[column], compiling[column] = _compiled(row, column, sides[eager], reference, place)
            except Exception as error:  # noqa: BLE001  whatever the compiler raises is what it does here
                failed[column] = _first_line(error)
    if jax is not None and isinstance(of_jax := sides.get(JAX), OfJax):
        try:
            result, compiling[JAX] = jax.make(of_jax)
            check(f"{row.name}: {JAX}", result, reference)
            clocks[JAX] = jax
        except JaxError as error:
            failed[JAX] = _first_line(error)
    seconds = medians(clocks, rounds)
    need = needs(sides[AUTODIFF])
    return {
        "seconds": seconds,
        "seconds to compile": compiling,
        "does not compile": failed,
        "operations": need.operations,
        "bytes in and out": need.bytes,
        "least seconds": need.seconds(rates),
    }


def _compiled(row: Row, column: str, side: Side, reference: Any, place: Place) -> tuple[Here, float]:
    """The side under torch.compile, and the seconds that the first run took."""
    compiled = Side(torch.compile(side.func, fullgraph=True), side.args)
    start = time.perf_counter()
    result = compiled.run()
    seconds = time.perf_counter() - start
    check(f"{row.name}: {column}", result, reference)
    return Here(compiled.run, place.device), seconds


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
