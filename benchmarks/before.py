"""The package as it was at a commit, under another name, so that it runs in one process with the present one.

Hands on the folder of such a copy, and the copy as a library. Imports nothing of the benchmark, and not autodiff.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tarfile
import tempfile
import tokenize
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

PACKAGE, NAME = "autodiff", "autodiff_before"
_ROOT = Path(__file__).parents[1]
# A string that names a module, as import_module takes it, and no sentence that mentions one.
_NAME_OF_A_MODULE = re.compile(rf"""["']{PACKAGE}(\.\w+)*["']""")
# Loads all modules of the copy in a process of their own, and says what came along of the present package.
_ALONE = f"""
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import {NAME}
for module in pkgutil.walk_packages({NAME}.__path__, "{NAME}."):
    importlib.import_module(module.name)
print(*(name for name in sys.modules if name.split(".")[0] == "{PACKAGE}"))
"""


@contextmanager
def exported(commit: str) -> Iterator[str]:
    """A temporary folder that holds the package as it was at the commit, as ``autodiff_before``."""
    archive = _git("archive", commit, PACKAGE)
    with tempfile.TemporaryDirectory(prefix=f"{NAME}-") as folder:
        root = Path(folder).resolve()
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(root, filter="data")
        for path in (root / PACKAGE).rename(root / NAME).rglob("*.py"):
            path.write_text(renamed(path.read_text()))
        command = [sys.executable, "-c", _ALONE, str(root)]
        strangers = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        if strangers:
            raise AssertionError(f"{NAME} imports of the present package: {', '.join(strangers)}")
        yield str(root)


def described(commit: str) -> str:
    """The commit's hash and subject."""
    return _git("show", "--no-patch", "--format=%h %s", commit, "--").decode().strip()


def _git(*arguments: str) -> bytes:
    run = subprocess.run(["git", *arguments], cwd=_ROOT, check=False, capture_output=True)
    if run.returncode:
        raise SystemExit(f"--before: git {arguments[0]}: {run.stderr.decode().strip()}")
    return run.stdout


def renamed(source: str) -> str:
    """A module's source, in which the package goes by its other name: its identifier, and strings that name modules."""
    lines = io.StringIO(source).readlines()
    # From the end, so that places further up stay where they are.
    for token in reversed(list(tokenize.generate_tokens(io.StringIO(source).readline))):
        of_module = token.type == tokenize.STRING and _NAME_OF_A_MODULE.fullmatch(token.string)
        if of_module or (token.type == tokenize.NAME and token.string == PACKAGE):
            row, column = token.start[0] - 1, token.start[1] + token.string.index(PACKAGE)
            line = lines[row]
            lines[row] = line[:column] + NAME + line[column + len(PACKAGE) :]
    return "".join(lines)


def library(folder: str) -> ModuleType:
    """The copy in this folder, imported. Raises where a module of that name came from anywhere else."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    package = import_module(NAME)
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == NAME and not Path(module.__file__ or "").is_relative_to(folder):
            raise AssertionError(f"{name} is from {module.__file__}, not from {folder}")
    return package
