"""Files that could drift apart: README's tour and examples/tour.py; the version, where it is written."""

from __future__ import annotations

import ast
import doctest
import runpy
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "tour.py"


def tour() -> list[doctest.Example]:
    text = (ROOT / "README.md").read_text()
    section = text.split("\n## Tour\n")[1].split("\n## ")[0]
    return doctest.DocTestParser().get_examples(section)


def unprinted(statement: ast.stmt) -> str:
    """The statement; of ``print(x)`` it is ``x``, as a prompt prints that."""
    match statement:
        case ast.Expr(ast.Call(ast.Name("print"), [printed], [])):
            return ast.unparse(printed)
    return ast.unparse(statement)


def test_script_has_the_statements_of_the_tour() -> None:
    docstring, *statements = ast.parse(SCRIPT.read_text()).body
    assert isinstance(docstring, ast.Expr)
    shown = [ast.unparse(ast.parse(example.source).body[0]) for example in tour()]
    assert [unprinted(statement) for statement in statements] == shown


def test_script_prints_what_the_tour_shows(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(SCRIPT))
    assert capsys.readouterr().out == "".join(example.want for example in tour())


def test_citation_has_the_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"\nversion: {project['version']}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\nlicense: {project['license']}\n" in (ROOT / "CITATION.cff").read_text()
