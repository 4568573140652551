"""Fingerprints see what a function depends on, and nothing else."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor

import autodiff as ad
from autodiff.samples.fingerprint import fingerprint


class Scaled:
    def __init__(self, scale: Tensor) -> None:
        self.scale, self.calls = scale, 0

    def loss(self, x: Tensor) -> Tensor:
        return (x * self.scale).sum()


class Times(torch.nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


class Plus(Times):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


GLOBAL = torch.ones(2)


def uses_global(x: Tensor) -> Tensor:
    return x * GLOBAL


def test_fingerprints_see_what_a_function_depends_on(monkeypatch: Any) -> None:
    def closure(scale: Any) -> Any:
        return lambda x: x * scale

    same: list[Any] = [
        (closure(torch.ones(2)), closure(torch.ones(2))),
        (Scaled(torch.ones(2)).loss, Scaled(torch.ones(2)).loss),
        (ad.hessian(closure(torch.ones(2)), wrt="a.*"), ad.hessian(closure(torch.ones(2)), wrt="a.*")),
    ]
    for one, other in same:
        assert fingerprint(one) == fingerprint(other)
    linear = torch.nn.Linear(2, 1)
    dropout = torch.nn.Dropout(0.5)
    different: list[Any] = [
        (closure(torch.ones(2)), closure(torch.ones(2) * 2)),
        (closure(2), closure(3)),
        (closure({"a": torch.ones(2)}), closure({"b": torch.ones(2)})),
        (closure(np.ones(2)), closure(np.zeros(2))),
        (Scaled(torch.ones(2)).loss, Scaled(torch.zeros(2)).loss),
        (ad.hessian(closure(1), wrt="a.*"), ad.hessian(closure(1), wrt="b.*")),
        (ad.hessian(closure(1)), ad.hessian(closure(2))),
        (ad.hessian(closure(1)), ad.jacrev(closure(1))),
        (lambda x: x + 1, lambda x: x + 2),
        (lambda x, y=1: x, lambda x, y=2: x),
        (linear, torch.nn.Linear(2, 1)),
        (dropout.train(), torch.nn.Dropout(0.5).eval()),
        (dropout, torch.nn.Dropout(0.25).train()),
        (Times(2.0), Times(3.0)),
        (torch.nn.Sequential(Times(2.0)), torch.nn.Sequential(Plus(2.0))),
        (torch.ones(2), torch.ones(2, dtype=torch.float64)),
        (torch.ones(2, 1), torch.ones(1, 2)),
    ]
    for at, (one, other) in enumerate(different):
        assert fingerprint(one) != fingerprint(other), at
    before = fingerprint(uses_global)
    monkeypatch.setattr(sys.modules[__name__], "GLOBAL", torch.zeros(2))
    assert fingerprint(uses_global) != before


def test_fingerprints_are_blind_to_counters() -> None:
    one, other = Scaled(torch.ones(2)), Scaled(torch.ones(2))
    other.calls = 7
    assert fingerprint(one.loss) == fingerprint(other.loss)
