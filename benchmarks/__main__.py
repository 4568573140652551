"""Run the comparisons: ``python -m benchmarks [--strict] [--json FILE]``."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import memory
from benchmarks.rows import rows
from benchmarks.timing import medians

IMPORT_BAR_IN_SECONDS = 0.150
_IMPORT = (
    "import time, torch; start = time.perf_counter(); import autodiff; print(time.perf_counter() - start)"
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--strict", action="store_true", help="exit with 1 where a bar is missed")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread; ratio = autodiff / other, to stay under the bar\n")
    print(f"{'':60s} {'autodiff':>13s} {'other':>13s} {'other is':26s} ratio       bar")
    results = [*_times(), *_peaks(), _import_time()]
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=2))
    missed = [result for result in results if result["ratio"] > result["bar"]]
    print(f"\n{len(results) - len(missed)} of {len(results)} bars met.")
    for result in missed:
        print(f"falls short: {result['name']}: {result['ratio']:.2f}, bar {result['bar']:.2f}")
    return int(options.strict and bool(missed))


def _times() -> list[dict[str, object]]:
    results = []
    for row in rows():
        of_side = medians({"autodiff": row.ours, "other": row.theirs})
        results.append(_result(row.name, row.against, row.bar, of_side, 1e6, "us"))
    return results


def _peaks() -> list[dict[str, object]]:
    results = [
        _result(f"memory of {case.name}", case.against, case.bar, memory.peaks(key), 2**-20, "MiB")
        for key, case in memory.CASES.items()
    ]
    sides = {"autodiff": memory.peak_of_per_sample(), "other": memory.BUDGET_BAR}
    name = "memory of per_sample to disk, 1210 parameters, 1797 samples"
    return [*results, _result(name, "budget", 1.0, sides, 2**-20, "MiB")]


def _import_time() -> dict[str, object]:
    seconds = [
        float(
            subprocess.run([sys.executable, "-c", _IMPORT], check=True, capture_output=True, text=True).stdout
        )
        for _ in range(5)
    ]
    sides = {"autodiff": statistics.median(seconds), "other": IMPORT_BAR_IN_SECONDS}
    return _result("import autodiff after torch", "budget", 1.0, sides, 1e3, "ms")


def _result(
    name: str, against: str, bar: float, sides: dict[str, float], scale: float, unit: str
) -> dict[str, object]:
    ratio = sides["autodiff"] / sides["other"]
    ours, theirs = (f"{sides[side] * scale:9.1f} {unit}" for side in ("autodiff", "other"))
    verdict = "" if ratio <= bar else "  SHORT"
    print(
        f"{name:60s} {ours:>13s} {theirs:>13s} {against:26s} {ratio:5.2f}  bar {bar:4.2f}{verdict}",
        flush=True,
    )
    return {"name": name, "against": against, "bar": bar, "ratio": ratio, "unit": unit, **sides}


if __name__ == "__main__":
    sys.exit(main())
