"""Chunk sizes: what counts against the budget, and when a sample is split into rows."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import autodiff as ad
from autodiff.core import memory
from autodiff.errors import BudgetWarning


def test_results_in_memory_count() -> None:
    """16 kB of results leave 4 kB for the chunks; on disk they would have 20 kB."""
    x = torch.randn(40, 10)
    curvature = ad.per_sample(ad.hessian(lambda x: (x**3).sum()), memory=20_000)
    curvature(x)
    assert curvature.report.peak <= 4000
    largest = curvature.report.largest
    for _ in range(5):  # each has the whole budget again
        curvature(x)
    assert curvature.report.largest == largest > 1
    assert sum(1 for _ in curvature.stream(x)) > 3


def test_what_is_held_besides_a_chunk_counts() -> None:
    """A loop holds the last chunk while the next is computed, and a matrix is put together beside its blocks."""
    x, room = torch.randn(64, 10), torch.empty(64, 10, 10)
    largest = {}
    for matrix in (False, True):
        for way in ("out", "stream", "map"):
            curvature = ad.per_sample(ad.hessian(lambda x: (x**3).sum()), memory=12_000, as_matrix=matrix)
            match way:
                case "out":
                    curvature(x, out=room)
                case "stream":
                    assert sum(len(chunk.result) for chunk in curvature.stream(x)) == 64
                case _:
                    curvature.map(torch.trace, x)
            largest[way, matrix] = curvature.report.largest
    assert largest["stream", False] < largest["out", False] == largest["map", False]
    assert largest["stream", True] < largest["map", True] < largest["out", True]


def test_whole_results_beside_rows_count() -> None:
    """A loop over samples in rows: one result is put together while the variable holds the one before."""
    x = torch.randn(3, 200)
    whole, budget = 200 * 200 * 4, 600_000
    curvature = ad.per_sample(ad.hessian(lambda x: (x**3).sum()), memory=budget)
    curvature(x, out=torch.empty(3, 200, 200))  # what is learnt without them does not serve with them
    for _ in range(2):
        with memory.Meter(torch.device("cpu")) as meter:
            for chunk in curvature.stream(x):
                assert chunk.result.shape == (1, 200, 200)
        assert 2 * whole < meter.peak <= budget
        assert 0 < curvature.report.rows < 200


def test_rows_of_a_jacobian_are_split_once_it_is_known_to_be_large() -> None:
    a = torch.randn(300, 20, dtype=torch.float64)
    jacobian = ad.per_sample(ad.jacrev(lambda x: (a @ x).sin()), memory="100kB", as_matrix=True)
    x = torch.randn(3, 20, dtype=torch.float64)
    result = jacobian.map(lambda j: j[::50], x)
    assert_close(result, ((x @ a.T).cos()[:, :, None] * a)[:, ::50])
    assert 0 < jacobian.report.rows < 300


@pytest.mark.parametrize(("budget", "splits"), [("56kB", False), ("30kB", True)])
def test_rows_tell_whether_a_whole_sample_fits(budget: str, splits: bool) -> None:
    """A sample's Hessian may be too large as far as one knows beforehand; its first rows tell."""
    curvature = ad.per_sample(ad.hessian(lambda x: (x**3).sum()), memory=budget)
    x, room = torch.randn(12, 60), torch.empty(12, 60, 60)
    curvature(x, out=room)
    assert_close(room, 6 * torch.diag_embed(x))
    assert curvature.report.rows > 0
    assert curvature.report.peak <= memory.parse_bytes("", budget)
    ((_, rows, _),) = curvature._learnt.values()
    assert (rows is not None) is splits
    # A sample that was tried whole, and is too large, is not tried again.
    assert curvature.report.chunks < 12 * 8


def test_a_piece_beyond_the_budget_warns_once() -> None:
    curvature = ad.per_sample(lambda x: (x[:, None] * x).sum(), memory=100)
    x = torch.ones(4, 50)
    with pytest.warns(BudgetWarning, match="the smallest piece of work takes") as caught:
        assert_close(curvature(x), torch.full((4,), 2500.0))
    assert len(caught) == 1


def test_rows_are_split_when_one_sample_is_beyond_the_budget() -> None:
    """A Hessian of 120 x 120 floats takes 57.6 kB, its rows go to disk within less."""
    x = torch.randn(3, 120, generator=torch.Generator().manual_seed(0))
    quartic = lambda x: (x * x.roll(1)).square().sum()
    curvature = ad.per_sample(ad.hessian(quartic), memory="60kB", as_matrix=True)
    with memory.Meter(torch.device("cpu")) as meter:
        traces = curvature.map(torch.trace, x)
    assert curvature.report.rows < 120
    assert curvature.report.peak <= 60_000
    assert meter.peak < 400_000
    assert_close(traces, ad.vmap(lambda x: torch.trace(ad.hessian(quartic)(x)))(x))
