"""What a type checker, an editor and `typing.get_type_hints` know of public names."""

from __future__ import annotations

import inspect
import re
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from autodiff import types
from autodiff.transforms.custom import CustomJvp, CustomVjp
from test_architecture import public_names

if TYPE_CHECKING:
    from collections.abc import Callable

PUBLIC = public_names() | {"autodiff.CustomVjp": CustomVjp, "autodiff.CustomJvp": CustomJvp}


def annotated() -> dict[str, Callable[..., Any]]:
    """Public functions with their overloads, and the methods of public classes."""
    found: dict[str, Callable[..., Any]] = {}
    for name, value in PUBLIC.items():
        owners = value.__mro__ if inspect.isclass(value) else ()
        of_classes = [vars(owner) for owner in owners if owner.__module__.startswith("autodiff")]
        methods = {f"{name}.{key}": one for table in of_classes for key, one in table.items()}
        for known, one in ({name: value} | methods).items():
            if inspect.isfunction(one):
                found[known] = one
                found |= {f"{known} {at}": way for at, way in enumerate(typing.get_overloads(one))}
    return found


@pytest.mark.parametrize("name", annotated())
def test_type_hints_resolve(name: str) -> None:
    typing.get_type_hints(annotated()[name])


def test_aliases_are_there_at_run_time() -> None:
    assert types.Argnums == int | str | tuple[int | str, ...]


def test_no_docstring_sends_the_reader_elsewhere() -> None:
    texts = {name: inspect.getdoc(value) or "" for name, value in (PUBLIC | annotated()).items()}
    assert [name for name, text in texts.items() if " as for " in " ".join(text.split())] == []


def test_user_code_has_the_types_that_its_comments_say() -> None:
    api = pytest.importorskip("mypy.api")
    path = Path(__file__).parent / "support" / "typed_user_code.py"
    output, _, _ = api.run([str(path), "--config-file", str(Path(__file__).parent.parent / "pyproject.toml")])
    found = {}
    for line, error, note in re.findall(
        r"py:(\d+): (?:error: .*\[([\w-]+)\]|note: Revealed type is \"(.*)\")$", output, re.MULTILINE
    ):
        found[int(line)] = error or re.sub(r"\b(\w+\.)+(?=\w)", "", note)
    lines = enumerate(path.read_text().splitlines(), 1)
    assert found == {at: line.partition("  # ")[2] for at, line in lines if "  # " in line}, output
