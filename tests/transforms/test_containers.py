"""Containers that hide a batch dimension themselves: leaves of vmap, trees of every other transform."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import autodiff as ad
from autodiff.errors import BatchError
from bag import Bag, UnregisteredBag

A = torch.arange(24.0, dtype=torch.float64).reshape(4, 3, 2) / 10
B = torch.arange(12.0, dtype=torch.float64).reshape(4, 3).sin()


def bag(batch_dims: int = 1, cls: type[Bag] = Bag) -> Bag:
    return cls({"a": A, "b": B}, batch_dims)


def loss(bag: Bag) -> Tensor:
    return (bag.tensors["a"] ** 3).sum() + (bag.tensors["b"] ** 2).sum()


@pytest.mark.parametrize("cls", [Bag, UnregisteredBag])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 3}, {"chunk_size": "auto"}, {"fallback": "loop"}])
def test_container_is_a_batch(cls: type[Bag], options: dict[str, Any]) -> None:
    def func(sample: Bag) -> Bag:
        assert sample.shape == ()
        if "fallback" in options:
            float(sample.tensors["b"].sum())
        return sample.apply(torch.exp)

    result = ad.vmap(func, **options)(bag(cls=cls))
    assert type(result) is Bag
    assert result.shape == (4,)
    assert torch.equal(result.tensors["a"], A.exp())
    assert torch.equal(result.tensors["b"], B.exp())


@pytest.mark.parametrize("cls", [Bag, UnregisteredBag])
def test_gradients_for_every_sample_of_a_container(cls: type[Bag]) -> None:
    gradient = ad.vmap(ad.grad(loss))(bag(cls=cls))
    assert gradient.shape == (4,)
    torch.testing.assert_close(gradient.tensors["a"], 3 * A**2)
    torch.testing.assert_close(gradient.tensors["b"], 2 * B)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("dim", [0, 1, -1, -2])
@pytest.mark.parametrize("out_dim", [0, 1, -1])
def test_dims_count_the_containers_own_dimensions(dim: int, out_dim: int, chunk_size: int | None) -> None:
    result = ad.vmap(lambda sample: sample.apply(torch.exp), dim, out_dim, chunk_size=chunk_size)(bag(2))
    expected = A if dim % 2 == out_dim % 2 else A.transpose(0, 1)
    assert result.shape == expected.shape[:2]
    torch.testing.assert_close(result.tensors["a"], expected.exp())


def test_container_beside_tensors_in_trees() -> None:
    def func(tree: dict[str, Any], x: Tensor) -> tuple[Tensor, Bag]:
        return loss(tree["bag"]) + x, tree["bag"]

    x = torch.arange(4.0, dtype=torch.float64)
    values, same = ad.vmap(func)({"bag": bag(), "more": x}, x)
    torch.testing.assert_close(values, (A**3).sum((1, 2)) + (B**2).sum(1) + x)
    assert same.shape == (4,)


def test_what_is_written_into_a_shared_container_stays_inside() -> None:
    def func(shared: Bag, x: Tensor) -> Bag:
        shared.tensors["a"] = x
        return shared

    shared = bag(0)
    result = ad.vmap(func, (None, 0))(shared, torch.arange(5.0))
    assert torch.equal(result.tensors["a"], torch.arange(5.0))
    assert result.shape == (5,)
    assert shared.tensors["a"] is A


def test_container_made_without_naming_its_batch() -> None:
    result = ad.vmap(lambda sample: sample.apply(torch.exp))(bag(0))
    assert result.shape == (4,)


def test_errors_name_the_container() -> None:
    with pytest.raises(BatchError, match=r"that input is a Bag of dimensionality 1 .* of shape \(4,\)"):
        ad.vmap(loss, -2)(bag())
    with pytest.raises(BatchError, match="can not return a BatchedTensor when out_dim is None"):
        ad.vmap(lambda sample: sample, out_dims=None)(bag())
    seen: list[Bag] = []

    def func(sample: Bag) -> Bag:
        seen.append(sample)
        return sample if len(seen) == 1 else Bag({"a": torch.ones(2, 2)}, 1)

    with pytest.raises(BatchError, match=r"shape \(2,\) for samples 2 to 3, but a tensor of shape \(\)"):
        ad.vmap(func, chunk_size=2)(bag())


@pytest.mark.parametrize("cls", [Bag, UnregisteredBag])
def test_container_is_a_tree_of_every_other_transform(cls: type[Bag]) -> None:
    point = bag(cls=cls)
    gradient = ad.grad(loss)(point)
    assert type(gradient) is Bag
    torch.testing.assert_close(gradient.tensors["a"], 3 * A**2)
    nested = ad.grad(lambda tree: loss(tree["bag"]) * tree["x"])({"bag": point, "x": torch.tensor(2.0)})
    torch.testing.assert_close(nested["bag"].tensors["b"], 4 * B)
    hessian = ad.hessian(loss)(cls({"a": A[0], "b": B[0]}, 0))
    block = hessian.tensors["a"].tensors["a"]
    torch.testing.assert_close(block.reshape(6, 6), torch.diag(6 * A[0].flatten()))
    value, tangent = ad.jvp(loss, (point,), (bag(),))
    torch.testing.assert_close(value, loss(point))
    torch.testing.assert_close(tangent, (3 * A**3).sum() + 2 * (B**2).sum())


@pytest.mark.parametrize("memory", [None, 3000])
def test_per_sample_of_a_container(memory: int | None) -> None:
    gradient = ad.per_sample(ad.grad(loss), memory=memory)(bag())
    torch.testing.assert_close(gradient.tensors["a"], 3 * A**2)
    hessian = ad.per_sample(ad.hessian(loss), memory=memory)(bag())
    assert hessian.tensors["a"].tensors["b"].shape == (4, 3, 2, 3)
    empty = ad.per_sample(lambda sample: sample.apply(torch.exp))(bag()[(slice(0, 0),)])
    assert empty.tensors["a"].shape == (0, 3, 2)
