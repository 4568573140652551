"""What a type checker, an editor and `typing.get_type_hints` know of public names."""

from __future__ import annotations

import inspect
import typing
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
