"""Whole runs: the first samples fail, there are no samples, or a transform is around the run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import autodiff as ad
from autodiff import _torch
from autodiff.errors import BatchError, OptionError, ResumeError, SampleError
from problems import W, X, outer, square


def test_the_first_samples_may_fail() -> None:
    x = X.clone()
    x[:3] = float("inf")
    x[0] = float("nan")

    def func(w: Tensor, x: Tensor) -> Tensor:
        if not bool(_torch.fully_unwrapped(x).isfinite().all()):
            raise RuntimeError("not finite")
        return square(w, x)

    curvature = ad.per_sample(ad.hessian(func), (None, 0), on_error="nan", chunk_size=2)
    result = curvature(W, x)
    assert result[:3].isnan().all()
    assert_close(result[3:], outer(X)[3:])
    loader = torch.utils.data.DataLoader(x, batch_size=2)
    assert_close(curvature(W, loader), result, equal_nan=True)
    assert_close(torch.cat([c.result for c in curvature.stream(W, x)]), result, equal_nan=True)
    with pytest.raises(SampleError, match="all 3 samples failed"):
        curvature(W, x[:3])
    with pytest.raises(SampleError, match="all 3 samples failed"):
        list(curvature.stream(W, x[:3]))


def test_no_samples_give_an_empty_result(tmp_path: Any) -> None:
    curvature = ad.per_sample(ad.hessian(lambda w, x: (w @ x).sin()), (None, 0))
    assert curvature(torch.ones(3), torch.zeros(0, 3)).shape == (0, 3, 3)
    assert curvature(torch.ones(3), torch.zeros(0, 3), out=tmp_path / "none.npy").shape == (0, 3, 3)
    assert list(curvature.stream(torch.ones(3), torch.zeros(0, 3))) == []


def test_random_functions_follow_randomness(tmp_path: Any) -> None:
    x = torch.zeros(9)
    with pytest.raises(ad.errors.SampleError, match="randomness"):
        ad.per_sample(lambda x: x + torch.rand(()))(x)
    different = ad.per_sample(lambda x: x + torch.rand(()), randomness="different", chunk_size=2)
    assert len(set(different(x).tolist())) == 9
    same = ad.per_sample(lambda x: x + torch.rand(()), randomness="same", chunk_size=2)
    assert len(set(same(x).tolist())) == 1


def test_inside_a_transform_it_says_what_to_do() -> None:
    inner = ad.per_sample(lambda x: x**2)
    with pytest.raises(ad.errors.AutodiffError, match="chunk_size='auto'"):
        ad.vmap(inner)(torch.ones(2, 3))


@pytest.mark.parametrize("way", ["call", "out", "map", "file"])
@pytest.mark.parametrize("transform", [None, ad.hessian])
def test_batches_of_another_dtype_are_named(transform: Any, way: str, tmp_path: Any) -> None:
    """Not cast to the first one's: what a float32 cannot hold would be lost."""
    func = square if transform is None else ad.hessian(square)
    run = ad.per_sample(lambda w, x: func(w.to(x.dtype), x), (None, 0))
    source = iter([X[:4], X[4:].double()])
    before = r"is torch.float64 for samples? \d( to \d)?, but torch.float32 for the samples before"
    room = torch.empty(10, *(() if transform is None else (3, 3)))
    ways: dict[str, Any] = {
        "call": lambda: run(W, source),
        "out": lambda: run(W, source, out=room),
        "map": lambda: run.map(torch.sin, W, source),
        "file": lambda: run(W, source, out=tmp_path / "h.npy"),
    }
    with pytest.raises(BatchError, match=before):
        ways[way]()


def test_rows_of_another_dtype_are_named() -> None:
    run = ad.per_sample(ad.hessian(lambda x: x.sum().square()), row_chunk_size=2)
    with pytest.raises(BatchError, match=r"result is torch.float64 for sample 4, but torch.float32"):
        run(iter([X[:4], X[4:].double()]))


def test_a_resumed_run_does_not_cast(tmp_path: Any) -> None:
    def batches(*, fail: bool) -> Any:
        yield X[:4]
        if fail:
            raise RuntimeError("the power failed")
        yield X[4:].double()

    run = ad.per_sample(torch.sin)
    with pytest.raises(RuntimeError, match="power"):
        run(batches(fail=True), out=tmp_path / "s.npy")
    with pytest.raises(ResumeError, match="float64"):
        run(batches(fail=False), out=tmp_path / "s.npy")


def test_integers_are_not_made_of_nan() -> None:
    x = X[:, 0].clone()
    x[3] = float("inf")
    run = ad.per_sample(lambda x: (x, x.clamp(max=9).long()), on_error="nan")
    with pytest.raises(OptionError, match=r"cannot mark sample 3 in a result of dtype torch.int64"):
        run(x)


@pytest.mark.parametrize("way", ["call", "map", "stream"])
@pytest.mark.parametrize("chunk_size", ["auto", None, 1])
def test_results_stay_when_a_loader_writes_to_its_batch_again(chunk_size: Any, way: str) -> None:
    """A function may return its argument, or a tensor that it captures."""
    buffer, captured = torch.zeros(2, 3), torch.zeros(())

    def batches() -> Any:
        for number in (1.0, 2.0, 3.0):
            buffer.fill_(number)
            captured.fill_(number)
            yield buffer

    run = ad.per_sample(lambda x: (x, x[1:], captured), chunk_size=chunk_size)
    match way:
        case "call":
            whole, part, number = run(batches())
        case "map":
            whole, part, number = run.map(lambda result: result, batches())
        case _:
            chunks = [chunk.result for chunk in run.stream(batches())]
            whole, part = (torch.cat([chunk[at] for chunk in chunks]) for at in range(2))
            number = torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0, 3.0])
    expected = torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0, 3.0])
    assert torch.equal(whole, expected[:, None].expand(6, 3))
    assert torch.equal(part, expected[:, None].expand(6, 2))
    assert torch.equal(number, expected)


def test_results_do_not_share_memory_with_arguments() -> None:
    w, x = W.clone(), X.clone()
    for result in ad.per_sample(lambda w, x: (w, x, x[1:]), (None, 0), chunk_size=None)(w, x):
        result.zero_()
    assert torch.equal(w, W)
    assert torch.equal(x, X)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex32, torch.bfloat16, torch.half]
)
def test_small_dtypes(dtype: torch.dtype) -> None:
    x = X.clone()
    x[[2, 5]] = float("nan")
    run = ad.per_sample(lambda x: x.to(dtype), on_error="nan", chunk_size=3)
    result = run(x)
    assert result.dtype == dtype
    assert list(run.report.failed) == [2, 5]
    wide = torch.complex64 if dtype.is_complex else torch.float32
    assert_close(result.to(wide), x.to(dtype).to(wide), equal_nan=True)
