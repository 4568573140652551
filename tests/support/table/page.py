"""The page docs/where_torch_is_wrong.md below its marker, made of the rows. `python -m table.page` writes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from autodiff.torch_fixes import FIXES
from table import SECTIONS

if TYPE_CHECKING:
    from autodiff.torch_fixes import Fix
    from table.row import Row

PAGE = Path(__file__).parents[3] / "docs" / "where_torch_is_wrong.md"
MARKER = "<!-- From here on the rows of tests/support/table: `python -m table.page` in tests/support writes them. -->\n"
THREADS = {
    "pytorch#": "https://github.com/pytorch/pytorch/issues/",
    "pytorch PR#": "https://github.com/pytorch/pytorch/pull/",
    "functorch#": "https://github.com/pytorch/functorch/issues/",
}


def tables() -> str:
    """A section of the page for each of the table's."""
    parts = []
    for section in SECTIONS:
        lines = [
            f"## {section.title}",
            "",
            "| case | torch 2.13 | autodiff | test, thread |",
            "|---|---|---|---|",
        ]
        parts.append("\n".join([*lines, *map(_line, section.rows)]))
    return "\n" + "\n\n".join(parts) + "\n"


def fixes() -> str:
    """The section on what mends torch: a line for each row of `autodiff.torch_fixes`."""
    lines = [
        "## The fixes",
        "",
        "What mends torch is in `autodiff/torch_fixes`, a row for each fix. A row is active where the installed torch",
        "needs it, and the tests that it names fail without it.",
        "",
        "| fix | operations | torch | torch versions | remedy | tests |",
        "|---|---|---|---|---|---|",
    ]
    return "\n" + "\n".join([*lines, *map(_line_of_fix, FIXES)]) + "\n"


def _line_of_fix(fix: Fix) -> str:
    versions = (
        f"{fix.needed_since} and newer"
        if fix.fixed_in is None
        else f"{fix.needed_since} to before {fix.fixed_in}"
    )
    tests = ", ".join(f"`{name}`" for name in fix.tests)
    thread = "" if fix.issue is None else f", {_link(fix.issue)}"
    return f"| {fix.name} | {fix.operations} | {fix.symptom} | {versions} | {fix.remedy} | {tests}{thread} |"


def _line(row: Row) -> str:
    torch = row.torch if row.mended is None else f"{row.torch}; mended in {row.mended}"
    ours = (
        row.ours
        if row.untrue is None
        else f"{row.ours}; not yet with torch {row.untrue[0]} and newer: {row.untrue[1]}"
    )
    test = f"`{row.name}`" if row.issue is None else f"`{row.name}`, {_link(row.issue)}"
    return f"| {row.case} | {torch} | {ours} | {test} |"


def _link(issue: str) -> str:
    start, number = issue.split("#")
    return f"[{issue}]({THREADS[f'{start}#']}{number})"


if __name__ == "__main__":
    PAGE.write_text(PAGE.read_text().split(MARKER)[0] + MARKER + tables() + fixes())
