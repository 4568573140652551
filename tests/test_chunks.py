"""Chunks of given and of learnt sizes, and their results put together."""

from __future__ import annotations

import pytest
import torch

from autodiff.core.chunks import Chunks, Sizes


@pytest.mark.parametrize(
    ("total", "size", "pieces"),
    [
        (5, None, [(0, 5)]),
        (5, 2, [(0, 2), (2, 4), (4, 5)]),
        (4, 2, [(0, 2), (2, 4)]),
        (3, 100, [(0, 3)]),
        (0, None, [(0, 0)]),
        (0, 3, [(0, 0)]),
    ],
)
def test_chunks_cover_the_batch_once(total: int, size: int | None, pieces: list[tuple[int, int]]) -> None:
    calls = []
    chunks = Chunks(total, Sizes(size))
    assert [(start, stop) for start, stop, _ in chunks.each(lambda *bounds: calls.append(bounds))] == pieces
    assert calls == pieces


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("watched", [False, True])
def test_pieces_are_put_together_along_their_dim(dim: int, watched: bool) -> None:
    whole = torch.arange(2.0 * 3 * 4).reshape(2, 3, 4).movedim(1, dim).contiguous().requires_grad_(watched)
    chunks = Chunks(3, Sizes(2))
    for start, stop, _ in chunks.each(lambda *_: None):
        chunks.add(7, start, stop, whole.narrow(dim, start, stop - start), dim)
    result = chunks.whole(7, dim)
    assert torch.equal(result, whole)
    assert result.requires_grad is watched


def test_result_without_pieces_is_none() -> None:
    assert Chunks(3, Sizes(2)).whole(0) is None


def test_chunked_result_is_written_in_place_once() -> None:
    """The pieces of a plain result go into one tensor: peak is the result and one piece."""
    rows = torch.ones(6, 5)
    chunks = Chunks(6, Sizes(2))
    for start, stop, _ in chunks.each(lambda *_: None):
        chunks.add(0, start, stop, rows[start:stop])
        assert chunks.whole(0).data_ptr() == chunks.whole(0).data_ptr()
    assert chunks.whole(0).shape == (6, 5)


def test_pieces_of_different_kinds_are_put_together_right() -> None:
    """A plain piece, none, a watched one and one of another dtype: nothing is lost, nothing invented."""
    rows = torch.arange(14.0).view(7, 2)
    watched = rows[4:6].clone().requires_grad_()
    chunks = Chunks(7, Sizes(2))
    for start, piece in ((0, rows[0:2]), (2, None), (4, watched), (6, rows[6:].double())):
        chunks.add(0, start, min(start + 2, 7), piece)
    expected = torch.cat([rows[0:2], torch.zeros(2, 2), rows[4:]]).double()
    torch.testing.assert_close(chunks.whole(0), expected, check_dtype=True)


def test_a_result_that_never_comes_is_none() -> None:
    chunks = Chunks(4, Sizes(2))
    chunks.add(0, 0, 2, None)
    chunks.add(0, 2, 4, None)
    assert chunks.whole(0) is None
