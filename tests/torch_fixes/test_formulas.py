"""The formulas are the operations that they stand for: values, statistics, options, and first derivatives."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional

import autodiff as ad
from autodiff.torch_fixes import formulas
from scenarios import assert_close

X = torch.randn(4, 3, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
WEIGHT, BIAS = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.1, 0.2, -0.3]).double()
TARGET = torch.sign(X)


def compare(operation: Any, formula: Any, make: Any) -> None:
    """Both on arguments of their own, which they may write to."""
    results = []
    for func in (operation, formula):
        args, kwargs = make()
        args = tuple(a.clone().requires_grad_() if a is X else a for a in args)
        kwargs = {
            key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in kwargs.items()
        }
        output = func(*args, **kwargs)
        (slope,) = torch.autograd.grad((output * output.detach().cos()).sum(), args[0])
        results.append((output.detach(), slope, kwargs))
    assert_close(*results)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(2,), (5, 2)])
def test_layer_norm(affine: bool, shape: tuple[int, ...]) -> None:
    more = {"weight": torch.randn(shape).double(), "bias": torch.randn(shape).double()} if affine else {}
    compare(functional.layer_norm, formulas.layer_norm, lambda: ((X, shape), more | {"eps": 1e-3}))
    compare(torch.layer_norm, formulas.layer_norm, lambda: ((X, shape), more))


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
@pytest.mark.parametrize("by_batch", [True, False])
@pytest.mark.parametrize("affine", [False, True])
def test_batch_and_instance_norm_with_running_statistics(name: str, by_batch: bool, affine: bool) -> None:
    option = {"batch_norm": "training", "instance_norm": "use_input_stats"}[name]
    means, variances = torch.tensor([0.3, -1.0, 2.0]).double(), torch.tensor([1.0, 0.5, 2.0]).double()
    options = {
        "running_mean": means,
        "running_var": variances,
        option: by_batch,
        "momentum": 0.3,
        "eps": 1e-3,
    }
    options |= {"weight": WEIGHT, "bias": BIAS} if affine else {}
    compare(getattr(functional, name), getattr(formulas, name), lambda: ((X,), options))


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_batch_and_instance_norm_without_statistics(name: str) -> None:
    options = {"running_mean": None, "running_var": None} | (
        {"training": True} if name == "batch_norm" else {}
    )
    compare(getattr(functional, name), getattr(formulas, name), lambda: ((X,), options))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5, float("inf")])
def test_distances(p: float) -> None:
    other = torch.randn(7, 2, dtype=torch.float64)
    compare(torch.cdist, formulas.cdist, lambda: ((X, other, p), {}))
    points = X[0, 0].clone().requires_grad_()
    pairs = [functional.pdist(points, p), formulas.pdist(points, p)]
    assert_close(*[(one.detach(), torch.autograd.grad(one.sin().sum(), points)[0]) for one in pairs])


def test_hardsigmoid() -> None:
    compare(functional.hardsigmoid, formulas.hardsigmoid, lambda: ((X,), {}))
    one, other = 4 * X, 4 * X
    assert formulas.hardsigmoid(one, inplace=True) is one
    assert_close(one, functional.hardsigmoid(other, inplace=True))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"size_average": False},
        {"reduce": False},
        {"reduce": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
def test_soft_margin_loss(options: dict[str, Any]) -> None:
    compare(functional.soft_margin_loss, formulas.soft_margin_loss, lambda: ((X, TARGET), options))


@pytest.mark.parametrize("mask", [None, "bool", "bias", "causal", "nothing"])
@pytest.mark.parametrize("grouped", [False, True])
def test_attention_with_dropout(mask: str | None, grouped: bool) -> None:
    """Dropout of almost nothing: the rest of the formula is torch's."""
    heads = 4 if grouped else 2
    query = torch.randn(heads, 3, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, 5, 8, dtype=torch.float64).unbind(0)
    options: dict[str, Any] = {"enable_gqa": grouped, "scale": 0.3}
    if mask == "causal":
        options["is_causal"] = True
    elif mask is not None:
        allowed = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
        if mask == "nothing":
            allowed[1] = False
        options["attn_mask"] = torch.randn(3, 5).double() if mask == "bias" else allowed
    expected = functional.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(formulas.attention(query, key, value, dropout_p=1e-12, **options), expected)
    torch.testing.assert_close(formulas.attention(query, key, value, **options), expected)


def by_products(x: torch.Tensor, t: torch.Tensor, order: int) -> torch.Tensor:
    """The derivative of the cumulative products along t, by the polynomial in s of the products of x + s t."""
    polynomials, product = [], torch.ones(1, dtype=x.dtype)
    for one, moved in zip(x, t, strict=True):
        product = functional.pad(product * one, (0, 1)) + functional.pad(product * moved, (1, 0))
        polynomials.append(product)
    factorial = torch.arange(1, order + 1).prod()
    zero = torch.zeros((), dtype=x.dtype)
    return torch.stack([p[order] * factorial if len(p) > order else zero for p in polynomials])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("zeros", [0, 1, 2, 3])
@pytest.mark.parametrize("modes", list(itertools.product(["jvp", "vjp"], repeat=3)), ids="-".join)
def test_cumprod_to_third_order(modes: tuple[str, ...], zeros: int) -> None:
    x, t = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind(0)
    x[[4, 1, 5][:zeros]] = 0
    seed = torch.linspace(1, 2, 7, dtype=x.dtype)
    func = lambda x: x.cumprod(0) @ seed
    along = {
        "jvp": lambda f: lambda x: ad.jvp(f, (x,), (t,))[1],
        "vjp": lambda f: lambda x: ad.grad(f)(x) @ t,
    }
    for order, mode in enumerate(modes, 1):
        func = along[mode](func)
        torch.testing.assert_close(func(x), by_products(x, t, order) @ seed, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ad.vmap(func)(x[None])[0], func(x), rtol=1e-9, atol=1e-9)


def test_cumprod_in_forward_mode_takes_time_in_proportion() -> None:
    """Operations and numbers: 12 windows for 4000, not a matrix of 4000 by 4000."""
    x, t = torch.rand(2, 3, 4000, dtype=torch.float64).unbind(0)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Sizes():
        ad.vmap(lambda x, t: ad.jvp(lambda x: x.cumprod(0), (x,), (t,)))(x, t)
    assert largest <= x.numel()
