"""Results in new memory, within the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader

import autodiff as ad
from autodiff import _torch
from autodiff.errors import BudgetError
from problems import W, X, out_of_memory_above


def test_results_beyond_the_budget_are_refused_early() -> None:
    calls: list[int] = []
    curvature = ad.per_sample(ad.hessian(out_of_memory_above(9, calls)), (None, 0), memory=200)
    with pytest.raises(BudgetError, match=r"10 samples take 360 B, more than the 200 B.*out='file.npy'"):
        curvature(W, X)
    assert calls == [1]


def grows(x: torch.Tensor) -> torch.Tensor:
    """A result of 4 kB."""
    return x * torch.ones(1000)


def test_results_of_a_loader_are_counted_before_they_come() -> None:
    loader = DataLoader(torch.ones(100), batch_size=10)
    given = []

    def batches() -> Any:
        for batch in loader:
            given.append(batch)
            yield batch

    run = ad.per_sample(grows, memory="100kB")
    with pytest.raises(BudgetError, match=r"results of 100 samples take 390.6 KiB, more than the 97.7 KiB"):
        run(loader)
    with pytest.raises(
        BudgetError, match=r"kept in pieces as their number is not known, and put together, take"
    ):
        run(batches())
    # Twice what came is never more than memory allows.
    assert len(given) == 2
    assert run.map(torch.sum, loader).shape == (100,)
    assert_close(ad.per_sample(grows, memory="500kB")(loader), torch.ones(100, 1000))


def test_chunks_leave_what_results_of_batches_take() -> None:
    """As with tensors: the more results are there, the smaller are the chunks."""

    sizes: list[int] = []

    def func(x: torch.Tensor) -> torch.Tensor:
        """A result of 4 kB, for which 36 kB are needed."""
        sizes.append(_torch.fully_unwrapped(x).numel())
        kept = [x * torch.ones(1000) for _ in range(4)]
        return torch.stack(kept).sum(0)

    ad.per_sample(func, memory="400kB")(iter([torch.ones(34), torch.ones(16)]))
    of_second = sizes[[sum(sizes[: at + 1]) for at in range(len(sizes))].index(34) + 1 :]
    assert sum(of_second) == 16
    # 34 results take 136 kB.
    assert max(of_second) * 36_000 < 400_000 - 136_000


@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}, {"row_chunk_size": 2}])
@pytest.mark.parametrize("count", [0, 1, 4, 9, 10, 11, 30])
def test_loaders_may_give_more_or_fewer_samples_than_they_say(count: int, options: Any) -> None:
    class Loader:
        """As a DataLoader whose collate_fn drops or doubles samples."""

        batch_size, drop_last = 5, False
        sampler = range(count)

        def __iter__(self) -> Any:
            return iter([X[:3], X[3:4], X[4:]])

    x = X.clone()
    run = ad.per_sample(ad.hessian(lambda w, x: (w @ x) ** 3), (None, 0), **options)
    assert_close(run(W, Loader()), run(W, x))


@pytest.mark.parametrize("options", [{}, {"row_chunk_size": 2}])
def test_samples_of_a_loader_that_fail(options: Any) -> None:
    x = X.clone()
    x[[0, 1, 4, 9]] = float("nan")
    run = ad.per_sample(ad.hessian(lambda w, x: (w @ x) ** 3), (None, 0), on_error="nan", **options)
    expected = run(W, x)
    assert expected.isnan().flatten(1).all(1).nonzero().flatten().tolist() == [0, 1, 4, 9]
    for batches in ([x[:1], x[1:5], x[5:]], [x[:2], x[2:], x[:0]]):
        assert_close(run(W, iter(batches)), expected, equal_nan=True)
    assert_close(run(W, DataLoader(x, batch_size=4)), expected, equal_nan=True)
