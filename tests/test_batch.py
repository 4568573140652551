"""The batching level and the collector of chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import autodiff as ad
from autodiff.core import batch
from autodiff.core.batch import Chunks


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
    chunks = Chunks(total, size)
    assert list(chunks) == pieces
    assert [chunks.is_last(stop) for _, stop in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("watched", [False, True])
def test_pieces_are_put_together_along_their_dim(dim: int, watched: bool) -> None:
    whole = torch.arange(2.0 * 3 * 4).reshape(2, 3, 4).movedim(1, dim).contiguous().requires_grad_(watched)
    chunks = Chunks(3, 2)
    for start, stop in chunks:
        chunks.add(7, start, whole.narrow(dim, start, stop - start), dim)
    result = chunks.whole(7, dim)
    assert torch.equal(result, whole)
    assert result.requires_grad is watched


def test_result_without_pieces_is_none() -> None:
    assert Chunks(3, 2).whole(0) is None


def test_run_tells_which_outputs_are_batched() -> None:
    told = []

    def out_dims(outputs: list[Tensor], batched: list[bool]) -> list[int]:
        told.extend(batched)
        return [1, 0]

    x, shared = torch.arange(6.0).reshape(3, 2), torch.ones(4)
    one, other = batch.run(
        lambda leaves: [leaves[0] * 2, leaves[1]], [x, shared], [0, None], 3, "error", out_dims
    )
    assert told == [True, False]
    assert torch.equal(one, 2 * x.T)
    assert torch.equal(other, torch.ones(3, 4))


def test_rewind_repeats_the_same_random_numbers() -> None:
    rewind = batch.remember_randomness([torch.zeros(1), "text"])
    first = torch.rand(3)
    rewind()
    assert torch.equal(torch.rand(3), first)


def test_chunked_result_is_written_in_place_once() -> None:
    """The pieces of a plain result go into one tensor: peak is the result and one piece."""
    rows = torch.ones(6, 5)
    chunks = Chunks(6, 2)
    for start, stop in chunks:
        chunks.add(0, start, rows[start:stop])
        assert chunks.whole(0).data_ptr() == chunks.whole(0).data_ptr()
    assert chunks.whole(0).shape == (6, 5)


def test_same_draws_once_for_all_chunks_of_a_jacobian() -> None:
    x = torch.ones(9, dtype=torch.float64)
    jacobian = ad.jacfwd(lambda x: x * torch.rand_like(x), chunk_size=2)(x)
    assert torch.equal(jacobian, torch.diag(jacobian.diagonal()))
    assert len(set(jacobian.diagonal().tolist())) == 9


def test_pieces_of_different_kinds_are_put_together_right() -> None:
    """A plain piece, none, a watched one and one of another dtype: nothing is lost, nothing invented."""
    rows = torch.arange(14.0).view(7, 2)
    watched = rows[4:6].clone().requires_grad_()
    chunks = batch.Chunks(7, 2)
    for start, piece in ((0, rows[0:2]), (2, None), (4, watched), (6, rows[6:].double())):
        chunks.add(0, start, piece)
    expected = torch.cat([rows[0:2], torch.zeros(2, 2), rows[4:]]).double()
    torch.testing.assert_close(chunks.whole(0), expected, check_dtype=True)


def test_a_result_that_never_comes_is_none() -> None:
    chunks = batch.Chunks(4, 2)
    chunks.add(0, 0, None)
    chunks.add(0, 2, None)
    assert chunks.whole(0) is None
