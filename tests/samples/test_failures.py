"""Samples that fail, memory that runs out, wrong calls: what is said, and what is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import autodiff as ad
from autodiff import _torch
from autodiff.core import memory
from autodiff.errors import BatchError, BudgetError, BudgetWarning, OptionError, SampleError, ShapeError
from autodiff.samples import sources

W = torch.tensor([1.0, 2.0, -1.0])
X = torch.arange(30.0).view(10, 3) / 10


def square(w: Tensor, x: Tensor) -> Tensor:
    """Its Hessian is 2 x x^T."""
    return (w @ x) ** 2


def outer(x: Tensor) -> Tensor:
    return 2 * x[:, :, None] * x[:, None, :]


def out_of_memory_above(size: int, tried: list[int], func: Any = square) -> Any:
    """``func``, but for batches of more than ``size`` samples there is no memory."""

    def limited(w: Tensor, x: Tensor) -> Tensor:
        batch = _torch.bottom(x).numel() // x.numel()
        tried.append(batch)
        if batch > size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return func(w, x)

    return limited


@pytest.mark.parametrize("limit", [1, 3, 4])
def test_out_of_memory_is_survived(limit: int) -> None:
    tried: list[int] = []
    curvature = ad.per_sample(ad.hessian(out_of_memory_above(limit, tried)), (None, 0))
    assert_close(curvature(W, X), outer(X))
    assert max(tried) == 9  # one sample, then all others at once
    assert tried.count(9) == 1
    assert curvature.report.largest <= limit


def test_out_of_memory_in_rows_is_survived() -> None:
    """A sample of which only two rows fit: rows are halved until they do."""
    fits = []

    class Limited(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            rows = _torch.bottom(g).numel() // g.numel()
            fits.append(rows)
            if rows > 2:
                raise torch.OutOfMemoryError("too many rows")
            return g.clone()

        generate_vmap_rule = True

    a = torch.arange(42.0).view(7, 6)
    jacobian = ad.per_sample(ad.jacrev(lambda x: a @ Limited.apply(x)), as_matrix=True)
    assert_close(jacobian(torch.ones(3, 6)), a.expand(3, 7, 6))
    assert max(fits) == 7
    assert jacobian.report.rows <= 3


@pytest.mark.parametrize("way", ["call", "map", "stream", "file"])
def test_out_of_memory_loses_nothing(way: str, tmp_path: Any) -> None:
    curvature = ad.per_sample(ad.hessian(out_of_memory_above(2, [])), (None, 0))
    match way:
        case "call":
            result = curvature(W, X)
        case "map":
            result = curvature.map(lambda h: h, W, X)
        case "stream":
            result = torch.cat([chunk.result for chunk in curvature.stream(W, X)])
        case _:
            result = curvature(W, X, out=tmp_path / "h.npy")
    assert_close(result, outer(X))


def test_without_a_smaller_chunk_the_error_says_what_to_do() -> None:
    with pytest.raises(BudgetError, match=r"cannot be made smaller.*smaller chunk_size") as caught:
        ad.per_sample(ad.hessian(out_of_memory_above(0, [])), (None, 0))(W, X)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    with pytest.raises(BudgetError):
        ad.per_sample(ad.hessian(out_of_memory_above(3, [])), (None, 0), chunk_size=5)(W, X)


def test_random_numbers_are_not_lost_with_a_chunk_that_did_not_fit() -> None:
    x = torch.zeros(9)

    def noise(limit: int) -> Tensor:
        torch.manual_seed(3)

        def draw(x: Tensor) -> Tensor:
            value = x + torch.rand(())
            if _torch.bottom(x).numel() > limit:
                raise torch.OutOfMemoryError("no")
            return value

        return ad.per_sample(draw, randomness="different", chunk_size="auto" if limit < 9 else 1)(x)

    assert_close(noise(1), noise(9))


@pytest.mark.parametrize("options", [{}, {"chunk_size": 1}, {"chunk_size": None}, {"row_chunk_size": 2}])
@pytest.mark.parametrize("fails", ["values", "function"])
def test_a_failing_sample_is_named_or_filled(fails: str, options: Any, tmp_path: Any) -> None:
    bad = [2, 7]
    x = X.clone()
    x[bad] = float("nan")

    def func(w: Tensor, x: Tensor) -> Tensor:
        if fails == "function" and bool(_torch.bottom(x).isnan().any()):
            raise ValueError("no number")
        return square(w, x)

    with pytest.raises(SampleError, match="sample 2") as caught:
        ad.per_sample(ad.hessian(func), (None, 0), **options)(W, x)
    assert caught.value.index == 2
    if fails == "function":
        assert isinstance(caught.value.__cause__, ValueError)
    curvature = ad.per_sample(ad.hessian(func), (None, 0), on_error="nan", **options)
    expected = outer(X)
    expected[bad] = float("nan")
    assert_close(curvature(W, x), expected, equal_nan=True)
    assert list(curvature.report.failed) == bad
    assert "2 failed: 2, 7" in repr(curvature)
    assert_close(curvature(W, x, out=tmp_path / "h.npy"), expected, equal_nan=True)
    assert_close(curvature.map(torch.trace, W, x), expected.diagonal(dim1=1, dim2=2).sum(1), equal_nan=True)
    pieces = list(curvature.stream(W, x))
    assert_close(torch.cat([piece.result for piece in pieces]), expected, equal_nan=True)
    assert [piece.samples.start for piece in pieces] == [0, *(piece.samples.stop for piece in pieces[:-1])]
    # A resumed run remembers which samples failed.
    again = ad.per_sample(ad.hessian(func), (None, 0), on_error="nan", **options)
    again(W, x, out=tmp_path / "h.npy")
    assert list(again.report.failed) == bad


def test_the_first_samples_may_fail() -> None:
    x = X.clone()
    x[:3] = float("inf")
    x[0] = float("nan")

    def func(w: Tensor, x: Tensor) -> Tensor:
        if not bool(_torch.bottom(x).isfinite().all()):
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


def test_large_finite_values_are_finite() -> None:
    x = torch.full((4, 3), 1e38)
    assert ad.per_sample(lambda x: x * 3)(x).sum() == float("inf")
    assert_close(ad.per_sample(lambda x: x * 3)(x), x * 3)


def test_a_caller_s_samples_are_not_written_to() -> None:
    x = X.clone()
    x[1] = float("inf")
    before = x.clone()
    result = ad.per_sample(lambda x: x, on_error="nan")(x)
    assert result[1].isnan().all()
    assert torch.equal(x, before)


def test_integers_cannot_be_marked() -> None:
    def func(x: Tensor) -> Tensor:
        if not bool(_torch.bottom(x).isfinite().all()):
            raise RuntimeError("not finite")
        return x.long()

    with pytest.raises(OptionError, match=r"sample 1 in a result of dtype torch.int64"):
        ad.per_sample(func, on_error="nan")(torch.tensor([1.0, float("inf"), 2.0]))


@pytest.mark.parametrize("transform", [ad.hessian, ad.grad])
@pytest.mark.parametrize("options", [{}, {"row_chunk_size": 2}])
def test_an_error_of_the_call_is_not_a_sample_s(transform: Any, options: Any) -> None:
    with pytest.raises(ad.errors.ArgnumsError):
        ad.per_sample(transform(square, argnums=5), (None, 0), **options)(W, X)


def test_results_beyond_the_budget_are_refused_early() -> None:
    calls: list[int] = []
    curvature = ad.per_sample(ad.hessian(out_of_memory_above(9, calls)), (None, 0), memory=200)
    with pytest.raises(BudgetError, match=r"10 samples take 360 B, more than the 200 B.*out='file.npy'"):
        curvature(W, X)
    assert calls == [1]


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


def test_a_loader_tells_how_many_samples_it_will_give() -> None:
    count = sources._count
    data = torch.utils.data.TensorDataset(X)
    assert count(torch.utils.data.DataLoader(data, batch_size=4)) == 10
    assert count(torch.utils.data.DataLoader(data, batch_size=4, drop_last=True)) == 8
    assert count(torch.utils.data.DataLoader(data, batch_size=4, sampler=[1, 2, 3])) == 3
    assert count(iter([X])) is None


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
    assert curvature.report.peak <= memory.parse("", budget)
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


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"memory": "lots"}, OptionError, r"per_sample: memory is a positive number of bytes, .* got 'lots'"),
        ({"memory": 0}, OptionError, "positive number of bytes"),
        ({"memory": True}, OptionError, "positive number of bytes"),
        ({"on_error": "ignore"}, OptionError, "'raise', 'nan'. Got 'ignore'"),
        ({"chunk_size": 0}, OptionError, r"per_sample: `chunk_size` .*got 0.*'auto' learns"),
        ({"row_chunk_size": "rows"}, OptionError, "got 'rows'"),
        ({"randomness": "some"}, OptionError, "randomness"),
        ({"as_matrix": True}, OptionError, "needs a function made by jacrev.*got square"),
    ],
)
def test_wrong_options(options: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        ad.per_sample(square, (None, 0), **options)


@pytest.mark.parametrize(
    ("out", "kind", "text"),
    [
        (
            torch.empty(9, 3, 3),
            ShapeError,
            r"out has \[9, 3, 3\] float32, but the result is \[10, 3, 3\] float32",
        ),
        (torch.empty(10, 3, 3, dtype=torch.float64), ShapeError, "float64, but"),
        ([torch.empty(10, 3, 3)] * 2, ShapeError, "one tensor for each leaf"),
        (3, OptionError, "or a path, got <class 'int'>"),
    ],
)
def test_wrong_destinations(out: Any, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=text):
        ad.per_sample(ad.hessian(square), (None, 0))(W, X, out=out)


def test_wrong_sources() -> None:
    curvature = ad.per_sample(ad.hessian(square), (None, 0))
    with pytest.raises(BatchError, match="is empty"):
        curvature(W, iter([]))
    with pytest.raises(BatchError, match=r"expected 1 shared arguments .* got 2"):
        curvature(W, W, iter([X]))
    with pytest.raises(BatchError, match="both iterables"):
        curvature(iter([W]), iter([X]))
    with pytest.raises(
        BatchError, match="a batch of the iterable is a tuple of 3, but 2 arguments are mapped"
    ):
        ad.per_sample(lambda w, x, y: w @ x * y, (None, 0, 0))(W, iter([(X, X, X)]))
    with pytest.raises(BatchError, match="every argument is mapped, but 1 more"):
        ad.per_sample(torch.dot)(W, iter([X]))
    with pytest.raises(BatchError, match="per_sample: Expected all tensors to have the same size"):
        ad.per_sample(torch.dot)(X, X[:3])


def test_wrong_in_dims_are_per_sample_s() -> None:
    for in_dims, text in (
        ((0,), "not compatible"),
        ("x", "expected `in_dims`"),
        ((None, 5), "Got in_dim=5"),
        ({"z": 0}, "'z'"),
    ):
        with pytest.raises(BatchError, match=rf"^per_sample.*{text}"):
            ad.per_sample(ad.hessian(square), in_dims)(W, X)


def test_iterables_of_batches() -> None:
    curvature = ad.per_sample(ad.hessian(square), (None, 0))
    batches = [X[:4], X[4:5], X[5:]]
    assert_close(curvature(W, iter(batches)), outer(X))
    assert_close(curvature(W, ([batch] for batch in batches)), outer(X))
    assert_close(ad.per_sample(torch.dot)(iter([(X[:4], X[:4]), (X[4:], X[4:])])), X.square().sum(1))
    named = ad.per_sample(lambda w, *, x, scale: w @ x * scale, {"x": 0, "scale": 0})
    scale = torch.arange(10.0)
    expected = X @ W * scale
    assert_close(named(W, iter([{"x": X, "scale": scale}])), expected)
    assert_close(named(W, iter([(X[:2], scale[:2]), (X[2:], scale[2:])])), expected)


def test_progress_says_what_it_needs(monkeypatch: Any, capsys: Any) -> None:
    shown = ad.per_sample(ad.hessian(square), (None, 0), progress=True)
    shown(W, X)
    text = capsys.readouterr().err
    assert "per_sample(hessian(square))" in text
    assert "10/10" in text
    assert "sample/s" in text
    assert "peak" in text
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match="autodiff\\[progress\\]"):
        ad.per_sample(square, (None, 0), progress=True)


def test_dropout_left_on_says_how_to_switch_it_off() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout())
    loss = ad.sample_loss(model, torch.nn.functional.mse_loss)
    gradients = ad.per_sample(ad.grad(loss), in_dims=(None, 0, 0))
    with pytest.raises(SampleError, match=r"sample 0: .* no random numbers\. Call module\.eval\(\)"):
        gradients(dict(model.named_parameters()), X, X[:, :2])


def test_function_that_raises_is_not_said_to_give_infinities() -> None:
    def picky(x: Tensor) -> Tensor:
        raise LookupError("no such thing.")

    with pytest.raises(
        SampleError, match=r"LookupError: no such thing\. Expected a function that runs on every"
    ):
        ad.per_sample(picky)(X)


def test_parameters_as_an_iterator_are_taken_for_batches() -> None:
    model = torch.nn.Linear(3, 2)
    loss = ad.sample_loss(model, torch.nn.functional.mse_loss)
    gradients = ad.per_sample(ad.grad(loss), in_dims=(None, 0, 0))
    with pytest.raises(
        BatchError, match=r"Any iterator counts as batches: .* dict\(module\.named_parameters\(\)\)"
    ):
        gradients(model.named_parameters(), X, X[:, :2])
