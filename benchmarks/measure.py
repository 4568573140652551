"""One row, measured: every side checked, then timed side by side; peaks one by one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import memory
from benchmarks.check import check
from benchmarks.clock import Here, medians
from benchmarks.jax_client import JaxError
from benchmarks.limits import needs
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
    from benchmarks.jax_client import Jax
    from benchmarks.limits import Rates
    from benchmarks.rows.row import Row


def measured(
    row: Row, place: Place, rates: Rates, *, rounds: int, compiled: bool, jax: Jax | None
) -> dict[str, Any]:
    """Seconds and bytes of each column, seconds to compile, and the least seconds by the machine's rates.

    A side that raises, or is off the result in float64, is an error; but what torch or JAX cannot compile is noted.
    """
    torch._dynamo.reset()  # what earlier rows compiled would be tried first
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
                # It remembers operations wrongly after that, and cannot compile others.
                FakeTensorMode.cache_clear()
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
        "row": row.name,
        "number": row.number,
        "seconds": seconds,
        "bytes": {c: memory.peak("benchmarks.rows", row.name, c, place) for c in EAGER if c in sides},
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
