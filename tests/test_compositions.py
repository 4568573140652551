"""Every pair of transforms, ours inside ours and mixed with torch.func's, against references.

A library is a dict of combinators, each taking a function from vectors to vectors to another. The
references are torch.func throughout, and nested differences that differentiate nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import autodiff as ad
from scenarios import difference

Vector = Callable[[Tensor], Tensor]

X = torch.tensor([0.5, -0.75], dtype=torch.float64)
MATRIX = torch.tensor([[0.3, -0.4], [0.1, 0.7], [-0.2, 0.5]], dtype=torch.float64)


def base(x: Tensor) -> Tensor:
    """From R^2 to R^3, with no symmetry and every derivative different from zero."""
    return torch.sin(MATRIX @ x) * torch.exp(0.3 * x[0]) + MATRIX @ (x * x)


def weights(count: int) -> Tensor:
    """Numbers without pattern, made without a random generator."""
    return torch.cos(1.7 * torch.arange(1, count + 1, dtype=torch.float64))


def weighted(func: Vector) -> Vector:
    """The scalar function that `grad` and `hessian` need."""

    def scalar(x: Tensor) -> Tensor:
        out = func(x)
        return (out * weights(out.numel())).sum()

    return scalar


def combinators(library: Any) -> dict[str, Callable[[Vector], Vector]]:
    """Every transform of a library as a map from vector functions to vector functions."""

    def vjp(func: Vector) -> Vector:
        def pulled(x: Tensor) -> Tensor:
            out, pullback = library.vjp(func, x)
            return pullback(weights(out.numel()))[0]

        return pulled

    def jvp(func: Vector) -> Vector:
        return lambda x: library.jvp(func, (x,), (weights(x.numel()),))[1]

    def linearize(func: Vector) -> Vector:
        if library is torch.func:
            return jvp(func)  # torch.func.linearize is wrong under grad
        return lambda x: library.linearize(func, x)[1](weights(x.numel()))

    return {
        "grad": lambda f: library.grad(weighted(f)),
        "vjp": vjp,
        "jvp": jvp,
        "vmap": lambda f: lambda x: library.vmap(f)(torch.stack([x, 0.5 * x, x.sin()])).flatten(),
        "jacrev": lambda f: lambda x: library.jacrev(f)(x).flatten(),
        "jacfwd": lambda f: lambda x: library.jacfwd(f)(x).flatten(),
        "hessian": lambda f: lambda x: library.hessian(weighted(f))(x).flatten(),
        "linearize": linearize,
    }


def by_differences() -> dict[str, Callable[[Vector], Vector]]:
    """The same combinators without any differentiation."""

    def jacobian(func: Vector) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.stack(
            [difference(func, x, e, 2e-2) for e in torch.eye(x.numel(), dtype=x.dtype)], -1
        )

    def pushed(func: Vector) -> Vector:
        return lambda x: difference(func, x, weights(x.numel()), 2e-2)

    def pulled(func: Vector) -> Vector:
        return jacobian(weighted(func))

    return {
        "grad": pulled,
        "vjp": pulled,
        "jvp": pushed,
        "vmap": lambda f: lambda x: torch.cat([f(x), f(0.5 * x), f(x.sin())]),
        "jacrev": lambda f: lambda x: jacobian(f)(x).flatten(),
        "jacfwd": lambda f: lambda x: jacobian(f)(x).flatten(),
        "hessian": lambda f: lambda x: jacobian(jacobian(weighted(f)))(x).flatten(),
        "linearize": pushed,
    }


OURS, TORCHS, DIFFERENCES = combinators(ad), combinators(torch.func), by_differences()
NAMES = list(OURS)
pairs = pytest.mark.parametrize(("outer", "inner"), list(itertools.product(NAMES, NAMES)))


@pairs
@pytest.mark.parametrize(
    ("over", "under"),
    [(OURS, OURS), (OURS, TORCHS), (TORCHS, OURS)],
    ids=["ours", "over torch.func", "under torch.func"],
)
def test_pair_equals_torch_func(outer: str, inner: str, over: Any, under: Any) -> None:
    result = over[outer](under[inner](base))(X)
    expected = TORCHS[outer](TORCHS[inner](base))(X)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-10)
    assert not result.requires_grad


@pairs
def test_pair_equals_nested_differences(outer: str, inner: str) -> None:
    result = OURS[outer](OURS[inner](base))(X)
    expected = DIFFERENCES[outer](DIFFERENCES[inner](base))(X)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


# Three deep, our transforms around and between torch.func's: what the stack's bottom and top see.
SANDWICH = ["grad", "jvp", "vmap", "jacrev", "jacfwd", "linearize"]


@pytest.mark.parametrize("names", list(itertools.product(SANDWICH, repeat=3)), ids="-".join)
@pytest.mark.parametrize(
    "libraries",
    [(OURS, OURS, OURS), (OURS, TORCHS, OURS), (TORCHS, OURS, TORCHS)],
    ids=["ours", "around", "between"],
)
def test_triple_equals_torch_func(names: tuple[str, ...], libraries: tuple[Any, ...]) -> None:
    def composed(libraries: tuple[Any, ...]) -> Vector:
        func: Vector = base
        for library, name in zip(libraries, names, strict=True):
            func = library[name](func)
        return func

    torch.testing.assert_close(composed(libraries)(X), composed((TORCHS,) * 3)(X), rtol=1e-8, atol=1e-9)


@pairs
def test_pair_inside_plain_autograd(outer: str, inner: str) -> None:
    """The result of a pair is tracked by a backward() outside."""
    x = X.clone().requires_grad_()
    result = OURS[outer](OURS[inner](base))(x)
    seed = weights(result.numel())
    (gradient,) = torch.autograd.grad((result * seed).sum(), x)
    composed = TORCHS[outer](TORCHS[inner](base))
    expected = torch.func.jacfwd(composed)(X)
    torch.testing.assert_close(gradient, seed @ expected, rtol=1e-8, atol=1e-9)


@pairs
def test_pair_of_a_captured_parameter(outer: str, inner: str) -> None:
    """Both transforms hold still while the gradient of what they close over flows out."""
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    result = OURS[outer](OURS[inner](lambda x: base(x * scale)))(X)
    seed = weights(result.numel())
    (gradient,) = torch.autograd.grad((result * seed).sum(), scale)
    expected = torch.func.jvp(
        lambda s: (TORCHS[outer](TORCHS[inner](lambda x: base(x * s)))(X) * seed).sum(),
        (scale.detach(),),
        (torch.ones((), dtype=torch.float64),),
    )[1]
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-9)
