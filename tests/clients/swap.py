"""A pytest plugin: torch's functional transforms are autodiff's, and what became of every test goes into a file.

``CLIENTS_LIBRARY`` says whose transforms run, and ``CLIENTS_RESULT`` names the file. The names are exchanged before any
module of a client is imported, so that all ways of importing them find autodiff's.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import functorch
import pytest
import torch
import torch.func

import autodiff

if TYPE_CHECKING:
    from collections.abc import Iterator

_LEGACY = ("jacobian", "hessian", "vjp", "jvp", "vhp", "hvp")


def exchange() -> None:
    """Put autodiff's transforms in the place of torch's, under every public name."""
    for name in torch.func.__all__:
        for module in (torch.func, functorch, torch):
            if getattr(module, name, None) is not None:
                setattr(module, name, getattr(autodiff, name))
    for name in _LEGACY:
        setattr(torch.autograd.functional, name, getattr(autodiff.functional, name))


if os.environ["CLIENTS_LIBRARY"] == "autodiff":
    exchange()

_outcomes: dict[str, str] = {}
_seconds: dict[str, float] = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: Any) -> Iterator[None]:
    """Seed, and measure how long the test keeps the processor busy."""
    torch.manual_seed(0)
    start = time.process_time()
    yield
    _seconds[item.nodeid] = time.process_time() - start


def pytest_runtest_logreport(report: Any) -> None:
    """Remember the first phase that did not pass, or that all did."""
    if _outcomes.get(report.nodeid, "passed") == "passed":
        _outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    """Write the results."""
    result = {"outcomes": _outcomes, "seconds": _seconds}
    Path(os.environ["CLIENTS_RESULT"]).write_text(json.dumps(result))
