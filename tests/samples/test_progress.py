"""The progress bar."""

from __future__ import annotations

from typing import Any

import pytest

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
