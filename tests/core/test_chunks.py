"""Chunks of given and of learnt sizes, and their results put together."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import autodiff as ad
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
    calls, kept = [], []
    Chunks(total, Sizes(size)).each(lambda *bounds: calls.append(bounds), lambda *chunk: kept.append(chunk))
    assert calls == pieces
    assert kept == [(start, stop, None) for start, stop in pieces]


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("tracked", [False, True])
def test_pieces_are_put_together_along_their_dim(dim: int, tracked: bool) -> None:
    whole = torch.arange(2.0 * 3 * 4).reshape(2, 3, 4).movedim(1, dim).contiguous().requires_grad_(tracked)
    chunks = Chunks(3, Sizes(2))
    chunks.each(
        lambda start, stop: whole.narrow(dim, start, stop - start),
        lambda start, stop, piece: chunks.add(7, start, stop, piece, dim),
    )
    result = chunks.assembled(7, dim)
    assert torch.equal(result, whole)
    assert result.requires_grad is tracked


def test_result_without_pieces_is_none() -> None:
    assert Chunks(3, Sizes(2)).assembled(0) is None


def test_chunked_result_is_written_in_place_once() -> None:
    """The pieces of a plain result go into one tensor: peak is the result and one piece."""
    rows = torch.ones(6, 5)
    chunks = Chunks(6, Sizes(2))
    chunks.each(
        lambda start, stop: rows[start:stop], lambda start, stop, piece: chunks.add(0, start, stop, piece)
    )
    assert chunks.assembled(0).shape == (6, 5)


def test_pieces_of_different_kinds_are_put_together_right() -> None:
    """A plain piece, none, a tracked one and one of another dtype: nothing is lost, nothing invented."""
    rows = torch.arange(14.0).view(7, 2)
    tracked = rows[4:6].clone().requires_grad_()
    chunks = Chunks(7, Sizes(2))
    for start, piece in ((0, rows[0:2]), (2, None), (4, tracked), (6, rows[6:].double())):
        chunks.add(0, start, min(start + 2, 7), piece)
    expected = torch.cat([rows[0:2], torch.zeros(2, 2), rows[4:]]).double()
    torch.testing.assert_close(chunks.assembled(0), expected, check_dtype=True)


def test_a_result_that_never_comes_is_none() -> None:
    chunks = Chunks(4, Sizes(2))
    chunks.add(0, 0, 2, None)
    chunks.add(0, 2, 4, None)
    assert chunks.assembled(0) is None


# Learnt sizes.


def learnt(total: int, budget: int, cost: Any, **options: Any) -> list[int]:
    """The chunks of a batch in which n items take ``cost(n)`` bytes."""
    sizes, done, counts = Sizes("auto", budget, **options), 0, []
    while done < total:
        count = sizes.take(total - done)
        if sizes.learning:
            sizes.learn(count, cost(count))
        counts.append(count)
        done += count
    return counts


@pytest.mark.parametrize(
    ("budget", "cost", "chunks"),
    [
        (1000, lambda n: 10 * n, [1, 32, 67]),  # 80 would fit
        (1000, lambda n: 300 + n, [1, 2, 64, 33]),
        (1000, lambda n: 2000 * n, [1] * 100),
        (10**9, lambda n: n, [1, 32, 67]),
        (400, lambda n: 10 * n, [1, 32, 23, 22, 22]),  # what is left is evened out
    ],
)
def test_sizes_grow_to_the_budget(budget: int, cost: Any, chunks: list[int]) -> None:
    assert learnt(100, budget, cost) == chunks


def test_growth_needs_two_sizes_to_tell_a_constant_part() -> None:
    """A chunk of n takes 500 + n: one measurement allows 1.6 items, two of them 300."""
    sizes = Sizes("auto", 1000)
    sizes.learn(1, 501)
    assert (sizes.size, sizes.learning) == (1, False)
    sizes = Sizes("auto", 4000)
    sizes.learn(1, 501)
    assert (sizes.size, sizes.learning) == (6, True)
    sizes.learn(6, 506)
    assert (sizes.size, sizes.learning) == (192, True)
    sizes.learn(192, 692)
    assert sizes.size == 192 + 4000 * 0.8 - 692


def test_on_the_cpu_enough_is_enough() -> None:
    """A chunk need not be larger than what makes its operations worth their own cost."""
    sizes = Sizes("auto", 2**40)
    sizes.learn(1, 2**20, produced=2**22, operations=100)
    assert sizes.size == 384 * 2**10 * 100 // 2**22
    assert Sizes("auto", 2**40).aim == 64 * 2**20
    assert Sizes("auto", 2**40, device=torch.device("meta")).aim == 0.8 * 2**40


def test_shrunk_sizes_do_not_grow_again() -> None:
    sizes = Sizes("auto", 10**6)
    sizes.learn(1, 10)
    assert sizes.shrink(32)
    assert (sizes.size, sizes.learning) == (16, False)
    sizes.learn(16, 160)
    assert sizes.size == 16
    sizes.learn(16, 1)
    assert sizes.size == 16
    sizes.learn(16, 10**6)
    assert sizes.size == 12
    assert not sizes.shrink(1)
    assert not Sizes(8).shrink(8)


def test_state_is_all_there_is() -> None:
    sizes = Sizes("auto", 10**6)
    sizes.learn(1, 10)
    other = Sizes("auto", 5)
    other.state = json.loads(json.dumps(sizes.state))
    sizes.learn(32, 100)
    other.learn(32, 100)
    assert other.state == sizes.state


TRANSFORMS: dict[str, Any] = {
    "vmap": ad.vmap,
    "jacrev": lambda f, **o: ad.jacrev(ad.vmap(f), **o),
    "jacfwd": lambda f, **o: ad.jacfwd(ad.vmap(f), **o),
    "jacobian": lambda f, **o: ad.jacobian(ad.vmap(f), **o),
    "hessian": lambda f, **o: ad.hessian(lambda x: ad.vmap(f)(x).sum(), **o),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_auto_gives_what_one_batch_gives(name: str) -> None:
    x = torch.randn(40, 3, dtype=torch.float64)
    func = lambda x: (x.sin() * x.prod()).sum()
    torch.testing.assert_close(TRANSFORMS[name](func, chunk_size="auto")(x), TRANSFORMS[name](func)(x))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_auto_survives_memory_that_runs_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is computed in chunks of more than four fails; the random numbers are not lost with it."""
    x = torch.randn(40, 3, dtype=torch.float64)
    func = lambda x: (x.sin() * x.prod()).sum()
    expected, each, tried = TRANSFORMS[name](func)(x), Chunks.each, []

    def limited(self: Chunks, compute: Any, keep: Any) -> Any:
        def compute_some(start: int, stop: int) -> Any:
            tried.append(stop - start)
            if stop - start > 4 and self._sizes.adapts:
                raise torch.OutOfMemoryError("no more")
            return compute(start, stop)

        return each(self, compute_some, keep)

    monkeypatch.setattr(Chunks, "each", limited)
    torch.testing.assert_close(TRANSFORMS[name](func, chunk_size="auto")(x), expected)
    assert max(tried) > 4


def test_what_is_learnt_serves_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    func = ad.vmap(lambda x: (calls.append(1), x * 2)[1], chunk_size="auto")
    func(torch.ones(20, 3))
    assert len(calls) == 2
    func(torch.ones(20, 3))
    assert len(calls) == 3
    func(torch.ones(20, 4))
    assert len(calls) == 5


def test_an_error_that_is_not_about_memory_is_the_caller_s() -> None:
    calls = []

    def fails(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("mine")
        return x

    with pytest.raises(RuntimeError, match="mine"):
        ad.vmap(fails, chunk_size="auto")(torch.ones(9))
    assert len(calls) == 2
