"""jacobian and hessian: trees, forward mode, batches of rows and their limits, strict, graphs."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.testing._internal.logging_tensor import LoggingTensor

import autodiff
from autodiff import functional
from autodiff.errors import StrictModeError


def cubes(x):
    return (x**3).sum()


def test_trees_nest_outputs_outside_and_inputs_inside():
    params = {"w": torch.tensor([1.0, 2.0]), "n": 3, "b": torch.tensor(0.5)}
    jacobian = functional.jacobian(lambda p: {"out": p["w"] * p["b"]}, params)
    assert_close(jacobian["out"]["w"], 0.5 * torch.eye(2))
    assert_close(jacobian["out"]["b"], params["w"])
    assert jacobian["out"]["n"] is None
    hessian = functional.hessian(lambda p: p["b"] * (p["w"] ** p["n"]).sum(), params)
    assert_close(hessian["w"]["w"], torch.diag(3 * params["w"]))
    assert_close(hessian["w"]["b"], 3 * params["w"] ** 2)
    assert_close(hessian["b"]["w"], 3 * params["w"] ** 2)
    assert_close(hessian["b"]["b"], torch.tensor(0.0))


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("create_graph", [False, True])
def test_forward_mode_needs_no_other_keyword(vectorize, create_graph):
    x = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    keywords = {"vectorize": vectorize, "create_graph": create_graph}
    jacobian = functional.jacobian(lambda x: x[:2] * x[2], x, strategy="forward-mode", **keywords)
    assert_close(jacobian.detach(), torch.tensor([[4.0, 0.0, 1.0], [0.0, 4.0, 2.0]]))
    hessian = functional.hessian(cubes, x, outer_jacobian_strategy="forward-mode", **keywords)
    assert_close(hessian.detach(), torch.diag(6 * x.detach()))
    assert (jacobian.requires_grad, hessian.requires_grad) == (create_graph, create_graph)
    if create_graph:
        (third,) = torch.autograd.grad(hessian.diagonal().sum(), x)
        assert_close(third, torch.full((3,), 6.0))


def test_forward_mode_gives_the_outputs_dtype_and_reverse_mode_the_inputs():
    x = torch.tensor([1.0, 2.0])
    keywords = {"func": lambda x: x.double() ** 2, "inputs": x}
    assert functional.jacobian(**keywords).dtype == torch.float32
    assert functional.jacobian(**keywords, strategy="forward-mode").dtype == torch.float64


class _NoForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        return 2 * x * cotangent


def test_forward_mode_without_a_rule_becomes_reverse_in_the_same_dtype():
    x = torch.tensor([1.0, 3.0])
    jacobian = functional.jacobian(lambda x: _NoForward.apply(x).double(), x, strategy="forward-mode")
    assert_close(jacobian, torch.diag(2 * x).double())


def test_forward_mode_that_becomes_reverse_draws_the_same_random_numbers():
    def drawn(x):
        return torch.nn.functional.dropout(x, 0.5)

    seed, x = torch.get_rng_state(), torch.linspace(1.0, 2.0, 8)
    factors, after = drawn(torch.ones(8)), torch.get_rng_state()
    torch.set_rng_state(seed)
    jacobian = functional.jacobian(lambda x: _NoForward.apply(drawn(x)), x, strategy="forward-mode")
    assert_close(jacobian, torch.diag(2 * factors**2 * x))
    assert torch.equal(torch.get_rng_state(), after)


class _ReadsItsCotangent(torch.autograd.Function):
    """A backward pass that cannot be batched: it branches on a value."""

    pulls = 0

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, cotangent):
        (x,) = ctx.saved_tensors
        _ReadsItsCotangent.pulls += 1
        if cotangent.abs().sum().item() < 0:
            raise AssertionError
        return 2 * x * cotangent


@pytest.mark.parametrize("create_graph", [False, True])
def test_rows_that_cannot_be_batched_are_pulled_one_by_one(create_graph):
    x = torch.tensor([1.0, 3.0, 2.0])
    jacobian = functional.jacobian(_ReadsItsCotangent.apply, x, create_graph=create_graph)
    assert_close(jacobian.detach(), torch.diag(2 * x))
    hessian = functional.hessian(
        lambda x: (_ReadsItsCotangent.apply(x) ** 2).sum(), x, create_graph=create_graph
    )
    assert_close(hessian.detach(), torch.diag(12 * x**2))
    with pytest.raises(RuntimeError, match="item"):
        functional.jacobian(_ReadsItsCotangent.apply, x, vectorize=True)


class _CountsItsPulls(torch.autograd.Function):
    pulls = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, cotangent):
        _CountsItsPulls.pulls += 1
        return cotangent


def test_rows_are_batched_by_default():
    x = torch.linspace(0.0, 1.0, 64)
    _CountsItsPulls.pulls = 0
    assert_close(functional.jacobian(lambda x: _CountsItsPulls.apply(x).sin(), x), torch.diag(x.cos()))
    assert _CountsItsPulls.pulls < 16


@torch.library.custom_op("autodiff_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return 2 * x


class _PulledWithoutABatchingRule(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: 2 * x)
    backward = staticmethod(lambda ctx, cotangent: doubled(cotangent))


def test_rows_are_batched_quietly_where_nobody_asked_for_a_batch():
    def func(x):
        return _PulledWithoutABatchingRule.apply(x).sin()

    x = torch.linspace(0.0, 1.0, 64)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        assert_close(functional.jacobian(func, x), torch.diag(2 * (2 * x).cos()))
    assert heard == []
    with pytest.warns(UserWarning, match="There is a performance drop"):
        functional.jacobian(func, x, vectorize=True)


def test_a_hook_is_shown_row_after_row():
    rows = []

    def func(x):
        y = x.sin()
        y.register_hook(rows.append)
        return y

    functional.jacobian(func, torch.linspace(0.0, 1.0, 8))
    assert_close(torch.stack(rows), torch.eye(8))


def test_a_pull_that_gives_nothing_for_some_rows_gives_zeros_there():
    class Silent(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: 2 * x)
        backward = staticmethod(lambda ctx, g: 2 * g if g.any() else None)

    weights = torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0])
    expected = torch.zeros(8, 8)
    for row in (0, 2, 4, 6):
        expected[row, row % 4] = 2
    assert_close(
        functional.jacobian(lambda x: Silent.apply(x)[:4].repeat(2) * weights, torch.ones(8)), expected
    )


def test_rows_whose_batch_would_be_wrong_are_pulled_one_by_one():
    x, centres = (
        torch.tensor([[0.0, 1], [2, 0.5], [1, 3], [0.3, 2]]),
        torch.tensor([[1.0, 0], [3, 1], [0, 2]]),
    )
    difference = x[:, None] - centres
    unit = difference / difference.norm(dim=-1, keepdim=True)
    expected = torch.einsum("ijk,il->ijlk", unit, torch.eye(4))
    assert_close(functional.jacobian(lambda x: torch.cdist(x, centres), x), expected)


@pytest.mark.parametrize("vectorize", [False, True])
def test_an_integer_output_has_a_jacobian_of_zeros(vectorize):
    x = torch.tensor([1.0, -2.0])
    smooth, steps = functional.jacobian(lambda x: (x**2, (x > 0).long()), x, vectorize=vectorize)
    assert_close((smooth, steps), (torch.diag(2 * x), torch.zeros(2, 2)))


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("keywords", [{}, {"vectorize": True}, {"strategy": "forward-mode"}])
def test_jacobians_and_hessians_are_right_under_vmap(keywords, create_graph):
    samples = torch.tensor([[1.0, 2.0], [3.0, 5.0], [0.5, 4.0]])
    of_sin = autodiff.vmap(lambda x: functional.jacobian(torch.sin, x, create_graph=create_graph, **keywords))
    assert_close(of_sin(samples), torch.diag_embed(samples.cos()))
    outer = {
        "outer_jacobian_strategy" if key == "strategy" else key: value for key, value in keywords.items()
    }
    of_cubes = autodiff.vmap(lambda x: functional.hessian(cubes, x, create_graph=create_graph, **outer))
    assert_close(of_cubes(samples), torch.diag_embed(6 * samples))


def test_hessians_with_a_graph_are_differentiated_by_the_transforms():
    x = torch.tensor([1.0, 2.0])
    third = autodiff.jacrev(lambda x: functional.hessian(cubes, x, create_graph=True))(x)
    expected = torch.zeros(2, 2, 2)
    expected[0, 0, 0] = expected[1, 1, 1] = 6.0
    assert_close(third, expected)


@pytest.mark.parametrize("name", ["jacobian", "hessian"])
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_matrices_with_a_graph_are_twice_differentiable(name, strategy):
    weight = torch.tensor([0.3, -0.7, 0.2], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([0.4, 0.9, -0.3], dtype=torch.float64, requires_grad=True)
    keyword = "strategy" if name == "jacobian" else "outer_jacobian_strategy"

    def matrix(x, w):
        def func(x):
            values = w * x.sin() * x.flip(0)
            return values if name == "jacobian" else values.sum()

        return getattr(functional, name)(func, x, create_graph=True, **{keyword: strategy})

    assert torch.autograd.gradcheck(matrix, (x, weight))
    assert torch.autograd.gradgradcheck(matrix, (x, weight))


@pytest.mark.parametrize("create_graph", [False, True])
def test_inference_mode_changes_nothing(create_graph):
    with torch.inference_mode():
        x = torch.tensor([1.0, 2.0])
        results = [
            functional.jacobian(lambda x: x**2, x, create_graph=create_graph),
            functional.jacobian(lambda x: x**2, x, create_graph=create_graph, strategy="forward-mode"),
            functional.hessian(lambda x: (x**3).sum() / 3, x, create_graph=create_graph),
        ]
    for result in results:
        assert result.requires_grad == create_graph
        assert_close(result.detach().clone(), torch.diag(torch.tensor([2.0, 4.0])))


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_a_logging_subclass_passes(vectorize, strategy):
    x = LoggingTensor(torch.tensor([1.0, 2.0]))
    jacobian = functional.jacobian(torch.sin, x, vectorize=vectorize, strategy=strategy)
    hessian = functional.hessian(cubes, x, vectorize=vectorize, outer_jacobian_strategy=strategy)
    assert isinstance(jacobian, LoggingTensor)
    assert isinstance(hessian, LoggingTensor)


def test_strict_names_output_and_leaf():
    params = {"w": torch.ones(2), "unused": torch.ones(3)}
    with pytest.raises(StrictModeError, match=r"Output 0 .* is independent of input inputs\['unused'\]"):
        functional.jacobian(lambda p: p["w"] * 2, params, strict=True)
    with pytest.raises(StrictModeError, match=r"with respect to input inputs\['unused'\] is independent"):
        functional.hessian(lambda p: (p["w"] ** 2).sum() + p["unused"].sum(), params, strict=True)


@pytest.mark.parametrize("keywords", [{}, {"strategy": "forward-mode"}, {"vectorize": True}])
def test_the_function_runs_once(keywords):
    calls = []

    def counted(x):
        calls.append(x)
        return x.sin()

    functional.jacobian(counted, torch.ones(5), **keywords)
    assert len(calls) == 1
