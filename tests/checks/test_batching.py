"""in_dims as a dict: names of parameters, of keyword arguments, of modules and partials, and wrong ones."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import autodiff as ad
from autodiff.errors import BatchError
from scenarios import assert_close

X = torch.tensor([[0.5, -1, 2], [-3, 1, 0.5], [1, 1, 1], [-0.1, -0.2, -0.3]], dtype=torch.float64)
S = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
SUM = X.sum(1)


def plain(x: Tensor, scale: Any = 2.0, *, shift: Any = 0.0) -> Tensor:
    return x.sum() * scale + shift


class Affine(torch.nn.Module):
    def forward(self, x: Tensor, scale: Any = 2.0, *, shift: Any = 0.0) -> Tensor:
        return plain(x, scale, shift=shift)


class Callable:
    """Its ``forward`` is not what a call runs."""

    def forward(self, other: Tensor) -> Tensor:
        raise NotImplementedError

    def __call__(self, x: Tensor, scale: Any = 2.0, *, shift: Any = 0.0) -> Tensor:
        return plain(x, scale, shift=shift)


@functools.wraps(plain)
def wrapped(*args: Any, **kwargs: Any) -> Tensor:
    return plain(*args, **kwargs)


FUNCTIONS = {
    "function": plain,
    "wrapped": wrapped,
    "lambda": lambda x, scale=2.0, *, shift=0.0: plain(x, scale, shift=shift),
    "module": Affine(),
    "forward": Affine().forward,
    "callable": Callable(),
    "partial": partial(lambda nothing, x, scale=2.0, *, shift=0.0: plain(x, scale, shift=shift), None),
    "partial of a module": partial(Affine()),
}
CALLS: dict[str, tuple[dict[str, Any], tuple[Any, ...], dict[str, Any], Tensor]] = {
    "position": ({"x": 0}, (X,), {}, 2 * SUM),
    "positions": ({"x": 0, "scale": 0}, (X, S), {}, S * SUM),
    "shared position": ({"x": 0, "scale": None}, (X, 3.0), {}, 3 * SUM),
    "unnamed position": ({"x": 0}, (X, 3.0), {}, 3 * SUM),
    "second alone": ({"scale": 0}, (X[0], S), {}, S * SUM[0]),
    "keyword": ({"x": 0, "scale": 0}, (X,), {"scale": S}, S * SUM),
    "keyword-only": ({"x": 0, "shift": 0}, (X,), {"shift": S}, 2 * SUM + S),
    "keyword-only alone": ({"shift": 0}, (X[0],), {"shift": S}, 2 * SUM[0] + S),
    "keywords alone": ({"shift": 0, "x": 0}, (), {"x": X, "shift": S}, 2 * SUM + S),
    "unnamed keyword": ({"x": 0}, (X,), {"shift": S[1], "scale": 3.0}, 3 * SUM + 2),
    "other dims": ({"x": 1, "shift": -1}, (X.T,), {"shift": S}, 2 * SUM + S),
}


@pytest.mark.parametrize("fallback", [None, "loop"])
@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize(("in_dims", "args", "kwargs", "expected"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("func", FUNCTIONS.values(), ids=FUNCTIONS)
def test_names(
    func: Any, in_dims: Any, args: Any, kwargs: Any, expected: Any, chunk_size: Any, fallback: Any
) -> None:
    batched = ad.vmap(func, in_dims, chunk_size=chunk_size, fallback=fallback)
    assert_close(batched(*args, **kwargs), expected)


@pytest.mark.parametrize("func", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("transform", [ad.grad, ad.jacfwd, ad.jacrev, torch.func.grad])
def test_names_of_what_a_transform_makes(transform: Any, func: Any) -> None:
    """The sum's gradient is the scale, for each of three numbers."""
    derived = ad.vmap(transform(func), {"x": 0, "scale": 0, "shift": 0})(X, S, shift=S)
    assert_close(derived, S[:, None].expand(4, 3).contiguous())


@pytest.mark.parametrize("func", FUNCTIONS.values(), ids=FUNCTIONS)
def test_names_of_nested_vmaps(func: Any) -> None:
    nested = ad.vmap(ad.jacrev(ad.vmap(func, {"scale": 0})), {"x": 0})
    assert_close(nested(X, S), S[:, None].expand(4, 4, 3).contiguous())


@pytest.mark.parametrize("func", [Affine(), partial(Affine())], ids=["module", "partial of a module"])
def test_argnums_by_a_name_of_a_modules_forward_through_transforms(func: Any) -> None:
    second = ad.grad(ad.grad(func, argnums="scale"), argnums="scale")
    assert_close(second(X[0], S[0]), torch.zeros((), dtype=torch.float64))
    mixed = ad.jacrev(ad.grad(func, argnums="scale"), argnums="x")(X[0], S[0])
    assert_close(mixed, torch.ones(3, dtype=torch.float64))


