"""functional.* inside a transform: a result that is differentiated there needs create_graph=True."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import autodiff as ad
from autodiff import functional
from autodiff.errors import OptionCombinationError, OptionError

X = torch.tensor([0.5, 1.5], dtype=torch.float64)


def cubes(x: Tensor) -> Tensor:
    return (x**3).sum()


# A number made of each one's result, and the gradient of that number at X.
NUMBERS = {
    "jacobian": (lambda x, f, **kw: functional.jacobian(f, x, **kw).sum(), 6 * X),
    "jacobian forward": (
        lambda x, f, **kw: functional.jacobian(f, x, strategy="forward-mode", vectorize=True, **kw).sum(),
        6 * X,
    ),
    "hessian": (lambda x, f, **kw: functional.hessian(f, x, **kw).sum(), torch.full_like(X, 6)),
    "vjp": (lambda x, f, **kw: functional.vjp(f, x, **kw)[1].sum(), 6 * X),
    "jvp": (lambda x, f, **kw: functional.jvp(f, x, torch.ones_like(x), **kw)[1], 6 * X),
    "vhp": (
        lambda x, f, **kw: functional.vhp(f, x, torch.ones_like(x), **kw)[1].sum(),
        torch.full_like(X, 6),
    ),
    "hvp": (
        lambda x, f, **kw: functional.hvp(f, x, torch.ones_like(x), **kw)[1].sum(),
        torch.full_like(X, 6),
    ),
}
OUTER = {
    "grad": lambda f: ad.grad(f)(X),
    "jacrev": lambda f: ad.jacrev(f)(X),
    "jacfwd": lambda f: ad.jacfwd(f)(X),
    "jvp": lambda f: ad.jvp(f, (X,), (torch.ones_like(X),))[1],
    "linearize": lambda f: ad.linearize(f, X)[1](torch.ones_like(X)),
    "vmap(grad)": lambda f: ad.vmap(ad.grad(f))(X.expand(1, 2))[0],
    "torch.func.grad": lambda f: torch.func.grad(f)(X),
}


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("name", NUMBERS)
def test_without_a_graph_the_result_may_not_be_differentiated(name, outer):
    number, _ = NUMBERS[name]
    with pytest.raises(OptionError, match=rf"functional\.{name.split()[0]}: .* create_graph=True"):
        OUTER[outer](lambda x: number(x, cubes))


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("name", NUMBERS)
def test_with_a_graph_it_may(name, outer):
    number, expected = NUMBERS[name]
    if outer in {"jvp", "linearize"}:
        expected = expected.sum()
    torch.testing.assert_close(OUTER[outer](lambda x: number(x, cubes, create_graph=True)), expected)


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_captured_tensor_that_is_differentiated_counts_too(name, outer):
    number, _ = NUMBERS[name]
    with pytest.raises(OptionError, match="create_graph=True"):
        OUTER[outer](lambda w: number(X, lambda x: (w.sum() * x**3).sum()))


@pytest.mark.parametrize("name", NUMBERS)
def test_a_constant_is_a_constant(name):
    number, _ = NUMBERS[name]
    constant = number(X, cubes)
    for inputs in (X, torch.nn.Parameter(X)):
        scaled = ad.grad(lambda x, inputs=inputs: x.sum() * number(inputs.detach(), cubes))(X)
        torch.testing.assert_close(scaled, constant.expand(2))
    # Nothing is differentiated here, though a parameter requires grad.
    batched = ad.vmap(lambda x: number(x, cubes))(torch.nn.Parameter(X).expand(3, 2))
    torch.testing.assert_close(batched, constant.expand(3))

    def product(x):
        with torch.no_grad():
            factor = number(x, cubes)
        return x.sum() * factor

    torch.testing.assert_close(ad.grad(product)(X), constant.expand(2))


def test_strict_forward_mode_with_a_graph_is_torchs_error():
    with pytest.raises(NotImplementedError, match="not supported together"):
        functional.jacobian(torch.sin, X, create_graph=True, strict=True, strategy="forward-mode")
    assert issubclass(OptionCombinationError, OptionError)
