"""Fingerprints see what a function depends on, and nothing else."""

from __future__ import annotations

import collections
import functools
import logging
import operator
import os
import re
import subprocess
import sys
import threading
import types
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import autodiff as ad
from autodiff.samples.fingerprint import OPAQUE, fingerprint


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


class Holder(torch.nn.Module):
    """A module that computes with what it is given, by whatever name."""

    def __init__(self, name: str, value: Any) -> None:
        super().__init__()
        setattr(self, name, value)


class Slots:
    __slots__ = ("power",)

    def __init__(self, power: int) -> None:
        self.power = power


class Twice(float):
    """A number with an attribute."""


def numbered(number: int) -> Any:
    twice = Twice(1.0)
    twice.number = number  # type: ignore[attr-defined]
    return twice


def attribute_of_function(number: int) -> Any:
    def func(x: Tensor) -> Tensor:
        return x * func.scale  # type: ignore[attr-defined]

    func.scale = number  # type: ignore[attr-defined]
    return func


def sine(factor: int) -> Any:
    """A function that calls an autograd Function, whose backward is the user's code."""

    class Sine(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.sin()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(inputs[0])

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return factor * g * ctx.saved_tensors[0].cos()

    return Sine.apply


def method_of(number: int) -> Any:
    class Local:
        constant = number

        @property
        def scale(self) -> int:
            return self.constant

        def __call__(self, x: Tensor) -> Tensor:
            return x * self.scale

    return Local()


def keyword(number: int) -> Any:
    def func(x: Tensor, *, y: int = number) -> Tensor:
        return x * y

    return func


def with_hook(number: int) -> Any:
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.ones_(module.weight)
    module.register_forward_hook(lambda module, args, output: output * number)
    return module


MAKERS: dict[str, Any] = {
    "private attribute": lambda n: Holder("_power", n),
    "private tensor": lambda n: Holder("_scale", torch.full((2,), float(n))),
    "list": lambda n: Holder("powers", [1, n]),
    "list in a list": lambda n: Holder("powers", [1, [n]]),
    "dict": lambda n: Holder("powers", {"a": n}),
    "key of a dict": lambda n: Holder("powers", {n: 1}),
    "set": lambda n: Holder("powers", {0, (n, "a")}),
    "deque": lambda n: Holder("powers", collections.deque([n])),
    "builtin": lambda n: Holder("activation", [torch.sin, torch.cos][n - 1]),
    "operator": lambda n: Holder("activation", [torch.ops.aten.sin, torch.ops.aten.cos][n - 1]),
    "bound builtin": lambda n: torch.full((2,), float(n)).mul,
    "object": lambda n: Holder("config", types.SimpleNamespace(power=n)),
    "submodule's": lambda n: torch.nn.Sequential(Holder("_power", n)),
    "deep submodule's": lambda n: functools.reduce(
        lambda m, _: torch.nn.Sequential(m), range(300), Holder("_p", n)
    ),
    "hook": with_hook,
    "slots": Slots,
    "subclass of float": Twice,
    "attribute of a number": numbered,
    "number of an object": lambda n: Scaled(torch.ones(n)).loss,
    "partial": lambda n: functools.partial(torch.add, alpha=n),
    "keyword of a partial": lambda n: functools.partial(torch.mul, other=torch.full((), float(n))),
    "cached": lambda n: functools.lru_cache(lambda x: x * n),
    "keyword default": keyword,
    "method": method_of,
    "class": lambda n: type(method_of(n)),
    "attribute of a function": attribute_of_function,
    "autograd function": sine,
    "getter": operator.itemgetter,
    "pattern": lambda n: re.compile("a" * n),
    "object array": lambda n: np.array([n, None], dtype=object),
    "array's dtype": lambda n: np.ones(2, dtype=[np.int32, np.float32][n - 1]),
    "weak reference": lambda n: weakref.ref(KEPT.setdefault(n, Scaled(torch.full((2,), float(n))))),
    "generator of torch": lambda n: torch.Generator().manual_seed(n),
    "generator of numpy": np.random.default_rng,
    "bool or int": lambda n: [n, True][n - 1],
    "key of text or number": lambda n: {[0, "0"][n - 1]: 1},
    "sparse": lambda n: torch.eye(2).mul(n).to_sparse(),
    "dtype": lambda n: torch.ones(2, dtype=[torch.float16, torch.bfloat16][n - 1]),
    "order of a dict": lambda n: dict([("a", 1), ("b", 1)][:: 3 - 2 * n]),
    "named tuple": lambda n: Pair(1, n),
}
Pair = collections.namedtuple("Pair", "a b")
KEPT: dict[int, Any] = {}


@pytest.mark.parametrize("what", MAKERS)
def test_everything_that_a_function_may_compute_with_counts(what: str) -> None:
    make = MAKERS[what]
    one, same, other = (fingerprint(make(n)) for n in (1, 1, 2))
    assert not one.startswith(OPAQUE)
    assert one == same
    assert one != other


def test_what_cannot_be_read_is_named(tmp_path: Any) -> None:
    for opaque in ((number for number in range(3)), (tmp_path / "file").open("w"), memoryview(b"x")):
        kind = f"{type(opaque).__module__}.{type(opaque).__qualname__}"
        func = types.SimpleNamespace(inner=[opaque])
        assert fingerprint(func, "func") == f"{OPAQUE}func.inner[0], a {kind}"
        assert fingerprint({1, (opaque,)}).startswith(OPAQUE)
        if hasattr(opaque, "close"):
            opaque.close()


def test_locks_and_loggers_hold_no_values() -> None:
    def func(x: Tensor) -> Tensor:
        with lock:
            logger.info("called")
        return x

    lock, logger = threading.Lock(), logging.getLogger("autodiff.test")
    before = fingerprint(func)
    lock, logger = threading.Lock(), logging.getLogger("autodiff.test")
    assert fingerprint(func) == before
    assert not before.startswith(OPAQUE)


def test_lists_that_hold_themselves() -> None:
    def made(number: int) -> Any:
        cycle: list[Any] = [number]
        cycle.append(cycle)
        return cycle

    assert fingerprint(made(1)) == fingerprint(made(1)) != fingerprint(made(2))


def test_modules_of_the_users_count_as_far_as_a_function_uses_them(monkeypatch: Any) -> None:
    config = types.ModuleType("config_of_user")
    config.scale, config.other = 1.0, 1.0  # type: ignore[attr-defined]
    config.inner = config  # type: ignore[attr-defined]
    monkeypatch.setitem(globals(), "CONFIG", config)
    before = fingerprint(uses_config)
    config.other = 2.0  # type: ignore[attr-defined]
    assert fingerprint(uses_config) == before
    config.scale = 2.0  # type: ignore[attr-defined]
    assert fingerprint(uses_config) != before


def uses_config(x: Tensor) -> Tensor:
    return x * CONFIG.inner.scale  # type: ignore[name-defined]  # noqa: F821


def test_what_an_installed_program_runs_is_the_users(monkeypatch: Any) -> None:
    monkeypatch.setattr(
        sys.modules["__main__"], "__file__", "/lib/site-packages/runner/__main__.py", raising=False
    )
    namespace: dict[str, Any] = {"__name__": "__main__", "SCALE": 1}
    exec("def func(x):\n    return x * SCALE", namespace)
    before = fingerprint(namespace["func"])
    namespace["SCALE"] = 2
    assert fingerprint(namespace["func"]) != before


ELSEWHERE = """
import random, numpy, torch, autodiff as ad
from autodiff.samples.fingerprint import fingerprint
from torch import nn
torch.manual_seed(0)
class Net(nn.Module):
    names = {"a", "b", "c"}
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LSTM(4, 4))
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.layers.register_forward_hook(lambda m, i, o: o)
    def forward(self, x):
        return self.weighted(self.layers[0](x)) if "a" in {"a", "b"} else x
net = Net()
loss = ad.sample_loss(net, nn.functional.mse_loss)
print(fingerprint([ad.hessian(loss), random.Random(0), numpy.random.default_rng(0), torch.Generator(), {"x", "y"}]))
"""


def test_fingerprints_are_equal_in_another_process() -> None:
    texts = set()
    for seed in "12":
        run = subprocess.run(
            [sys.executable, "-c", ELSEWHERE],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        texts.add(run.stdout)
    (text,) = texts
    assert not text.startswith(OPAQUE)


@pytest.mark.parametrize(
    "func",
    [
        ad.vmap(torch.sin, chunk_size="auto"),
        ad.jacrev(torch.sin, chunk_size="auto"),
        ad.hessian(lambda x: x.sin().sum(), chunk_size="auto"),
        ad.vmap(ad.grad(lambda x: x.sin()), chunk_size="auto", fallback="loop"),
        ad.checkpoint(torch.sin),
    ],
)
def test_what_a_transform_learns_does_not_count(func: Any) -> None:
    before = fingerprint(func)
    func(torch.ones(50))
    assert fingerprint(func) == before
