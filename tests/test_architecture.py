"""The floors of docs/architecture.md, the two seams, and for every public name an example and a place in the reference."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
from pathlib import Path

import pytest

import autodiff as ad
from autodiff.samples.api import PerSample
from autodiff.samples.report import Report
from autodiff.samples.run import Chunk

ROOT = Path(ad.__file__).parent
MODULES = {
    ".".join(["autodiff", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def listed_modules() -> list[str]:
    """The modules of the list in docs/architecture.md, lowest first."""
    text = (ROOT.parent / "docs" / "architecture.md").read_text()
    blocks = [block.split("```")[0].splitlines() for block in text.split("```text\n")[1:]]
    (lines,) = [block[1:] for block in blocks if block[0].strip() == "rooms:"]
    modules = []
    for line in lines:
        room, _, files = line.partition(":")
        modules += [f"autodiff.{room}.{file}" for file in files.split()] or [f"autodiff.{room}"]
    return modules


def imports_of(path: Path) -> set[str]:
    """Every autodiff module that the file imports, also inside functions and for types alone."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
    return {name for name in found if name.split(".")[0] == "autodiff"}


def runtime_imports_of(path: Path) -> set[str]:
    """As `imports_of`, without what stands under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    stripped = ast.unparse(tree)
    return {name for name in imports_of(path) if name in stripped or name.rpartition(".")[2] in stripped}


PACKAGES = {name for name, path in MODULES.items() if path.name == "__init__.py"}


def test_list_of_rooms_is_complete() -> None:
    names = listed_modules()
    assert len(set(names)) == len(names)
    # Packages are maps, and hold no logic of their own.
    assert set(MODULES) - PACKAGES == set(names)


@pytest.mark.parametrize("name", sorted(set(MODULES) - PACKAGES))
def test_module_imports_only_from_below(name: str) -> None:
    order = listed_modules()
    below = set(order[: order.index(name)])
    imported = runtime_imports_of(MODULES[name])
    # A room is imported by its map where all of it is lower.
    lower = {room for room in PACKAGES if {one for one in order if one.startswith(f"{room}.")} <= below}
    assert imported - below - lower == set(), f"{name} imports from above"


@pytest.mark.parametrize("room", sorted(PACKAGES - {"autodiff"}))
def test_room_is_a_map_without_logic(room: str) -> None:
    tree = ast.parse(MODULES[room].read_text())
    assert all(isinstance(node, (ast.Import, ast.ImportFrom, ast.Expr)) for node in tree.body)


def dotted_names(path: Path) -> set[str]:
    """Imports and attribute chains, as dotted names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


@pytest.mark.parametrize(
    ("forbidden", "home"),
    [
        (
            (
                "torch._C",
                "torch._VF",
                "torch._functorch",
                "torch.autograd.forward_ad",
                "torch.autograd.graph",
                "torch.utils._pytree",
            ),
            "autodiff._torch.",
        ),
        (("optree", "torch.utils._cxx_pytree"), "autodiff.core.trees"),
    ],
    ids=["torch's private parts", "optree"],
)
def test_seam_is_the_only_place_that_names(forbidden: tuple[str, ...], home: str) -> None:
    for name, path in MODULES.items():
        found = {
            used
            for used in dotted_names(path)
            if used.startswith(tuple(f"{f}." for f in forbidden)) or used in forbidden
        }
        assert not found or name.startswith(home), f"{name} names {sorted(found)}"


def test_private_torch_reaches_the_package_only_through_the_seam() -> None:
    for name, path in MODULES.items():
        if name.startswith(("autodiff._torch.", "autodiff.core.trees")):
            continue
        private = {used for used in dotted_names(path) if used.startswith("torch.") and "._" in used}
        assert private == set(), f"{name} names {sorted(private)}"


def all_public_names() -> dict[str, object]:
    """Every name that a user may write, with what it stands for; torch's own among them."""
    found: dict[str, object] = {}
    for module in (ad, ad.functional, ad.operators, ad.pytree, ad.testing, ad.errors):
        found |= {
            f"{module.__name__}.{name}": getattr(module, name)
            for name in getattr(module, "__all__", dir(module))
            if not name.startswith("_") and name != "annotations"
        }
    # What `per_sample` hands out.
    found |= {f"{cls.__module__}.{cls.__name__}": cls for cls in (PerSample, Chunk, Report)}
    return {name: value for name, value in found.items() if not inspect.ismodule(value)}


def public_names() -> dict[str, object]:
    """Those of our own."""
    return {
        name: value
        for name, value in all_public_names().items()
        if getattr(value, "__module__", "").startswith("autodiff")
    }


@pytest.mark.parametrize("name", public_names())
def test_public_name_has_a_docstring_with_an_example(name: str) -> None:
    value = public_names()[name]
    text = inspect.getdoc(value)
    assert text
    examples = doctest.DocTestParser().get_examples(text)
    assert any(example.want for example in examples), f"{name} has no example with a result"
    assert text.splitlines()[0].endswith(".")
    if inspect.isfunction(value):
        assert "Args:" in text
        assert "Returns:" in text or "Raises:" in text


@pytest.mark.parametrize("name", MODULES)
def test_module_says_its_role_and_no_file_is_long(name: str) -> None:
    text = MODULES[name].read_text()
    assert ast.get_docstring(ast.parse(text)), "a module docstring"
    assert len(text.splitlines()) <= 440
    assert MODULES[name].stem not in ("utils", "helpers", "common")


REFERENCE = (ROOT.parent / "docs" / "reference.md").read_text()


def described_names() -> set[str]:
    """What docs/reference.md describes by a directive."""
    found, module = set(), ""
    for directive, name, option in re.findall(
        r"^\.\. (\w+):: (\S+)\n(?: +:([\w-]+):)?", REFERENCE, re.MULTILINE
    ):
        match directive:
            case "currentmodule":
                module = name
            case "automodule" if option == "members":
                found |= {known for known in all_public_names() if known.startswith(f"{name}.")}
            case "autofunction" | "autoclass":
                found.add(f"{module}.{name}")
    return found


@pytest.mark.parametrize("name", all_public_names())
def test_public_name_is_in_the_reference(name: str) -> None:
    if name in public_names():
        assert name in described_names()
    else:
        # torch's own, described there.
        assert f"`{name.removeprefix('autodiff.')}`" in REFERENCE


def test_map_holds_no_logic() -> None:
    tree = ast.parse(MODULES["autodiff"].read_text())
    allowed = (ast.Import, ast.ImportFrom, ast.Expr)
    *imports, for_checkers = tree.body
    # What is loaded when it is first asked for, a type checker knows as well.
    assert isinstance(for_checkers, ast.If)
    assert ast.unparse(for_checkers.test) == "typing.TYPE_CHECKING"
    body = [*imports, *for_checkers.body]
    assert all(isinstance(node, allowed) for node in body)
    for node in body:
        if isinstance(node, ast.ImportFrom):
            assert all(alias.asname == alias.name for alias in node.names)


def test_drop_in_names_of_torch_func_are_there() -> None:
    import torch

    # linearize, vmap and the rest; what torch.func has and we have not must be named here.
    missing = {name for name in torch.func.__all__ if not hasattr(ad, name)}
    assert missing == set()
