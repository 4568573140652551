"""Chunks: memory that runs out, samples that fail, and what is said of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

import autodiff as ad
from autodiff import _torch
from autodiff.errors import BudgetError, MissingRuleError, SampleError
from problems import W, X, out_of_memory_above, outer, square


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
            rows = _torch.fully_unwrapped(g).numel() // g.numel()
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
            if _torch.fully_unwrapped(x).numel() > limit:
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
        if fails == "function" and bool(_torch.fully_unwrapped(x).isnan().any()):
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


@pytest.mark.parametrize("transform", [ad.hessian, ad.grad])
@pytest.mark.parametrize("options", [{}, {"row_chunk_size": 2}])
def test_an_error_of_the_call_is_not_a_sample_s(transform: Any, options: Any) -> None:
    with pytest.raises(ad.errors.ArgnumsError):
        ad.per_sample(transform(square, argnums=5), (None, 0), **options)(W, X)


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


ONE_COMBINATION: dict[str, Any] = {
    # Without a rule in reverse over reverse: functions, and their Hessians.
    "hardsigmoid": (
        lambda x: functional.hardsigmoid(x).square().sum(),
        lambda x: torch.diag_embed((x.abs() < 3).to(x) / 18),
    ),
    "cdist": (
        lambda x: torch.cdist(x[:, None], torch.zeros(1, 1, dtype=x.dtype)).pow(3).sum(),
        lambda x: torch.diag_embed(6 * x.abs()),
    ),
    "pdist": (
        lambda x: functional.pdist(x[:, None]).square().sum(),
        lambda x: (2 * x.shape[1] * torch.eye(x.shape[1]) - 2).to(x).expand(len(x), -1, -1),
    ),
}


@pytest.mark.parametrize("options", [{}, {"row_chunk_size": 2}, {"memory": 2000}], ids=str)
@pytest.mark.parametrize("name", ONE_COMBINATION)
@pytest.mark.filterwarnings("ignore::autodiff.errors.BudgetWarning", "ignore:There is a performance drop")
def test_rows_of_a_hessian_take_the_mode_combination_that_has_rules(name: str, options: Any) -> None:
    func, expected = ONE_COMBINATION[name]
    x = torch.tensor([[0.3, -1.2, 0.8, 4.0, 2.1], [1.5, 0.1, -0.4, -3.2, 0.9]], dtype=torch.float64)
    hessians = ad.per_sample(ad.hessian(func), **options)(x)
    assert_close(hessians, expected(x), atol=1e-9, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_rows_of_a_hessian_that_no_combination_has() -> None:
    loss = lambda x: functional.multi_margin_loss(x[None], torch.tensor([1]))
    with pytest.raises(MissingRuleError, match="one of 2 mode combinations"):
        ad.per_sample(ad.hessian(loss), row_chunk_size=2)(torch.ones(2, 3))
