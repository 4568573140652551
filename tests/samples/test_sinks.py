"""Destinations of the caller's, and results that do not fit into memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import autodiff as ad
from autodiff.errors import BudgetError, OptionError, ShapeError
from problems import W, X, out_of_memory_above, square


def test_results_beyond_the_budget_are_refused_early() -> None:
    calls: list[int] = []
    curvature = ad.per_sample(ad.hessian(out_of_memory_above(9, calls)), (None, 0), memory=200)
    with pytest.raises(BudgetError, match=r"10 samples take 360 B, more than the 200 B.*out='file.npy'"):
        curvature(W, X)
    assert calls == [1]


@pytest.mark.parametrize(
    ("out", "kind", "text"),
    [
        (
            torch.empty(9, 3, 3),
            ShapeError,
            r"out has \[9, 3, 3\] float32, but the result is \[10, 3, 3\] float32",
        ),
        (torch.empty(10, 3, 3, dtype=torch.float64), ShapeError, "float64, but"),
        ([torch.empty(10, 3, 3)] * 2, ShapeError, "one tensor for each leaf"),
        (3, OptionError, "or a path, got <class 'int'>"),
    ],
)
def test_wrong_destinations(out: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        ad.per_sample(ad.hessian(square), (None, 0))(W, X, out=out)


def test_a_memmap_does_not_stay_in_memory(tmp_path: Path) -> None:
    """Pages that were written are the file's: 48 MB of results leave the process as small as it was."""

    def mapped_bytes() -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"RssFile:\s+(\d+) kB", status)[1]) * 1024

    room = np.lib.format.open_memmap(tmp_path / "room.npy", mode="w+", dtype=np.float64, shape=(60, 10**5))
    grow = ad.per_sample(lambda x: x * torch.arange(10**5, dtype=torch.float64), chunk_size=5)
    before = mapped_bytes()
    grow(torch.arange(60.0, dtype=torch.float64), out=room)
    assert mapped_bytes() - before < 2 * 10**7
    assert np.array_equal(room[7], 7 * np.arange(10**5))