def test_partials_fix_arguments() -> None:
    assert_close(ad.vmap(partial(plain, X[0]), {"scale": 0})(S), SUM[0] * S)
    assert_close(ad.vmap(partial(plain, shift=1.0), {"x": 0})(X), 2 * SUM + 1)
    assert_close(ad.vmap(partial(plain, shift=1.0), {"x": 0, "shift": 0})(X, shift=S), 2 * SUM + S)
    assert_close(ad.vmap(partial(Affine(), X[0]), {"scale": 0})(S), SUM[0] * S)
    assert_close(ad.vmap(partial(plain, x=X[0]), {"scale": 0})(scale=S), SUM[0] * S)


def test_positional_only_and_collected_arguments() -> None:
    def func(x: Tensor, /, *rest: Any, **named: Any) -> Tensor:
        return x.sum() * sum(rest) + named.get("shift", 0)

    assert_close(ad.vmap(func, {"x": 0})(X, 2.0, 3.0), 5 * SUM)
    assert_close(ad.vmap(func, {"x": 0, "shift": 0})(X, 2.0, shift=S), 2 * SUM + S)
    assert_close(ad.vmap(func, (0, 0, None))(X, S, 3.0), (S + 3) * SUM)


def test_trees_in_keywords() -> None:
    func = lambda p, *, q: p["a"].sum() * q["b"] + q["c"][0]
    in_dims = {"p": {"a": 0}, "q": {"b": 0, "c": None}}
    assert_close(ad.vmap(func, in_dims)({"a": X}, q={"b": S, "c": [S[1]]}), SUM * S + 2)
    assert_close(ad.vmap(func, in_dims)(p={"a": X}, q={"b": S, "c": [S[1]]}), SUM * S + 2)
    words = r"in_dims has structure .*'q': \{'z'.* but inputs has structure .*'q': \{'b'"
    with pytest.raises(BatchError, match=words):
        ad.vmap(func, {"p": {"a": 0}, "q": {"z": 0}})({"a": X}, q={"b": S})


WRONG: dict[str, tuple[Any, Any, Any, Any, str]] = {
    "default left out": (plain, {"x": 0, "scale": 0}, (X,), {}, "names 'scale', which .* arguments are 'x'"),
    "no parameter": (plain, {"x": 0, "y": 0}, (X,), {"shift": S}, "names 'y', which .* are 'x', 'shift'"),
    "of __call__": (Affine(), {"x": 0, "input": 0}, (X,), {}, "names 'input', which .* are 'x'"),
    "collected": (lambda x, *rest: x, {"x": 0, "rest": 0}, (X, S), {}, "names 'rest', which .* are 'x'"),
    "collected names": (lambda x, **kw: x, {"x": 0, "kw": 0}, (X,), {"z": S}, "names 'kw', .* are 'x', 'z'"),
    "number": (plain, {0: 0}, (X,), {}, "names 0, which"),
    "no signature": (torch.dot, {"input": 0}, (X, X), {}, "names 'input', .* are none.* by keyword"),
    "out of range": (plain, {"x": 0, "shift": 1}, (X,), {"shift": S}, r"in_dim=1 .* is kwargs\['shift'\]"),
    "no int": (plain, {"x": 0, "shift": "0"}, (X,), {"shift": S}, r"integer .* for kwargs\['shift'\]"),
    "no tensor": (plain, {"x": 0, "shift": 0}, (X,), {"shift": 2.0}, r"use None .* is kwargs\['shift'\]"),
    "none": (plain, {"x": None}, (X,), {}, "at least one Tensor"),
    "empty": (plain, {}, (X,), {}, "at least one Tensor"),
    "sizes": (plain, {"x": 0, "shift": 0}, (X,), {"shift": S[:3]}, r"kwargs\['shift'\] has 3"),
}


@pytest.mark.parametrize(("func", "in_dims", "args", "kwargs", "words"), WRONG.values(), ids=WRONG)
def test_wrong_names_and_dims(func: Any, in_dims: Any, args: Any, kwargs: Any, words: str) -> None:
    with pytest.raises(BatchError, match=words) as raised:
        ad.vmap(func, in_dims)(*args, **kwargs)
    assert str(raised.value).startswith("vmap")
    with pytest.raises(BatchError, match=words) as raised:
        ad.per_sample(func, in_dims)(*args, **kwargs)
    assert str(raised.value).startswith("per_sample")
