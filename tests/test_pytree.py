"""ravel, to_matrix, from_matrix and registration, also under vmap and with passive leaves."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import autodiff as ad
from autodiff.pytree import from_matrix, ravel, register, register_dataclass, to_matrix
from scenarios import SCALAR, SCENARIOS, Scenario, assert_close, leaves_of

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
MIXED = {"w": torch.arange(6.0).reshape(2, 3), "n": 3, "b": torch.tensor(7.0), "s": "text", "none": None}


def test_ravel_runs_over_leaves_in_tree_order() -> None:
    vector, unravel = ravel(MIXED)
    assert vector.tolist() == [0, 1, 2, 3, 4, 5, 7]
    back = unravel(vector * 2)
    assert_close(back, MIXED | {"w": MIXED["w"] * 2, "b": MIXED["b"] * 2})


def test_ravel_promotes_and_unravel_restores_dtypes() -> None:
    tree = [torch.ones(2), torch.ones(1, dtype=torch.float64)]
    vector, unravel = ravel(tree)
    assert vector.dtype == torch.float64
    assert_close(unravel(vector), tree)


def test_ravel_is_differentiable_both_ways() -> None:
    vector, unravel = ravel(MIXED)
    assert_close(
        ad.grad(lambda v: (unravel(v)["w"] ** 2).sum())(vector), torch.tensor([0, 2, 4, 6, 8, 10, 0.0])
    )
    gradient = ad.grad(lambda p: (ravel(p)[0] ** 2).sum())(MIXED)
    assert_close(gradient, {"w": 2 * MIXED["w"], "n": None, "b": 2 * MIXED["b"], "s": None, "none": None})


def test_ravel_under_vmap() -> None:
    batch = {"w": torch.randn(4, 2, 3), "b": torch.randn(4)}
    vectors = ad.vmap(lambda p: ravel(p)[0])(batch)
    assert_close(vectors, torch.cat([batch["w"].reshape(4, 6), batch["b"][:, None]], 1))
    _, unravel = ravel({"w": batch["w"][0], "b": batch["b"][0]})
    assert_close(ad.vmap(unravel)(vectors), batch)


def dense(scenario: Scenario) -> Tensor:
    """The closed-form Jacobian as a matrix, put together by hand."""
    sizes = [leaf.numel() for leaf in leaves_of(scenario.primal)]
    outputs = leaves_of(scenario.func(scenario.primal))
    blocks = leaves_of(scenario.jacobian(scenario.primal))
    rows = [
        torch.cat([blocks[o * len(sizes) + i].reshape(out.numel(), n) for i, n in enumerate(sizes)], 1)
        for o, out in enumerate(outputs)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
@pytest.mark.parametrize("transform", [ad.jacrev, ad.jacfwd, ad.jacobian])
def test_matrix_of_a_jacobian_and_back(scenario: Scenario, transform: Any) -> None:
    jacobian = transform(scenario.func)(scenario.primal)
    matrix = to_matrix(jacobian, scenario.primal)
    assert_close(matrix, dense(scenario))
    assert_close(from_matrix(matrix, scenario.func(scenario.primal), scenario.primal), jacobian)


@pytest.mark.parametrize("scenario", SCALAR, ids=lambda s: s.name)
def test_matrix_of_a_hessian_and_back(scenario: Scenario) -> None:
    hessian = ad.hessian(scenario.func)(scenario.primal)
    vector, unravel = ravel(scenario.primal)
    matrix = to_matrix(hessian, scenario.primal)
    step = 1e-5

    def slope(v: Tensor) -> Tensor:
        return ravel(scenario.jacobian(unravel(v)))[0]

    columns = [
        (slope(vector + step * e) - slope(vector - step * e)) / (2 * step)
        for e in torch.eye(len(vector), dtype=vector.dtype)
    ]
    torch.testing.assert_close(matrix, torch.stack(columns, 1), rtol=1e-6, atol=1e-6)
    assert_close(from_matrix(matrix, scenario.primal, scenario.primal), hessian)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_matrices_of_a_batch(scenario: Scenario) -> None:
    def matrix(scale: Tensor) -> Tensor:
        vector, unravel = ravel(scenario.primal)
        primal = unravel(vector * scale)
        return to_matrix(ad.jacrev(scenario.func)(primal), primal)

    scales = torch.tensor([1.0, 0.5], dtype=torch.float64)
    result = ad.vmap(matrix)(scales)
    assert_close(result, torch.stack([matrix(scale) for scale in scales]))


@pytest.mark.parametrize("transform", [ad.jacrev, ad.jacfwd])
def test_matrix_with_passive_leaves_and_holes(transform: Any) -> None:
    def func(p: dict[str, Any]) -> dict[str, Any]:
        return {"y": p["w"] @ X.float() * p["n"], "hole": None, "b": p["b"] ** 2}

    jacobian = transform(func)(MIXED)
    matrix = to_matrix(jacobian, MIXED)
    expected = torch.zeros(3, 7)
    expected[0, :3] = expected[1, 3:6] = 3 * X.float()
    expected[2, 6] = 14
    assert_close(matrix, expected)
    assert_close(from_matrix(matrix, func(MIXED), MIXED), jacobian)


def test_matrix_of_a_tuple_of_argnums() -> None:
    y = torch.tensor([2.0, 3.0], dtype=torch.float64)
    jacobian = ad.jacrev(lambda x, y: torch.outer(y, x), argnums=(0, 1))(X, y)
    expected = torch.cat([torch.kron(y[:, None], torch.eye(3)), torch.kron(torch.eye(2), X[:, None])], 1)
    assert_close(to_matrix(jacobian, (X, y)), expected)


def test_output_tree_that_looks_like_the_input_tree() -> None:
    """Rows are told from columns by depth, not by structure alone."""
    primal = {"a": X, "b": X[0]}
    jacobian = ad.jacrev(lambda p: {"a": p["a"] * 2, "b": p["b"] * p["a"].sum()})(primal)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[:3, :3] = 2 * torch.eye(3)
    expected[3, :3] = X[0]
    expected[3, 3] = X.sum()
    assert_close(to_matrix(jacobian, primal), expected)


def test_matrix_is_differentiable() -> None:
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    matrix = to_matrix(ad.hessian(lambda p: w * p["x"].prod())({"x": X}), {"x": X})
    (by_w,) = torch.autograd.grad(matrix.sum(), w)
    assert_close(by_w, 2 * (X[0] + X[1] + X[2]))


def test_registering_twice_is_a_value_error() -> None:
    @register_dataclass
    @dataclasses.dataclass
    class Once:
        x: Tensor

    with pytest.raises(ValueError, match="registered"):
        register_dataclass(Once)
    with pytest.raises(ValueError, match="registered"):
        register(Once, lambda o: ((o.x,), None), lambda _, c: Once(*c))


class Plain:
    pass


@dataclasses.dataclass
class Decorated:
    x: Tensor


class Undecorated(Decorated):
    """Its `y` is no field of the dataclass, and a gradient would lose it."""

    y: Tensor


@pytest.mark.parametrize("cls", [Plain, Undecorated])
def test_register_dataclass_refuses_other_classes(cls: type) -> None:
    words = r"register_dataclass: expected a dataclass or an attrs class, got .*{}.*register\("
    with pytest.raises(TypeError, match=words.format(cls.__name__)):
        register_dataclass(cls)


def test_registered_dataclass_with_fields_that_init_does_not_take() -> None:
    @register_dataclass
    @dataclasses.dataclass
    class Derived:
        x: Tensor
        double: Tensor = dataclasses.field(init=False)

        def __post_init__(self) -> None:
            self.double = self.x * 2

    result = ad.grad(lambda d: (d.x * d.double).sum())(Derived(X))
    assert_close((result.x, result.double), (2 * X, X))
