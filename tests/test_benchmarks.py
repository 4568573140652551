"""The benchmark: its rows fit together, its checks can fail, and its page is what its results say."""

from __future__ import annotations

import ast
import json
import multiprocessing
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import autodiff
from benchmarks import bars, before, clock, growth, memory, page, pair, report
from benchmarks.check import check
from benchmarks.limits import Rates, needs
from benchmarks.memory import peak_here
from benchmarks.rows import ROWS
from benchmarks.rows.row import AUTODIFF, BEFORE, BY_HAND, EAGER, JAX, OfJax, Place, Row, Side

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
SIDES = ast.parse((ROOT / "benchmarks" / "jax_side.py").read_text())
TINY = [row for row in ROWS if row.number == 1]


def test_rows_have_names_of_their_own() -> None:
    names = [row.name for row in [*ROWS, *growth.ROWS]]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("row", TINY, ids=lambda row: row.name)
def test_sides_agree_with_float64(row: Any) -> None:
    reference = row.sides(Place(torch.float64))[BY_HAND].run()
    for column, side in row.sides(Place()).items():
        if column in EAGER:
            check(column, side.run(), reference)


def test_what_jax_is_asked_for_is_there() -> None:
    functions = {node.name for node in ast.walk(SIDES) if isinstance(node, ast.FunctionDef)}
    transforms = {node.value for node in ast.walk(SIDES) if isinstance(node, ast.Constant)}
    asked = [side for row in TINY for side in row.sides(Place()).values() if isinstance(side, OfJax)]
    assert len(asked) == 5
    for side in asked:
        assert side.function in functions
        assert side.transform in transforms


@pytest.mark.parametrize(
    "wrong", [torch.tensor([1.0, 2.001]), torch.tensor([1.0]), torch.tensor([1.0, torch.nan])]
)
def test_a_wrong_result_is_an_error(wrong: torch.Tensor) -> None:
    check("right", {"a": torch.tensor([1.0, 2.0])}, torch.tensor([1.0, 2.0], dtype=torch.float64))
    with pytest.raises(AssertionError, match="wrong"):
        check("wrong", wrong, torch.tensor([1.0, 2.0], dtype=torch.float64))


def test_the_meter_counts_what_lives_at_a_time() -> None:
    x = torch.ones(1024, 256)  # 1 MiB

    def run() -> torch.Tensor:
        y = x + 1
        y = y * 2  # the old one is given back after the new one is there
        return y.sum()

    assert 2 * 2**20 <= peak_here(Side(run, ()), "cpu") <= 2 * 2**20 + 1024


def test_the_limit_counts_products_and_traffic() -> None:
    a, b = torch.ones(8, 16), torch.ones(16, 4)
    need = needs(Side(torch.mm, (a, b)))
    assert need.operations == 2 * 8 * 16 * 4
    assert need.bytes == 4 * (8 * 16 + 16 * 4 + 8 * 4)
    assert need.seconds(Rates(operations=1024.0, operations_of_mm=1.0, bytes=1e9)) == pytest.approx(1.0)
    assert need.seconds(Rates(operations=1e9, operations_of_mm=1.0, bytes=448.0)) == pytest.approx(2.0)


def test_exponent_of_a_power() -> None:
    assert growth.exponent((1, 10, 100), [3.0, 300.0, 30000.0]) == pytest.approx(2.0)


def result(name: str, number: int, seconds: dict[str, float], peak: int = 2**20) -> dict[str, Any]:
    return {"row": name, "number": number, "seconds": seconds, "bytes": {AUTODIFF: peak, BY_HAND: 2**20}}


def test_bars_that_are_missed_are_named() -> None:
    rows = [
        result("fine", 2, {AUTODIFF: 1.0, "torch.func": 2.0, BY_HAND: 1.0}),
        result("slow", 2, {AUTODIFF: 2.2, "torch.func": 2.0, BY_HAND: 1.0}, peak=2**21),
    ]
    held = bars.bars({"rows": rows, "growth": [], "promises": [{"name": "p", "value": 2.0, "bound": 1.0}]})
    assert {bar.name for bar in held if not bar.met} == {
        "time of slow, over torch's better",
        "time of slow, over by hand",
        "peak of slow, over by hand",
        "geometric mean of the times over torch's better",
        "p",
    }


IMPORTS = """\
\"\"\"About autodiff.\"\"\"
import autodiff
from autodiff import grad; import autodiff.core.trees as trees
from autodiffs import autodiff_tape  # autodiff
if root == "autodiff" or lazy("autodiff.core"):
    raise ValueError("autodiff.grad failed", leaf.autodiff_tape)
"""


