"""docs/benchmarks.md, made from results: ``python -m benchmarks.page benchmarks/results/*.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import report
from benchmarks.bars import bars
from benchmarks.rows.row import COMPILED, JAX, TORCH_FUNC_COMPILED

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = Path("docs/benchmarks.md")
_OPENING = """\
# Benchmarks

autodiff beside what torch ships, beside raw `torch.autograd` as somebody writes it by hand who knows it well, and
beside JAX. The problems and all sides are in `benchmarks/rows`; `python -m nox -s bench -- --full` measures them, and
`python -m benchmarks.page` makes this page of what was measured. With `--before COMMIT` every row also runs with the
package as it was at that commit, taking turns with the present one: none may have become slower by more than 3 %, or
take 2 % more memory.

How it is measured: every result is first checked against the same derivative by hand in float64. Times are medians of
interleaved runs in one process, on one thread; JAX answers from a process of its own. Peaks are the most bytes that
torch's allocator has handed out at a time, one process a side. **Figures are multiples of autodiff's: above 1 the other
one takes more.** "Over the limit" is autodiff's time over the least that the machine would need: the operations of
its matrix products and convolutions at the machine's measured rate, or the bytes of arguments and results at its rate
of copying, whichever takes longer.
"""

_REASONS = """\
## Why it falls short where it does

- **JAX on matrix products.** It multiplies at more than twice the rate of `torch.mm` on the processor above, where
  torch takes MKL; oneDNN, which torch takes for other operations, is as fast as JAX at the same product. The input
  Hessians and second derivatives are little else. The training step, which torch fuses better, is the other way
  round.
- **Per-sample gradients of the convolutional network.** torch's rule for a batch of convolutions calls their backward
  pass five times, where grouped convolutions by hand call it twice. Over `torch.func` it is the C library, which gives
  memory back to the system in between: with `MALLOC_TRIM_THRESHOLD_=1000000000` autodiff takes 0.97 of its time.
- **Functions of 4 numbers.** One or two microseconds go into trees, checks, and the question who else watches the
  graph. `functional.jvp` also looks at every operation for what only a backward pass would see, which takes half as
  long as the operation itself.
- **A compiled tiny Hessian** takes some 22 microseconds, and half of them are torch's guards.
"""


def page(results: list[dict[str, Any]]) -> str:
    """The whole page."""
    return "\n".join([_OPENING, *(line for one in results for line in _section(one)), _REASONS])


def _section(results: dict[str, Any]) -> Iterator[str]:
    about = results["about"]
    yield f"## On {'a ' + about['card'] if 'card' in about else 'a CPU'}"
    yield ""
    yield f"{about['date']}; {_machine(about)}. `{about['command']}`"
    yield ""
    if "card" not in about:
        yield "```{image} _static/generated/benchmarks.svg"
        yield ":alt: Times of each library as multiples of autodiff's, by row, on a logarithmic scale"
        yield ":width: 100%"
        yield "```"
        yield ""
    yield "### Time"
    yield ""
    yield from report.times(results)
    yield ""
    yield "### Peak memory"
    yield ""
    yield "Rows of less than 128 KiB are left out."
    yield ""
    yield from report.peaks(results)
    yield ""
    if results["growth"]:
        yield "### Growth"
        yield ""
        yield "The exponent of a power of the size, fitted to five sizes."
        yield ""
        yield from report.growths(results)
        yield ""
    if any(COMPILED in row["seconds"] for row in results["rows"]):
        yield "### The first, compiling call"
        yield ""
        yield (
            "autodiff's comes first in its process, and takes along some 1.7 s in which torch loads its compiler.\n"
            "Generated code lay in torch's cache on disk."
        )
        yield ""
        yield from _compiling(results)
        yield ""
    yield from _verdict(results)


def _machine(about: dict[str, Any]) -> str:
    parts = [
        about.get("card") or about["processor"],
        f"Python {about['python']}",
        f"torch {about['torch']}",
        *([f"JAX {about['JAX']}"] if "JAX" in about else []),
        "one thread",
        f"{about['matrix rate, operations/s'] / 1e9:.0f} billion operations/s in matrix products",
        f"{about['of torch.mm'] / 1e9:.0f} of them in torch.mm",
    ]
    if "JAX" in about:
        parts.append(f"{about[JAX_RATE] / 1e9:.0f} in JAX's")
    return ", ".join([*parts, f"{about['copy rate, bytes/s'] / 1e9:.0f} GB/s copied"])


JAX_RATE = "JAX's matrix rate, operations/s"


def _compiling(results: dict[str, Any]) -> Iterator[str]:
    columns = [COMPILED, TORCH_FUNC_COMPILED, JAX]
    body = [
        [row["row"], *(_compile_cell(row, column) for column in columns)]
        for row in results["rows"]
        if row["seconds to compile"]
    ]
    yield from report.table(["", *columns], body)


def _compile_cell(row: dict[str, Any], column: str) -> str:
    if column in row["does not compile"]:
        return "fails"
    seconds = row["seconds to compile"].get(column)
    return "" if seconds is None else f"{seconds:.1f} s"


def _verdict(results: dict[str, Any]) -> Iterator[str]:
    held = bars(results)
    missed = [bar for bar in held if not bar.met]
    yield "### What was aimed at"
    yield ""
    yield f"{len(held) - len(missed)} of {len(held)} bars are met (`benchmarks/bars.py` lists them)."
    if missed:
        yield "These fall short:"
        yield ""
        yield from report.table(
            ["", "measured", "bar"], [[b.name, f"{b.value:.2f}", f"{b.bound:.2f}"] for b in missed]
        )
    yield ""


if __name__ == "__main__":
    PAGE.write_text(page([json.loads(Path(path).read_text()) for path in sys.argv[1:]]))
