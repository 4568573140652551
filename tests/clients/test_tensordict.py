"""TensorDict by its public interface, compared with plain autograd: its source archive holds no tests.

Runs with torch's transforms and with autodiff's; see `__main__`.
"""

from __future__ import annotations

import warnings
from typing import Any

import functorch
import pytest
import torch
from tensordict import LazyStackedTensorDict, TensorDict, tensorclass
from tensordict.nn import EnsembleModule, TensorDictModule, TensorDictParams, TensorDictSequential
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, vmap


def data(count: int = 5) -> TensorDict:
    return TensorDict({"x": torch.randn(count, 3), "more": {"y": torch.randn(count, 2)}}, [count])


def loss(sample: Any) -> Tensor:
    return (sample["x"] ** 3).sum() + (sample["more", "y"] ** 2).sum()


@pytest.mark.parametrize("out_dim", [0, 1, 2])
@pytest.mark.parametrize("in_dim", [0, 1, -1])
@pytest.mark.parametrize("lock", [False, True])
def test_dims(in_dim: int, out_dim: int, lock: bool) -> None:
    td = TensorDict({"x": torch.randn(2, 3, 4, 5)}, [2, 3, 4])
    td = td.lock_() if lock else td
    result = vmap(lambda one: one.clone().apply(torch.exp), (in_dim,), (out_dim,))(td)
    assert torch.equal(result["x"], td["x"].movedim(in_dim % 3, out_dim).exp())
    assert result.batch_size == result["x"].shape[:3]


def test_names() -> None:
    a, b = TensorDict({"a": torch.ones(5, 4)}, [5]), TensorDict({"b": torch.ones(3, 5, 4)}, [3, 5])
    a.names, b.names = ["0"], ["A", "B"]

    def func(a: TensorDict, b: TensorDict) -> TensorDict:
        b["c"] = a["a"] + b["b"]
        return b

    assert vmap(func, (None, 0))(a, b).names == [None, "B"]


@pytest.mark.parametrize("out_dim", [0, 1])
@pytest.mark.parametrize("in_dim", [0, 1])
@pytest.mark.parametrize("stack_dim", [0, 1])
@pytest.mark.parametrize("lock", [False, True])
@pytest.mark.parametrize("key", ["a", ("a", "b")])
def test_writes_to_lazy_stacks(in_dim: int, out_dim: int, stack_dim: int, lock: bool, key: Any) -> None:
    first, second = TensorDict({key: [1.0]}, [1]), TensorDict({key: [2.0]}, [1])
    x = LazyStackedTensorDict.lazy_stack([first, first.clone()], stack_dim)
    y = LazyStackedTensorDict.lazy_stack([second, second.clone()], stack_dim)
    added = vmap(lambda x, y: x.set(key, y.get(key) + x.get(key)), (in_dim, in_dim), (out_dim,))
    if lock:
        x.lock_()
        with pytest.raises(RuntimeError, match="Cannot modify"):
            added(x, y)
        return
    result = added(x, y)
    assert isinstance(result, LazyStackedTensorDict)
    assert (result[key] == 3).all()
    assert result.shape[out_dim] == x.shape[in_dim]


def test_gradients_for_every_sample() -> None:
    td = data()
    result = vmap(grad(loss))(td)
    assert result.batch_size == (5,)
    assert torch.allclose(result["x"], 3 * td["x"] ** 2)


@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_jacobians_and_hessians(transform: Any) -> None:
    td = data()[0]
    assert torch.allclose(transform(lambda one: one["x"] ** 2)(td)["x"], torch.diag(2 * td["x"]))
    assert torch.allclose(hessian(loss)(td)["x", "x"], torch.diag(6 * td["x"]))


def test_tensorclass() -> None:
    @tensorclass
    class Pair:
        x: Tensor
        y: Tensor

    pair = Pair(x=torch.randn(4, 2), y=torch.randn(4), batch_size=[4])
    assert torch.equal(vmap(lambda one: one.x * one.y)(pair), pair.x * pair.y[:, None])
    assert vmap(lambda one: one)(pair).batch_size == (4,)


@pytest.mark.parametrize("batch_params", [False, True])
def test_functional_modules(batch_params: bool) -> None:
    module = TensorDictSequential(
        TensorDictModule(nn.Linear(3, 4), in_keys=["x"], out_keys=["y"]),
        TensorDictModule(nn.Linear(4, 5), in_keys=["y"], out_keys=["z"]),
    )
    expected = module(TensorDict({"x": torch.ones(10, 1, 3)}, [10]))["z"]
    with warnings.catch_warnings(action="ignore"):
        func, params, buffers = functorch.make_functional_with_buffers(module)
    td = TensorDict({"x": torch.ones(10, 1, 3)}, [10])
    if batch_params:
        params = tuple(param.detach().expand(10, *param.shape) for param in params)
    dim = 0 if batch_params else None
    assert torch.allclose(vmap(func, (dim, dim, 0))(params, buffers, td)["z"], expected)


def test_parameters_as_a_batch() -> None:
    module = nn.Linear(3, 4)
    params = TensorDict.from_module(module)
    stack = TensorDictParams(torch.stack([params.detach(), 2 * params.detach()], 0))

    def forward(params: Any, x: Tensor) -> Tensor:
        with params.to_module(module):
            result: Tensor = module(x)
        return result

    x = torch.randn(6, 3)
    result = vmap(forward, (0, None))(stack, x)
    assert torch.allclose(result[1], 2 * module(x))


def test_ensembles() -> None:
    module = TensorDictModule(nn.Linear(3, 4), in_keys=["x"], out_keys=["y"])
    ensemble = EnsembleModule(module, num_copies=3)
    result = ensemble(TensorDict({"x": torch.randn(6, 3)}, [6]))
    assert result["y"].shape == (3, 6, 4)
    assert len({one.sum().item() for one in result["y"]}) == 3
