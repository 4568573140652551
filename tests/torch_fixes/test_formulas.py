"""The formulas are the operations that they stand for: values, statistics, options, and first derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

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