def test_the_copy_goes_by_another_name() -> None:
    assert before.renamed(IMPORTS).splitlines() == [
        '"""About autodiff."""',
        "import autodiff_before",
        "from autodiff_before import grad; import autodiff_before.core.trees as trees",
        "from autodiffs import autodiff_tape  # autodiff",
        'if root == "autodiff_before" or lazy("autodiff_before.core"):',
        '    raise ValueError("autodiff.grad failed", leaf.autodiff_tape)',
    ]


@pytest.fixture
def copy(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The package as it is at the last commit, in a temporary folder; modules and path are put back."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    monkeypatch.setattr(sys, "path", [*sys.path])
    with before.exported("HEAD") as folder:
        yield folder
    assert not Path(folder).exists()
    for name in [name for name in sys.modules if name.split(".")[0] == before.NAME]:
        del sys.modules[name]


def test_both_packages_run_side_by_side(copy: str) -> None:
    # In a process of its own: the second package takes over what the first has registered with torch.
    with multiprocessing.get_context("spawn").Pool(1) as processes:
        processes.apply(_run_side_by_side, (copy,))


def _run_side_by_side(copy: str) -> None:
    of_before = before.library(copy)
    assert of_before is not autodiff
    assert of_before.grad.__module__.startswith("autodiff_before.")
    assert autodiff.grad.__module__.startswith("autodiff.")
    with pytest.raises(AssertionError, match="not from elsewhere"):
        before.library("elsewhere")
    for row in TINY:
        reference = row.sides(Place(torch.float64))[BY_HAND].run()
        check(row.name, row.sides(Place(before=copy))[BEFORE].run(), reference)
    for row in ROWS:
        assert BEFORE in row.sides(Place(before=copy)), row.name
        assert BEFORE not in row.sides(Place()), row.name


def test_a_commit_that_is_not_there_is_named() -> None:
    with pytest.raises(SystemExit, match="--before: git archive"), before.exported("no-such-commit"):
        pass


class Steady:
    """Takes always as long; every third time something else has the machine, for as long as is said."""

    def __init__(self, seconds: float, switch: float) -> None:
        self.each, self.switch, self.asked = seconds, switch, 0

    def seconds(self, runs: int) -> float:
        self.asked += 1
        return runs * self.each + (0 if self.asked % 3 else self.switch)


def test_a_ratio_is_of_rounds_that_nothing_disturbs() -> None:
    ours, other = Steady(3e-4, switch=0.02), Steady(2e-4, switch=0.05)
    assert clock.ratio(ours, other, seconds=0.0) == pytest.approx(1.5)
    assert min(ours.asked, other.asked) >= 41


@pytest.mark.parametrize(
    ("measured", "counts"), [([1.029], 1.029), ([1.2, 1.0, 1.01], 1.01), ([1.04, 1.05, 1.0], 1.04)]
)
def test_a_slower_row_is_measured_again(
    measured: list[float], counts: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = list(measured)
    monkeypatch.setattr(pair, "_in_a_process", lambda *_: left.pop(0))
    monkeypatch.setattr(memory, "peak", lambda *args: {AUTODIFF: 2**20, BEFORE: 2**19}[args[2]])
    found = pair.compared("benchmarks.rows", TINY[0], Place())
    assert not left
    assert (found["time"], found["times"]) == (counts, measured)
    held = bars.bars(
        {
            "rows": [result("a", 2, {AUTODIFF: 1.0, "torch.func": 2.0, BY_HAND: 1.0})],
            "growth": [],
            "promises": [],
            "before": [found],
        }
    )
    assert {bar.name for bar in held if not bar.met} == {
        f"peak of {TINY[0].name}, over before",
        *([f"time of {TINY[0].name}, over before"] if counts > 1.03 else []),
    }
    line = report.before_line(found)
    assert f"{counts:.3f}" in line
    assert ("the median of" in line) == (len(measured) > 1)


def test_what_could_not_be_done_before_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Place(before="a folder")

    def sides(place: Place) -> Any:
        if place.before:
            raise AttributeError("module 'autodiff_before' has no attribute 'new'")
        return {BY_HAND: Side(torch.ones, (2,))}

    row = Row("of something new", 1, sides)
    monkeypatch.setattr(pair, "_in_a_process", lambda *_: pair.time_here(row, there))
    monkeypatch.setattr(before, "library", lambda folder: autodiff)
    found = pair.compared("benchmarks.rows", row, there)
    assert "has no attribute 'new'" in report.before_line(found)
    assert "time" not in found


def test_the_page_is_what_the_results_say() -> None:
    results = [
        json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    ]
    assert results
    assert (ROOT / page.PAGE).read_text() == page.page(results)
    assert JAX in page.page(results)
