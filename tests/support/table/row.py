"""What a row of the table is: a body that passes with autodiff, and with torch fails in a stated way.

A body is a function of the library. It compares what the library computes with a closed form, or with
difference quotients in float64; never one library with the other.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.torch_version import TorchVersion

import autodiff
from autodiff.core import hooks
from autodiff.torch_fixes import FIXES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Body = Callable[..., None]

# torch's names as autodiff has them. What torch lacks is missing here too, or made as torch's documentation does.
TORCH = SimpleNamespace(
    **{name: getattr(torch.func, name) for name in torch.func.__all__},
    functional=torch.autograd.functional,
    hvp=lambda f, primals, tangents: torch.func.jvp(torch.func.grad(f), primals, tangents),
)
LIBRARIES: dict[str, Any] = {"autodiff": autodiff, "torch": TORCH}

# Fixes that torch.func has as well, as soon as autodiff is imported.
_IN_TORCH = [fix for fix in FIXES if fix.is_needed and hooks.batch_overrides in (one for one, _ in fix.hooks)]

# The usual ways to fail, as a pattern for `fails`.
WRONG = "AssertionError: (Tensor-likes|Scalars) are not"
NO_FORWARD = "NotImplementedError: .*forward AD"


class Row(NamedTuple):
    """A line of the table. ``case``, ``torch`` and ``ours`` are words for people, in Markdown."""

    name: str
    case: str
    torch: str
    ours: str
    body: Body
    fails: str | None  # a pattern for how the body fails with torch; None where it passes
    over: Mapping[str, Any]  # what else the body is given, by name: a test for each
    mended: str | None  # the version of torch with which it passes
    issue: str | None
    needs: str  # the version of torch from which on this is so; older ones have no rule at all, or no tracer
    alone: tuple[str, ...] | None  # options for Python, or none, where it runs in a process of its own
    untrue: tuple[str, str] | None  # from which torch on autodiff fails too, until that is mended, and why


class Trial(NamedTuple):
    """One body with one of the values that it is run over."""

    row: Row
    value: str | None = None

    def __str__(self) -> str:
        return self.row.name if self.value is None else f"{self.row.name}-{self.value}"

    def run(self, library: str) -> None:
        """The body in this process."""
        given = [] if self.value is None else [self.row.over[self.value]]
        with ExitStack() as stack:
            for fix in _IN_TORCH if library == "torch" else ():
                stack.enter_context(fix.switched_off())
            self.row.body(LIBRARIES[library], *given)

    def failure(self, library: str, without: str = "") -> str | None:
        """How the body fails: the name and the text of the exception; None where it passes.

        ``without`` is the name of a fix that is switched off, where the body has a process of its own.
        """
        if self.row.alone is not None:
            return _failure_of_process(self, library, without)
        with warnings.catch_warnings():
            # Of torch's warnings there are many; of autodiff's there should be none.
            if library == "torch":
                warnings.simplefilter("ignore")
            return failure_of(lambda: self.run(library))

    @property
    def is_mended(self) -> bool:
        """Whether the installed torch passes."""
        return self.row.mended is not None and has_torch(self.row.mended)


def has_torch(version: str) -> bool:
    """Whether the installed torch is that version or a newer one."""
    return TorchVersion(torch.__version__.split("+")[0]) >= TorchVersion(version)


def failure_of(compute: Callable[[], object]) -> str | None:
    try:
        compute()
    except Exception as error:  # noqa: BLE001  what a library raises is what we ask
        return f"{type(error).__name__}: {error}"
    return None


def _failure_of_process(trial: Trial, library: str, without: str) -> str | None:
    support = Path(__file__).parents[1]
    paths = os.pathsep.join(map(str, (support.parents[1], support.parent, support)))
    options = trial.row.alone or ("-W", "ignore")
    command = [sys.executable, *options, "-m", "table", str(trial), library, without]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTHONPATH": paths},
    )
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"the process ends by signal {-done.returncode}: {done.stderr}"
    return done.stdout or done.stderr


class Section:
    """Rows that belong together, in the order of their definition."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.rows: list[Row] = []

    def row(
        self,
        case: str,
        *,
        torch: str,
        ours: str,
        fails: str | None,
        over: Mapping[str, Any] | None = None,
        mended: str | None = None,
        issue: str | None = None,
        needs: str = "2.11",
        alone: tuple[str, ...] | None = None,
        untrue: tuple[str, str] | None = None,
    ) -> Callable[[Body], Body]:
        """Add the decorated body, under its own name."""

        def add(body: Body) -> Body:
            self.rows.append(
                Row(
                    body.__name__,
                    case,
                    torch,
                    ours,
                    body,
                    fails,
                    over or {},
                    mended,
                    issue,
                    needs,
                    alone,
                    untrue,
                )
            )
            return body

        return add
