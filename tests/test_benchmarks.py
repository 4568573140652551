"""The benchmark: its rows fit together, its checks can fail, and its page is what its results say."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bars, growth, page
from benchmarks.check import check
from benchmarks.limits import Rates, needs
from benchmarks.memory import peak_here
from benchmarks.rows import ROWS
from benchmarks.rows.row import AUTODIFF, BY_HAND, EAGER, JAX, OfJax, Place, Side

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


def test_the_page_is_what_the_results_say() -> None:
    results = [
        json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    ]
    assert results
    assert (ROOT / page.PAGE).read_text() == page.page(results)
    assert JAX in page.page(results)
