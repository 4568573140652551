"""autodiff beside torch.func, torch.autograd.functional, raw autograd and JAX: ``python -m benchmarks``.

With ``--before COMMIT`` beside itself as well, as it was at that commit: no row may have become slower, or take more
memory.
"""

from __future__ import annotations

import argparse
import datetime as dt
import itertools
import json
import platform
import shlex
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import before, growth, operators, pair, promises
from benchmarks.bars import bars
from benchmarks.jax_client import Jax
from benchmarks.limits import Rates, rates
from benchmarks.measure import measured
from benchmarks.report import Lines, before_line, growth_lines
from benchmarks.rows import ROWS
from benchmarks.rows.row import Place


def main() -> int:
    options = _options()
    with before.exported(options.before) if options.before else nullcontext("") as copy:
        return _run(options, copy)


def _run(options: argparse.Namespace, copy: str) -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    place = Place(device=options.device)
    there = replace(place, before=copy)
    chosen = [
        row
        for row in ROWS
        if (options.rows is None and (options.full or row.short)) or row.number in (options.rows or ())
    ]
    at_most = rates(options.device)
    jax = options.jax if options.device == "cpu" else ""
    results: dict[str, Any] = {"about": _about(at_most, options.device, jax)}
    results |= {"rows": [], "growth": [], "promises": []}
    if copy:
        results["about"]["before"] = before.described(options.before)
        results["before"] = []
    print(json.dumps(results["about"], indent=1))
    if options.full and not jax:
        print("JAX is left out: --jax wants the Python of an environment that has it.")
    lines = Lines(before=bool(copy))
    rounds = 21 if options.full else 11
    for row in chosen:
        one = measured(row, place, at_most, rounds=rounds, compiled=options.full, jax=jax)
        results["rows"].append(one)
        beside = pair.compared("benchmarks.rows", row, there) if copy else None
        lines.add(one, beside)
        if beside:
            results["before"].append(beside)
    if options.full and (options.rows is None or 9 in options.rows):
        for one in growth.GROWTHS:
            for of_column in growth.measured(one, place, rounds=5):
                results["growth"].append(of_column)
                print(growth_lines(of_column), flush=True)
            for row in map(one.row, one.sizes if copy else ()):
                beside = pair.compared(growth.__name__, row, there)
                results["before"].append(beside)
                print(before_line(beside), flush=True)
    if options.rows is None and options.device == "cpu":
        kept = itertools.chain(promises.kept(), operators.kept() if options.full else ())
        results["promises"] = [promise._asdict() for promise in kept]
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return _verdict(results, strict=options.strict)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument(
        "--full", action="store_true", help="all rows, compiled columns, growth and operators"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    parser.add_argument("--rows", type=int, nargs="+", help="the rows of these numbers only")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument(
        "--before", metavar="COMMIT", help="compare every row with the package as it was at this commit"
    )
    parser.add_argument(
        "--jax", metavar="PYTHON", default="", help="the Python of an environment that has JAX"
    )
    return parser.parse_args()


def _about(at_most: Rates, device: str, python: str) -> dict[str, Any]:
    about: dict[str, Any] = {
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks", *_shown(sys.argv[1:])]),
        "processor": _processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": 1,
        "matrix rate, operations/s": at_most.operations,
        "of torch.mm": at_most.operations_of_mm,
        "copy rate, bytes/s": at_most.bytes,
    }
    if device != "cpu":
        about["card"] = torch.cuda.get_device_name()
    if python:
        with Jax(python) as jax:
            about |= {"JAX": jax.version, "JAX's matrix rate, operations/s": jax.matrix_rate()}
    return about


def _shown(arguments: list[str]) -> list[str]:
    """The arguments, paths cut down to their names."""
    return [Path(argument).name if "/" in argument else argument for argument in arguments]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _verdict(results: dict[str, Any], *, strict: bool) -> int:
    held = bars(results)
    missed = [bar for bar in held if not bar.met]
    print(f"\n{len(held) - len(missed)} of {len(held)} bars met.")
    for bar in missed:
        print(f"falls short: {bar}")
    return int(strict and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
