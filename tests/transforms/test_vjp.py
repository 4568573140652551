"""Pullbacks against closed-form Jacobians contracted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import autodiff as ad
from disguises import OF_PRIMALS, Case, call, cases
from scenarios import SCENARIOS, assert_close, map_tree, pulled, random_like

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
V = torch.tensor([1.0, -2.0, 0.25], dtype=torch.float64)


@pytest.mark.parametrize("case", cases(SCENARIOS, OF_PRIMALS))
def test_pullback_is_the_cotangent_times_the_closed_form_jacobian(case: Case) -> None:
    scenario = case.scenario
    outputs = scenario.func(case.primals[0])
    cotangent = random_like(outputs)

    def transform(func: Any, argnums: int, has_aux: bool) -> Any:
        def derived(x: Any) -> Any:
            out, pullback, *aux = ad.vjp(func, x, has_aux=has_aux)
            result = {"out": out, "pulled": pullback(cotangent), "again": pullback(cotangent)}
            return (result, *aux) if has_aux else result

        return derived

    result = call(case, transform)
    assert_close(result["out"], case.expect(scenario.func))
    expected = case.expect(lambda x: pulled(scenario.jacobian(x), outputs, cotangent, x))
    assert_close(result["pulled"], (case.dress(expected),))
    assert_close(result["again"], (case.dress(expected),))


def test_several_primals_give_a_tuple_in_order() -> None:
    def func(x: Tensor, p: dict[str, Tensor], n: int) -> Tensor:
        return x * p["s"] * n

    out, pullback = ad.vjp(func, X, {"s": torch.tensor(2.0, dtype=torch.float64)}, 3)
    assert_close(out, 6 * X)
    assert_close(pullback(V), (6 * V, {"s": 3 * (V @ X)}, None))


def test_cotangents_of_a_dict_match_by_key() -> None:
    _, pullback = ad.vjp(lambda x: {"b": x[0] * 2, "a": x[1] * 5}, X)
    one, two = torch.ones((), dtype=torch.float64), torch.full((), 2.0, dtype=torch.float64)
    (result,) = pullback({"a": one, "b": two})
    assert result.tolist() == [4, 5, 0]


def test_pullback_frees_its_graph_without_retain_graph() -> None:
    _, pullback = ad.vjp(lambda x: x.sin(), X)
    assert_close(pullback(V, retain_graph=False), (V * X.cos(),))
    with pytest.raises(RuntimeError, match="second time"):
        pullback(V)


@pytest.mark.parametrize(("create_graph", "connected"), [(True, True), (False, False), (None, True)])
def test_create_graph_decides_whether_a_watched_pullback_is_connected(
    create_graph: bool | None, connected: bool
) -> None:
    x = X.clone().requires_grad_()
    _, pullback = ad.vjp(lambda x: x.sin(), x)
    (result,) = pullback(V, True, create_graph)
    assert result.requires_grad is connected
    assert_close(result.detach(), V * X.cos())


def test_pullback_is_differentiable_in_its_cotangent() -> None:
    _, pullback = ad.vjp(lambda x: x.sin(), X)
    v = V.clone().requires_grad_()
    (result,) = pullback(v)
    (transposed,) = torch.autograd.grad(result.sum(), v)
    assert_close(transposed, X.cos())


def test_pullback_made_under_no_grad_is_connected_when_called_with_grad_mode_on() -> None:
    x = X.clone().requires_grad_()
    with torch.no_grad():
        out, pullback = ad.vjp(lambda x: x.sin(), x)
    assert not out.requires_grad
    (result,) = pullback(V)
    (second,) = torch.autograd.grad(result.sum(), x)
    assert_close(second, -V * X.sin())


def test_pullback_called_under_no_grad_is_detached() -> None:
    x = X.clone().requires_grad_()
    _, pullback = ad.vjp(lambda x: x.sin(), x)
    with torch.no_grad():
        (result,) = pullback(V)
    assert not result.requires_grad


@pytest.mark.parametrize("explicit", [True, False])
def test_nested_pullbacks_give_third_derivatives(explicit: bool) -> None:
    def first(x: Tensor) -> Tensor:
        return ad.vjp(lambda x: x.sin(), x)[1](torch.ones_like(X))[0]

    def second(x: Tensor) -> Tensor:
        _, pullback = ad.vjp(first, x)
        return (pullback(V, create_graph=True) if explicit else pullback(V))[0]

    _, pullback = ad.vjp(second, X)
    assert_close(pullback(V), (-V * V * X.cos(),))


def test_pullback_can_be_vmapped() -> None:
    rows = torch.randn(4, 2, dtype=torch.float64)
    scenario = next(s for s in SCENARIOS if s.name == "vector to vector")
    _, pullback = ad.vjp(scenario.func, scenario.primal)
    (result,) = ad.vmap(pullback)(rows)
    assert_close(result, rows @ scenario.jacobian(scenario.primal))


def test_sparse_primal_is_accepted() -> None:
    indices = torch.tensor([[0, 1, 1], [2, 0, 2]])
    sparse = torch.sparse_coo_tensor(indices, X, (2, 3), check_invariants=True).coalesce()
    right = torch.randn(3, 4, dtype=torch.float64)
    out, pullback = ad.vjp(lambda m: torch.sparse.mm(m, right), sparse)
    assert_close(out, sparse.to_dense() @ right)
    cotangent = torch.randn(2, 4, dtype=torch.float64)
    (result,) = pullback(cotangent)
    at = tuple(indices)
    assert_close(result.to_dense()[at], (cotangent @ right.T)[at])


def test_holes_in_the_output_stay_holes() -> None:
    out, pullback = ad.vjp(lambda x: {"y": 2 * x, "nothing": None}, X)
    assert out["nothing"] is None
    assert_close(pullback({"y": V, "nothing": None}), (2 * V,))


def test_independent_output_pulls_zeros() -> None:
    _, pullback = ad.vjp(lambda x: torch.ones(2, dtype=torch.float64), X)
    assert_close(pullback(torch.ones(2, dtype=torch.float64)), (torch.zeros_like(X),))


def test_input_returned_as_it_is() -> None:
    out, pullback = ad.vjp(lambda p: p, {"x": X, "n": None})
    assert_close(out, {"x": X, "n": None})
    assert_close(pullback({"x": V, "n": None}), ({"x": V, "n": None},))
    assert not map_tree(lambda leaf: leaf is not None and leaf.requires_grad, out, out)["x"]
