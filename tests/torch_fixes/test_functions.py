"""What a function sees inside forward mode: its own operations, corrected where torch is wrong, and nothing left."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, overrides
from torch.overrides import TorchFunctionMode

import autodiff as ad
from autodiff.errors import ForwardRuleError
from every_transform import T, W, X
from scenarios import assert_close
from table.row import has_torch


def mode_stack() -> list[Any]:
    return overrides._get_current_function_mode_stack()


def test_mode_is_there_once_and_gone_afterwards() -> None:
    seen = []

    def func(x: Tensor) -> Tensor:
        seen.append([type(mode).__name__ for mode in mode_stack()])
        return (x**3).sum()

    ad.jvp(lambda x: ad.jvp(func, (x,), (T,))[1], (X,), (T,))
    ad.vmap(ad.hessian(func, mode="forward-over-forward"))(X[None])
    assert seen == [["ForwardMode"]] * 2
    assert mode_stack() == []
    with pytest.raises(ZeroDivisionError):
        ad.jvp(lambda x: x / (1 // 0), (X,), (T,))
    assert mode_stack() == []


def test_callers_modes_see_what_they_saw() -> None:
    class Count(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += func is torch.sin
            return func(*args, **(kwargs or {}))

    with Count() as count:
        _, tangent = ad.jvp(lambda x: torch.sin(x).sum(), (X,), (T,))
    assert count.calls == 1
    assert_close(tangent, (X.cos() * T).sum())
    with torch.device("meta"):
        assert (
            ad.jvp(lambda x: (x * torch.ones(3)).sum(), (X.to("meta"),), (T.to("meta"),))[1].device.type
            == "meta"
        )


class Cubed(torch.autograd.Function):
    """w x^3 with a jvp of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, power: int) -> Tensor:
        return W * x**power

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.power = inputs[1]
        ctx.save_for_forward(inputs[0])
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return ctx.power * W * ctx.saved_tensors[0] ** (ctx.power - 1) * cotangent, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return ctx.power * W * ctx.saved_tensors[0] ** (ctx.power - 1) * tangent


class CubedByHand(Cubed):
    """The same with a batching rule of its own, whose operations are seen as well."""

    generate_vmap_rule = False

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, power: int) -> Any:
        return CubedByHand.apply(x.movedim(in_dims[0], 0), power), 0


class KeepsIntermediate(Cubed):
    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.power, ctx.slope = inputs[1], 3 * W * inputs[0] ** 2
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return ctx.slope * tangent


@pytest.mark.parametrize("cls", [Cubed, CubedByHand], ids=lambda cls: cls.__name__)
def test_second_and_third_derivatives_of_a_functions_own_jvp(cls: Any) -> None:
    func = lambda x: cls.apply(x, 3).sum()
    hessian = torch.diag(6 * W * X)
    assert_close(ad.jacfwd(ad.jacfwd(func))(X), hessian)
    assert_close(ad.hessian(func, mode="forward-over-forward")(X), hessian)
    assert_close(ad.jvp(lambda x: ad.jvp(func, (x,), (T,))[1], (X,), (T,))[1], (6 * W * X * T * T).sum())
    third = ad.jvp(lambda x: ad.jvp(lambda x: ad.jvp(func, (x,), (T,))[1], (x,), (T,))[1], (X,), (T,))[1]
    assert_close(third, (6 * W * T**3).sum())
    rows = torch.stack([X, 2 * X])
    assert_close(ad.vmap(ad.jacfwd(ad.jacfwd(func)))(rows), torch.stack([hessian, 2 * hessian]))
    assert_close(ad.grad(lambda x: ad.jvp(func, (x,), (T,))[1])(X), 6 * W * X * T)


def test_a_jvp_that_kept_an_intermediate_result_is_an_error_that_names_the_class() -> None:
    func = lambda x: KeepsIntermediate.apply(x, 3).sum()
    slope = lambda x: ad.jvp(func, (x,), (T,))[1]
    assert_close(slope(X), (3 * W * X**2 * T).sum())
    with pytest.raises(
        ForwardRuleError, match=r"KeepsIntermediate.jvp is differentiated.*jacfwd\(jacrev\(f\)\)"
    ):
        ad.jvp(slope, (X,), (T,))
    with pytest.raises(ForwardRuleError, match=r"KeepsIntermediate.jvp is differentiated"):
        ad.grad(slope)(X)
    assert_close(ad.jvp(ad.grad(func), (X,), (T,))[1], 6 * W * X * T)


@pytest.mark.parametrize("nested", [False, True])
def test_writes_in_place_carry_the_tangent(nested: bool) -> None:
    index = torch.tensor([0, 0, 1])

    def scattered(x: Tensor) -> Tensor:
        return (
            torch.ones(2, dtype=x.dtype).mul(x[0] / x[0].detach()).scatter_reduce_(0, index, x, "prod").sum()
        )

    def accumulated(x: Tensor) -> Tensor:
        return x.clone().cumprod_(0).sum()

    expected = {
        scattered: X[0] * T[1] + X[1] * T[0] + T[2] + (X[0] * X[1] + X[2]) * T[0] / X[0],
        accumulated: T[0] * (1 + X[1] + X[1] * X[2]) + T[1] * (X[0] + X[0] * X[2]) + T[2] * X[0] * X[1],
    }
    for func, slope in expected.items():
        push = lambda x, t, func=func: ad.jvp(func, (x,), (t,))[1]
        result = ad.vmap(push)(X[None], T[None])[0] if nested and func is accumulated else push(X, T)
        assert_close(result, slope)


@pytest.mark.filterwarnings(r"ignore:index_reduce\(\) is in beta")
def test_an_operation_without_a_rule_goes_by_its_pullback() -> None:
    matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    moved = torch.tensor([[0.3, -0.2], [-0.2, 0.5]], dtype=torch.float64)
    _, tangent = ad.jvp(torch.linalg.cholesky, (matrix,), (moved,))
    factor = torch.linalg.cholesky(matrix)
    assert_close(tangent @ factor.T + factor @ tangent.T, moved)
    places = torch.tensor([0, 1, 0])
    mean = lambda x: torch.zeros(2, dtype=x.dtype).index_reduce(0, places, x, "mean", include_self=False)
    assert_close(ad.jvp(mean, (X,), (T,))[1], torch.stack([(T[0] + T[2]) / 2, T[1]]))


@pytest.mark.skipif(
    not has_torch("2.13"), reason="torch 2.11 has no derivative of grid_sample's pullback either"
)
def test_grid_sample_goes_by_its_pullback() -> None:
    image = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    grid = torch.rand(1, 3, 3, 2, dtype=torch.float64) - 0.5
    sample = lambda image: torch.nn.functional.grid_sample(image, grid, align_corners=False)
    assert_close(ad.jvp(sample, (image,), (image,))[1], sample(image))


def test_error_of_an_operation_that_nothing_serves() -> None:
    with pytest.raises(NotImplementedError, match="multi_margin_loss"):
        ad.jvp(lambda x: torch.nn.functional.multi_margin_loss(x[None], torch.tensor([1])), (X,), (T,))
    _, tangent = ad.jvp(lambda x: (W * x**3).sum(), (X,), (T,))
    assert_close(tangent, (3 * W * X**2 * T).sum())


def test_other_threads_are_not_seen() -> None:
    """A torch function mode belongs to its thread."""
    stacks = []

    def func(x: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: stacks.append(mode_stack()))
        thread.start()
        thread.join()
        return x.sum()

    ad.jvp(func, (X,), (T,))
    assert stacks == [[]]
