"""Gradients against closed forms, over every scenario, disguise and dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import autodiff as ad
from disguises import TRANSFORMERS, Case, call, cases
from scenarios import SCALAR, assert_close, difference

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
Y = torch.tensor([3.0, 0.25], dtype=torch.float64)


@pytest.mark.parametrize("case", cases(SCALAR, TRANSFORMERS))
def test_gradient_equals_the_closed_form(case: Case) -> None:
    assert_close(call(case, ad.grad), case.jacobian())


def _value_in(name: str, case: Case) -> Any:
    """The transform ``name`` as one that gives ``{"value": ..., "gradient": ...}``."""

    def transform(func: Any, argnums: Any, has_aux: bool) -> Any:
        derived = getattr(ad, name)(func, argnums=argnums, has_aux=has_aux)

        def named(*args: Any, **kwargs: Any) -> Any:
            value, gradient = derived(*args, **kwargs)
            if name == "grad_and_value":
                value, gradient = gradient, value
            aux = None
            if has_aux:
                value, aux = value
            result = {"value": value, "gradient": gradient}
            return (result, aux) if has_aux else result

        return named

    return call(case, transform)


@pytest.mark.parametrize("name", ["value_and_grad", "grad_and_value"])
@pytest.mark.parametrize("case", cases(SCALAR, TRANSFORMERS))
def test_value_comes_in_the_documented_place(case: Case, name: str) -> None:
    result = _value_in(name, case)
    assert_close(result["value"], case.expect(case.scenario.func))
    assert_close(result["gradient"], case.jacobian())


@pytest.mark.parametrize("scenario", SCALAR, ids=lambda s: s.name)
def test_directional_difference_agrees(scenario: Any) -> None:
    vector, unravel = ad.pytree.ravel(scenario.primal)
    direction = torch.randn_like(vector)
    gradient, _ = ad.pytree.ravel(ad.grad(scenario.func)(scenario.primal))
    expected = difference(lambda v: scenario.func(unravel(v)), vector, direction, 1e-3)
    torch.testing.assert_close(gradient @ direction, expected, rtol=1e-8, atol=1e-8)


def two_arguments(x: Tensor, y: Tensor) -> Tensor:
    """x.x * y_0 + y_1^2 * x_0: gradients (2 x y_0 + y_1^2 e_0, (x.x, 2 y_1 x_0))."""
    return x @ x * y[0] + y[1] ** 2 * x[0]


BY_X = torch.tensor([2 * 0.5 * 3 + 0.0625, -2.0 * 3, 4.0 * 3], dtype=torch.float64)
BY_Y = torch.tensor([0.25 + 1 + 4, 2 * 0.25 * 0.5], dtype=torch.float64)


POSITIONAL = [(-1, BY_Y), (-2, BY_X), (("y", -2), (BY_Y, BY_X))]
ANYWHERE = [
    (0, BY_X),
    (1, BY_Y),
    ((0, 1), (BY_X, BY_Y)),
    ((1, 0), (BY_Y, BY_X)),
    ((1,), (BY_Y,)),
    ("x", BY_X),
    ("y", BY_Y),
    (("y", "x"), (BY_Y, BY_X)),
    ((0, "y"), (BY_X, BY_Y)),
]


@pytest.mark.parametrize(
    ("argnums", "expected", "keywords"),
    [
        *[(argnums, expected, ()) for argnums, expected in POSITIONAL],
        *[(argnums, expected, kw) for argnums, expected in ANYWHERE for kw in [(), ("y",), ("x", "y")]],
    ],
    ids=str,
)
def test_argnums_by_number_and_name(argnums: Any, expected: Any, keywords: tuple[str, ...]) -> None:
    given = {"x": X, "y": Y}
    args = [given[name] for name in given if name not in keywords]
    kwargs = {name: given[name] for name in keywords}
    assert_close(ad.grad(two_arguments, argnums)(*args, **kwargs), expected)


def test_complex_leaf_gets_the_conjugate_wirtinger_gradient() -> None:
    z = torch.tensor([1 + 2j, -0.5j], dtype=torch.complex128)
    # |z|^2 has conjugate Wirtinger gradient 2 z in torch's convention, Re(c z) has conj(c).
    c = torch.tensor([2 - 1j, 3j], dtype=torch.complex128)
    gradient = ad.grad(lambda z: (z.abs() ** 2).sum() + (c * z).real.sum())(z)
    torch.testing.assert_close(gradient, 2 * z + c.conj())


def test_strict_accepts_zeros_that_depend() -> None:
    assert ad.grad(lambda x: (x * 0).sum(), strict=True)(X).tolist() == [0, 0, 0]


def test_default_gives_zeros_for_an_unused_leaf() -> None:
    gradient = ad.grad(lambda p: p["used"].sum())({"unused": torch.ones(2, 3), "used": X})
    assert_close(gradient, {"unused": torch.zeros(2, 3), "used": torch.ones_like(X)})


def test_sparse_argument_gives_the_gradient_of_its_dense_values() -> None:
    indices = torch.tensor([[0, 1, 1], [2, 0, 2]])
    sparse = torch.sparse_coo_tensor(indices, X, (2, 3), check_invariants=True).coalesce()
    right = torch.randn(3, 4, dtype=torch.float64)
    left = torch.randn(2, 4, dtype=torch.float64)

    def loss(matrix: Tensor) -> Tensor:
        return (left * torch.sparse.mm(matrix, right)).sum()

    gradient = ad.grad(loss)(sparse)
    expected = left @ right.T
    if gradient.layout is not torch.strided:
        assert gradient.layout is torch.sparse_coo
        expected = torch.zeros_like(expected).index_put(tuple(indices), expected[tuple(indices)])
        gradient = gradient.to_dense()
    torch.testing.assert_close(gradient, expected)


def test_second_derivative_by_nesting() -> None:
    third = ad.grad(ad.grad(ad.grad(lambda t: t**5)))
    torch.testing.assert_close(
        third(torch.tensor(2.0, dtype=torch.float64)), torch.tensor(240.0, dtype=torch.float64)
    )


def test_wrapper_keeps_the_name_and_documentation() -> None:
    def loss(x: Tensor) -> Tensor:
        """The loss."""
        return x.sum()

    assert (ad.grad(loss).__name__, ad.grad(loss).__doc__) == ("loss", "The loss.")


def test_module_can_be_differentiated_as_a_function() -> None:
    module = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    gradient = ad.grad(lambda x: module(x).squeeze())(X)
    torch.testing.assert_close(gradient.detach(), module.weight[0].detach())
    assert ad.jacrev(module)(X).shape == (1, 3)
