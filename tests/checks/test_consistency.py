"""What samples have to agree in that are computed one after the other: vmap's chunks and its loop."""

from __future__ import annotations

import re
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

import autodiff as ad
from autodiff.checks.consistency import is_same
from autodiff.errors import BatchError
from scenarios import assert_close

if TYPE_CHECKING:
    from collections.abc import Callable

X = torch.tensor([1.0, -2.0, 3.0, -4.0, 5.0], dtype=torch.float64)


class Equal:
    """All of them are equal, and no two one object."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal)

    __hash__ = None  # type: ignore[assignment]


class Raising:
    def __eq__(self, other: object) -> bool:
        raise ZeroDivisionError

    __hash__ = None  # type: ignore[assignment]


class Vague:
    """Its == is no truth value, as that of a DataFrame."""

    def __eq__(self, other: object) -> Any:
        return self

    __ne__ = __eq__
    __hash__ = None  # type: ignore[assignment]

    def __and__(self, other: object) -> Vague:
        return self

    def __bool__(self) -> bool:
        raise ValueError("ambiguous")


ONE = object()
SAME: dict[str, Callable[[], Any]] = {
    "int": lambda: 10**6,
    "text": lambda: "te" + str(1),
    "None": lambda: None,
    "nan": lambda: float("nan"),
    "complex nan": lambda: complex("nan"),
    "set": lambda: {1, 2},
    "object": lambda: ONE,
    "own ==": Equal,
    "array": lambda: np.arange(3.0),
    "array with nan": lambda: np.array([1.0, np.nan]),
    "array of text": lambda: np.array(["a", "b"]),
    "array of objects": lambda: np.array([None, "b"], dtype=object),
    "empty array": lambda: np.zeros(0),
    "numpy nan": lambda: np.float32("nan"),
    "dtype": lambda: torch.float64,
}
OTHER: dict[str, tuple[Any, Any]] = {
    "ints": (1, 2),
    "texts": ("a", "b"),
    "None and number": (None, 0),
    "number and nan": (1.0, float("nan")),
    "objects": (object(), object()),
    "raising ==": (Raising(), Raising()),
    "vague ==": (Vague(), Vague()),
    "arrays": (np.array([1.0, 2.0]), np.array([1.0, 3.0])),
    "shapes of arrays": (np.ones(1), np.ones((1, 1))),
    "array and nan": (np.array([1.0, 2.0]), np.array([1.0, np.nan])),
    "array and number": (np.ones(1), 1.0),
    "sets": ({1}, {2}),
}


@pytest.mark.parametrize("make", SAME.values(), ids=SAME)
def test_same(make: Callable[[], Any]) -> None:
    assert is_same(make(), make())


@pytest.mark.parametrize(("one", "other"), OTHER.values(), ids=OTHER)
def test_not_the_same(one: Any, other: Any) -> None:
    assert not is_same(one, other)
    assert not is_same(other, one)
    assert is_same(one, one)


def branching(of_positive: Any, of_negative: Any) -> Callable[[Tensor], Any]:
    return lambda x: (x * 2, of_positive() if x > 0 else of_negative())


def from_a_list(values: list[Any]) -> Callable[[Tensor], Any]:
    """What a function gives that counts its calls: a value for each chunk."""
    coming = iter(values)
    return lambda x: (x * 2, next(coming))


@pytest.mark.parametrize("make", SAME.values(), ids=SAME)
@pytest.mark.parametrize("way", ["loop", "chunks"])
def test_what_is_no_tensor_is_returned_where_all_samples_give_the_same(way: str, make: Any) -> None:
    if way == "loop":
        tensor, value = ad.vmap(branching(make, make), fallback="loop")(X)
    else:
        tensor, value = ad.vmap(lambda x: (x * 2, make()), chunk_size=2)(X)
    assert_close(tensor, X * 2)
    assert is_same(value, make())
    assert type(value) is type(make())


@pytest.mark.parametrize(("one", "other"), OTHER.values(), ids=OTHER)
def test_loop_refuses_values_that_differ(one: Any, other: Any) -> None:
    with pytest.raises(BatchError, match=r"vmap: output\[1\] is .* for sample 1, but .* for the samples"):
        ad.vmap(branching(lambda: one, lambda: other), fallback="loop")(X)


@pytest.mark.parametrize("chunk_size", [1, 2])
@pytest.mark.parametrize(("one", "other"), OTHER.values(), ids=OTHER)
def test_chunks_refuse_values_that_differ(one: Any, other: Any, chunk_size: int) -> None:
    where = "sample 1" if chunk_size == 1 else "samples 2 to 3"
    with pytest.raises(BatchError, match=rf"output\[1\] is .* for {where}, but"):
        ad.vmap(from_a_list([one, *[other] * 4]), chunk_size=chunk_size)(X)


def test_message_has_its_beats_in_one_line() -> None:
    long = np.arange(1000.0).reshape(10, 100)
    with pytest.raises(BatchError) as raised:
        ad.vmap(from_a_list([{"n": 1, "a": long}, {"n": 1, "a": long + 1}]), chunk_size=4)(X)
    text = str(raised.value)
    for beat in (
        "vmap: output[1]['a'] is array(",
        "for sample 4",
        "expected",
        "Return what differs as a tensor",
    ):
        assert beat.lower() in text.lower()
    assert not re.search(r"\s{2,}|\n", text)
    assert len(text) < 500


def test_one_chunk_has_nothing_to_agree_with() -> None:
    values = [object()]
    assert ad.vmap(from_a_list(values))(X)[1] is values[0]
    assert ad.vmap(from_a_list(values), chunk_size=5)(X)[1] is values[0]


def test_what_a_failed_batch_gave_does_not_count() -> None:
    """The first run of the fallback is not one of the samples."""
    values = iter([1, 2, 2, 2, 2, 2])

    def func(x: Tensor) -> Any:
        value = next(values)
        return (x * 2 if x > 0 else -x), value

    assert ad.vmap(func, fallback="loop")(X)[1] == 2


STRUCTURES: dict[str, tuple[Any, Any, str]] = {
    "keys": (
        lambda x: {"a": x},
        lambda x: {"b": x},
        "output is a dict with keys ['b'], but that of the samples",
    ),
    "length": (
        lambda x: (x, x),
        lambda x: (x,),
        "output is a tuple of 1, but that of the samples before is a tuple",
    ),
    "tuple and list": (lambda x: (x,), lambda x: [x], "output is a list of 1"),
    "leaf": (
        lambda x: {"a": [x]},
        lambda x: {"a": x},
        "output['a'] is a leaf, but that of the samples before['a']",
    ),
}


@pytest.mark.parametrize(("positive", "negative", "words"), STRUCTURES.values(), ids=STRUCTURES)
def test_loop_refuses_structures_that_differ(positive: Any, negative: Any, words: str) -> None:
    with pytest.raises(BatchError, match=re.escape(words)) as raised:
        ad.vmap(lambda x: positive(x) if x > 0 else negative(x), fallback="loop")(X)
    assert "vmap: expected outputs of one structure for all samples, but for sample 1" in str(raised.value)


@pytest.mark.parametrize(
    ("positive", "negative", "words"),
    [
        (lambda x: x, lambda x: None, "output is None for sample 1, but a tensor of shape () for"),
        (lambda x: None, lambda x: x, "output is a tensor of shape () for sample 1, but None for"),
        (
            lambda x: x,
            lambda x: x[None],
            "output is a tensor of shape (1,) for sample 1, but a tensor of shape ()",
        ),
        (lambda x: x.expand(2, 3), lambda x: x.expand(2, 1), "a tensor of shape (2, 1) for sample 1"),
    ],
)
def test_loop_refuses_tensors_of_other_shapes(positive: Any, negative: Any, words: str) -> None:
    with pytest.raises(BatchError, match=re.escape(words)):
        ad.vmap(lambda x: positive(x) if x > 0 else negative(x), fallback="loop")(X)


@pytest.mark.parametrize("kind", [dict, OrderedDict])
def test_dicts_agree_whatever_their_order(kind: Any) -> None:
    def func(x: Tensor) -> Any:
        pairs = [("twice", 2 * x), ("pair", torch.stack([x, -x])), ("note", "text")]
        return kind(pairs if x > 0 else reversed(pairs))

    result = ad.vmap(func, out_dims={"twice": 0, "pair": 1, "note": None}, fallback="loop")(X)
    assert_close(result, kind(twice=2 * X, pair=torch.stack([X, -X]), note="text"))


def test_shared_tensor_may_hold_nan() -> None:
    shared = torch.tensor([1.0, float("nan")])
    func = lambda x: (x if x > 0 else -x, shared.clone())
    value, same = ad.vmap(func, out_dims=(0, None), fallback="loop")(X)
    assert_close(value, X.abs())
    torch.testing.assert_close(same, shared, equal_nan=True)


@pytest.mark.parametrize("other", [torch.ones(2), torch.tensor([1.0, float("nan")])])
def test_shared_tensor_that_differs_is_refused(other: Tensor) -> None:
    shared = torch.tensor([1.0, 2.0])
    with pytest.raises(BatchError, match=r"output\[1\] .* differs from sample to sample"):
        ad.vmap(lambda x: (x, shared if x > 0 else other), out_dims=(0, None), fallback="loop")(X)


@pytest.mark.parametrize("to_disk", [False, True])
@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("iterable", [False, True])
def test_per_sample_refuses_values_that_differ_between_chunks(
    iterable: bool, reduced: bool, to_disk: bool, tmp_path: Any
) -> None:
    count = iter(range(9))
    func = lambda x: {"twice": 2 * x, "n": next(count)}
    run = partial(ad.per_sample(torch.sin, chunk_size=2).map, func)
    if not reduced:
        run = ad.per_sample(func, chunk_size=2)
    with pytest.raises(BatchError, match=r"per_sample: output\['n'\] is 1 for samples 2 to 3, but 0 for"):
        run(iter([X[:2], X[2:]]) if iterable else X, out=tmp_path / "results" if to_disk else None)


def test_per_sample_refuses_batches_of_other_shapes() -> None:
    """A tensor of shape (1,) would be expanded without a word."""
    batches = [torch.ones(2, 3), torch.ones(2, 1)]
    for out in (None, torch.zeros(4, 3)):
        with pytest.raises(
            BatchError, match=r"shape \(1,\) for samples 2 to 3, but a tensor of shape \(3,\)"
        ):
            ad.per_sample(torch.sin)(iter(batches), out=out)
    assert {chunk.result.shape[1] for chunk in ad.per_sample(torch.sin).stream(iter(batches))} == {3, 1}


def test_per_sample_keeps_values_that_agree() -> None:
    func = lambda x: {"twice": 2 * x, "n": float("nan"), "array": np.arange(2)}
    result = ad.per_sample(func, chunk_size=2)(X)
    assert_close(result["twice"], 2 * X)
    assert np.isnan(result["n"])
    assert result["array"].tolist() == [0, 1]
