"""Norms and logcumsumexp to third order in nests of transforms, compared with nested gradients of the formula written out."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import autodiff as ad
from scenarios import assert_close
from table.row import has_torch

Function: TypeAlias = Callable[..., Tensor]

_generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=_generator)


X, T, MIX = normal(2, 4, 3), normal(2, 4, 3), normal(2, 4, 3)


def standardised(x: Tensor, dims: list[int]) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred / ((centred * centred).mean(dims, keepdim=True) + 1e-5).sqrt()


NORMS: dict[str, tuple[Function, Function]] = {
    "layer_norm": (lambda x: functional.layer_norm(x, (3,)), lambda x: standardised(x, [2])),
    "batch_norm": (
        lambda x: functional.batch_norm(x, None, None, training=True),
        lambda x: standardised(x, [0, 2]),
    ),
    "instance_norm": (functional.instance_norm, lambda x: standardised(x, [2])),
    "group_norm": (
        lambda x: functional.group_norm(x, 2),
        lambda x: standardised(x.view(2, 2, 6), [2]).view(2, 4, 3),
    ),
    "rms_norm": (
        lambda x: functional.rms_norm(x, (3,), eps=0.1),
        lambda x: x / ((x * x).mean(2, keepdim=True) + 0.1).sqrt(),
    ),
}
NORMS["logcumsumexp"] = (
    lambda x: (x.flatten()[:6] * 9).logcumsumexp(0),
    lambda x: torch.stack([(x.flatten()[: i + 1] * 9).logsumexp(0) for i in range(6)]),
)
# The derivative along T, each by another transform.
ALONG: dict[str, Callable[[Function], Function]] = {
    "grad": lambda f: lambda x: (ad.grad(f)(x) * T).sum(),
    "jacobian": lambda f: lambda x: (ad.jacobian(f)(x) * T).sum(),
    "linearize": lambda f: lambda x: ad.linearize(f, x)[1](T),
    "jvp": lambda f: lambda x: ad.jvp(f, (x,), (T,))[1],
    "functional.jvp": lambda f: lambda x: ad.functional.jvp(f, x, T, create_graph=True)[1],
}


def mixed(norm: Function) -> Function:
    return lambda x: (norm(x).flatten() * MIX.flatten()[: norm(x).numel()]).sum() + (norm(x) ** 3).sum()


def derivative_by_formula(func: Function, order: int) -> Tensor:
    x = X.clone().requires_grad_()
    value = func(x)
    for _ in range(order):
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        value = (slope * T).sum()
    return value.detach()


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", NORMS)
def test_nests_of_transforms(name: str, order: int) -> None:
    norm, formula = NORMS[name]
    expected = derivative_by_formula(mixed(formula), order)
    wrong = []
    for nest in itertools.product(ALONG, repeat=order):
        func = mixed(norm)
        for transform in nest:
            func = ALONG[transform](func)
        if not torch.allclose(func(X), expected, rtol=1e-6):
            wrong.append(nest)
    assert wrong == []


@pytest.mark.parametrize("name", ["layer_norm", "batch_norm"])
def test_jacobians_of_jacobians_with_weights(name: str) -> None:
    """The blocks by input, weight and bias; and the same for each sample of a batch."""
    size = 3 if name == "layer_norm" else 4
    weight, bias = normal(size), normal(size)

    def func(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if name == "layer_norm":
            return mixed(lambda x: functional.layer_norm(x, (3,), weight, bias))(x)
        return mixed(lambda x: functional.batch_norm(x, None, None, weight, bias, training=True))(x)

    def by_formula(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if name == "layer_norm":
            return mixed(lambda x: standardised(x, [2]) * weight + bias)(x)
        return mixed(lambda x: standardised(x, [0, 2]) * weight[:, None] + bias[:, None])(x)

    primals, every = (X, weight, bias), (0, 1, 2)

    def third(func: Any, *primals: Tensor) -> Any:
        slope = lambda *primals: ad.jacobian(func, every)(*primals)[1] @ torch.arange(1.0, size + 1).double()
        return ad.jacobian(ad.jacobian(slope, every), every)(*primals)

    expected = third(by_formula, *primals)
    assert_close(third(func, *primals), expected)
    if name == "batch_norm" and has_torch("2.15"):
        return  # whose second derivative accesses the data of a batched weight
    batch = [torch.stack([one, one + 1]) for one in primals]
    of_samples = ad.vmap(lambda *primals: third(func, *primals))(*batch)
    assert_close([[one[0] for one in row] for row in of_samples], [list(row) for row in expected])


def test_a_gradient_by_torch_inside() -> None:
    norm, formula = NORMS["layer_norm"]
    slope = lambda x: (torch.func.grad(mixed(norm))(x) * T).sum()
    product = ad.hvp(slope, (X,), (T,))[1]
    assert_close((product * T).sum(), derivative_by_formula(mixed(formula), 3))


def test_parameters_captured_and_half_precision() -> None:
    weight = normal(3).requires_grad_()
    func = lambda x: (functional.layer_norm(x, (3,), weight) ** 3).sum()
    by_formula = lambda x: ((standardised(x, [2]) * weight) ** 3).sum()
    slopes = [
        torch.autograd.grad(ad.hvp(one, (X,), (T,))[1].square().sum(), weight)[0]
        for one in (func, by_formula)
    ]
    assert_close(*slopes)
    third = [derivative_of(torch.bfloat16), derivative_of(torch.float64).bfloat16()]
    torch.testing.assert_close(*third, rtol=0.1, atol=0.5)


def derivative_of(dtype: torch.dtype) -> Tensor:
    func = lambda x: (functional.layer_norm(x, (3,)) ** 2 * MIX.to(dtype)).sum()
    for _ in range(2):
        func = lambda x, func=func: (ad.grad(func)(x) * T.to(dtype)).sum()
    return ad.grad(func)(X.to(dtype))


def test_frozen_statistics_are_constants() -> None:
    mean, variance = normal(4), normal(4).exp()
    func = lambda x: (functional.batch_norm(x, mean, variance) ** 3).sum()
    for _ in range(2):
        func = lambda x, func=func: (ad.jacobian(func)(x) * T).sum()
    scale = (variance[:, None] + 1e-5).rsqrt()
    assert_close(ad.jacobian(func)(X), 6 * scale**3 * T * T)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("far", [0.0, 500.0])
def test_linearize_of_logcumsumexp(dim: int, far: float) -> None:
    """Softmax weights, also where exp(x) overflows, of the tokens up to each; minus infinity takes no part."""
    x = normal(5, 5) * (1 + far)
    x.select(dim, 0)[2:4] = -torch.inf
    t = normal(5, 5)
    expected = []
    for i in range(5):
        part, moved = x.narrow(dim, 0, i + 1), t.narrow(dim, 0, i + 1)
        expected.append((part.softmax(dim).nan_to_num(0) * moved).sum(dim))
    pushed = ad.linearize(lambda x: x.logcumsumexp(dim), x)[1](t)
    assert_close(pushed, torch.stack(expected, dim))
