"""Destinations of the caller's: memory that can be written to, and only once."""

from __future__ import annotations

import itertools
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import autodiff as ad
from autodiff.errors import OptionError, ShapeError
from autodiff.samples import given
from problems import W, X, outer, square


@pytest.mark.parametrize(
    ("out", "kind", "text"),
    [
        (
            torch.empty(9, 3, 3),
            ShapeError,
            r"out has \[9, 3, 3\] float32, but the result is \[10, 3, 3\] float32",
        ),
        (torch.empty(10, 3, 3, dtype=torch.float64), ShapeError, "float64, but"),
        ([torch.empty(10, 3, 3), torch.empty(10, 3, 3)], ShapeError, "one tensor for each leaf"),
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


def read_only_memmap(path: Path) -> Any:
    np.save(path / "room.npy", np.zeros((10, 3, 3), dtype=np.float32))
    return np.load(path / "room.npy", mmap_mode="r")


def read_only_array(_: Path) -> Any:
    array = np.zeros((10, 3, 3), dtype=np.float32)
    array.flags.writeable = False
    return array


UNUSABLE: dict[str, Any] = {
    "read-only memmap": (read_only_memmap, "it is read-only"),
    "read-only array": (read_only_array, "it is read-only"),
    "broadcast array": (lambda _: np.broadcast_to(np.float32(0), (10, 3, 3)), "it is read-only"),
    "byte order": (lambda _: np.zeros((10, 3, 3), dtype=">f4"), "byte order"),
    "negative strides": (lambda _: np.zeros((10, 3, 3), dtype=np.float32)[::-1], "negative"),
    "objects": (lambda _: np.zeros((10, 3, 3), dtype=object), "object"),
    "number": (lambda _: np.float32(1), "cannot be written to"),
    "requires grad": (lambda _: torch.empty(10, 3, 3, requires_grad=True), "requires grad"),
    "sparse": (lambda _: torch.zeros(10, 3, 3).to_sparse(), "is sparse"),
    "expanded": (lambda _: torch.empty(3, 3).expand(10, 3, 3), "overlaps itself"),
    "windows": (lambda _: torch.empty(30).as_strided((10, 3, 3), (2, 3, 1)), "overlaps itself"),
    "none": (lambda _: [None], "got <class 'list'>"),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_memory_that_cannot_be_written_to(what: str, tmp_path: Path) -> None:
    make, text = UNUSABLE[what]
    with pytest.raises(OptionError, match=text):
        ad.per_sample(ad.hessian(square), (None, 0))(W, X, out=make(tmp_path))


@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}, {"row_chunk_size": 2}])
def test_memory_in_any_layout(options: Any) -> None:
    expected = ad.per_sample(ad.jacrev(lambda w, x: torch.outer(w.sin(), x)), (None, 0))(W, X)
    run = ad.per_sample(ad.jacrev(lambda w, x: torch.outer(w.sin(), x)), (None, 0), **options)
    layouts = [
        torch.empty(10, 3, 3, 3),
        torch.empty(3, 3, 3, 10).permute(3, 2, 1, 0),
        torch.empty(20, 6, 6, 6)[::2, 1::2, ::2, ::2],
        np.zeros((3, 10, 3, 3), dtype=np.float32).swapaxes(0, 1),
        np.asfortranarray(np.zeros((10, 3, 3, 3), dtype=np.float32)),
    ]
    for room in layouts:
        run(W, X, out=room)
        assert_close(torch.as_tensor(room), expected)
    table = torch.zeros(10, 2, 3)
    both = ad.per_sample(lambda x: (x.sin(), x.cos()))
    both(X, out=(table[:, 1], table[:, 0]))
    assert_close(table, torch.stack([X.cos(), X.sin()], dim=1))


def test_many_tensors_are_compared_fast() -> None:
    """Ten thousand would be fifty million pairs."""
    table = torch.zeros(10_000, 2, 3)
    run = ad.per_sample(lambda x: tuple(x * number for number in range(10_000)))
    began = time.perf_counter()
    run(X[:2], out=tuple(table))
    assert time.perf_counter() - began < 20
    assert_close(table[:, 1, 1], X[1, 1] * torch.arange(10_000))


def test_memory_is_written_to_once() -> None:
    run = ad.per_sample(lambda x: (x.sin(), x.cos()))
    room = torch.empty(15, 3)
    array = np.zeros((15, 3), dtype=np.float32)
    x = X.clone()
    for out in ((room[:10], room[:10]), (room[:10], room[5:]), (array[:10], array[5:]), (x, room[:10])):
        with pytest.raises(OptionError, match="overlaps"):
            run(x, out=out)
    with pytest.raises(OptionError, match="overlaps"):
        ad.per_sample(lambda x, row: x.sum(0) * row, (None, 0))(x, X, out=x)
    assert_close(x, X, rtol=0, atol=0)


def test_overlaps_are_found_exactly() -> None:
    """Compared with a look at every element."""
    generator = torch.Generator().manual_seed(0)

    def number(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    memory = torch.zeros(200)

    def view() -> torch.Tensor:
        sizes, strides = [[1 + number(3) for _ in range(number(4))] for _ in range(2)]
        sizes, strides = sizes[: len(strides)], strides[: len(sizes)]
        strides = [stride * (1 + number(5)) for stride in strides]
        return memory.as_strided(sizes, strides, number(20))

    def elements(tensor: torch.Tensor) -> list[int]:
        indices = itertools.product(*map(range, tensor.shape))
        return [
            tensor.storage_offset()
            + sum(at * stride for at, stride in zip(index, tensor.stride(), strict=True))
            for index in indices
        ]

    found = [0, 0]
    for _ in range(3000):
        one, other = view(), view()
        truth = bool(set(elements(one)) & set(elements(other)))
        assert given.overlap(one, other) is truth
        found[truth] += 1
        if len(set(elements(one))) < len(elements(one)):
            assert given.overlaps_itself(one)
    assert min(found) > 300
    assert not given.overlap(memory[:0], memory)
    halves = memory.view(torch.int16)
    assert given.overlap(memory[:3], halves[5:])
    assert not given.overlap(memory[:3], halves[6:])


def test_trees_are_filled_by_their_keys() -> None:
    run = ad.per_sample(lambda x: {"sin": x.sin(), "more": (x.cos(), 3)})
    sin, cos = torch.empty(10, 3), torch.empty(10, 3)
    for out in ({"more": (cos, None), "sin": sin}, {"sin": sin, "more": (cos, 3)}, [sin, cos]):
        sin.zero_()
        cos.zero_()
        result = run(X, out=out)
        assert result["sin"] is sin
        assert result["more"] == (cos, 3)
        assert_close(sin, X.sin())
        assert_close(cos, X.cos())
    with pytest.raises(
        ShapeError, match=r"out is a dict with keys \['cos', 'sin'\], but result is a dict with keys"
    ):
        run(X, out={"sin": sin, "cos": cos})


def test_as_many_samples_as_there_is_room_for() -> None:
    run = ad.per_sample(ad.hessian(square), (None, 0))
    for options in ({}, {"row_chunk_size": 2}):
        run = ad.per_sample(ad.hessian(square), (None, 0), **options)
        room = torch.empty(10, 3, 3)
        run(W, iter([X[:9], X[9:]]), out=room)
        assert_close(room, outer(X))
        with pytest.raises(ShapeError, match="room for 10 samples, but the iterable of batches gave more"):
            run(W, iter([X, X[:1]]), out=room)
        with pytest.raises(ShapeError, match="gave 9, which are in its first rows"):
            run(W, iter([X[:9]]), out=room)
