"""The progress bar."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
import torch

import autodiff as ad
from autodiff.errors import OptionError
from problems import W, X, square


def test_progress_says_what_it_needs(monkeypatch: Any, capsys: Any) -> None:
    shown = ad.per_sample(ad.hessian(square), (None, 0), progress=True)
    shown(W, X)
    text = capsys.readouterr().err
    assert "per_sample(hessian(square))" in text
    assert "10/10" in text
    assert "sample/s" in text
    assert "peak" in text
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match="autodiff\\[progress\\]"):
        ad.per_sample(square, (None, 0), progress=True)


@pytest.mark.parametrize("stderr", ["none", "closed", "full"])
def test_a_bar_that_nobody_can_see_stops_no_run(stderr: str, monkeypatch: Any) -> None:
    streams: dict[str, Any] = {"none": None, "closed": io.StringIO(), "full": Full()}
    streams["closed"].close()
    monkeypatch.setattr(sys, "stderr", streams[stderr])
    x = torch.arange(5.0)
    assert torch.equal(ad.per_sample(torch.sin, chunk_size=1, progress=True)(x), x.sin())


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")
