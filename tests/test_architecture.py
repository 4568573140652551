"""The floors of docs/architecture.md, the two seams, and for every public name an example and a place in the reference."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
from pathlib import Path

import pytest

import autodiff as ad
from autodiff.per_sample.api import PerSample
from autodiff.per_sample.report import Report
from autodiff.per_sample.run import Chunk

ROOT = Path(ad.__file__).parent
MODULES = {
    ".".join(["autodiff", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}


def listed_floors() -> list[tuple[int, str]]:
    """Floor and module of every line of the list in docs/architecture.md, lowest first."""
    text = (ROOT.parent / "docs" / "architecture.md").read_text()
    blocks = [block.split("```")[0].splitlines() for block in text.split("```text\n")[1:]]
    (lines,) = [block[1:] for block in blocks if block[0].strip() == "floors:"]
    return [(int(line.split()[0]), line.split()[1]) for line in lines if line.strip()]


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


def test_list_of_floors_is_complete_and_sorted() -> None:
    floors = listed_floors()
    assert [floor for floor, _ in floors] == sorted(floor for floor, _ in floors)
    names = [name for _, name in floors]
    assert len(set(names)) == len(names)
    # Packages and the map hold no logic of their own.
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert set(MODULES) - packages <= set(names), "a module without a floor"
    assert set(names) <= set(MODULES), "a floor for a module that is not there"


@pytest.mark.parametrize("name", [name for name, path in MODULES.items() if path.name != "__init__.py"])
def test_module_imports_only_from_below(name: str) -> None:
    order = [listed for _, listed in listed_floors()]
    below = set(order[: order.index(name)])
    imported = runtime_imports_of(MODULES[name])
    packages = {package for package, path in MODULES.items() if path.name == "__init__.py"}
    assert imported - below == set(), f"{name} imports from above or from a package"
    assert not imported & packages


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
            "autodiff.core.seam.",
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
        if name.startswith(("autodiff.core.seam.", "autodiff.core.trees")):
            continue
        private = {used for used in dotted_names(path) if used.startswith("torch.") and "._" in used}
        assert private == set(), f"{name} names {sorted(private)}"


def all_public_names() -> dict[str, object]:
    """Every name that a user may write, with what it stands for; torch's own among them."""
    found: dict[str, object] = {}
    for module in (ad, ad.functional, ad.pytree, ad.testing, ad.errors):
        found |= {
            f"{module.__name__}.{name}": getattr(module, name)
            for name in getattr(module, "__all__", vars(module))
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
    assert all(isinstance(node, allowed) for node in tree.body)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            assert all(alias.asname == alias.name for alias in node.names)


def test_drop_in_names_of_torch_func_are_there() -> None:
    import torch

    # linearize, vmap and the rest; what torch.func has and we have not must be named here.
    missing = {name for name in torch.func.__all__ if not hasattr(ad, name)}
    assert missing == set()
