"""Iterables of batches."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import autodiff as ad
from autodiff.errors import BatchError
from autodiff.samples import sources
from problems import W, X, outer, square


def test_a_loader_tells_how_many_samples_it_will_give() -> None:
    count = sources._count
    data = torch.utils.data.TensorDataset(X)
    assert count(torch.utils.data.DataLoader(data, batch_size=4)) == 10
    assert count(torch.utils.data.DataLoader(data, batch_size=4, drop_last=True)) == 8
    assert count(torch.utils.data.DataLoader(data, batch_size=4, sampler=[1, 2, 3])) == 3
    assert count(iter([X])) is None


def test_wrong_sources() -> None:
    curvature = ad.per_sample(ad.hessian(square), (None, 0))
    with pytest.raises(BatchError, match="is empty"):
        curvature(W, iter([]))
    with pytest.raises(BatchError, match=r"expected 1 shared arguments .* got 2"):
        curvature(W, W, iter([X]))
    with pytest.raises(BatchError, match="both iterables"):
        curvature(iter([W]), iter([X]))
    with pytest.raises(
        BatchError, match="a batch of the iterable is a tuple of 3, but 2 arguments are mapped"
    ):
        ad.per_sample(lambda w, x, y: w @ x * y, (None, 0, 0))(W, iter([(X, X, X)]))
    with pytest.raises(BatchError, match="every argument is mapped, but 1 more"):
        ad.per_sample(torch.dot)(W, iter([X]))
    with pytest.raises(BatchError, match="per_sample: Expected all tensors to have the same size"):
        ad.per_sample(torch.dot)(X, X[:3])


def test_iterables_of_batches() -> None:
    curvature = ad.per_sample(ad.hessian(square), (None, 0))
    batches = [X[:4], X[4:5], X[5:]]
    assert_close(curvature(W, iter(batches)), outer(X))
    assert_close(curvature(W, ([batch] for batch in batches)), outer(X))
    assert_close(ad.per_sample(torch.dot)(iter([(X[:4], X[:4]), (X[4:], X[4:])])), X.square().sum(1))
    named = ad.per_sample(lambda w, *, x, scale: w @ x * scale, {"x": 0, "scale": 0})
    scale = torch.arange(10.0)
    expected = X @ W * scale
    assert_close(named(W, iter([{"x": X, "scale": scale}])), expected)
    assert_close(named(W, iter([(X[:2], scale[:2]), (X[2:], scale[2:])])), expected)


def test_parameters_as_an_iterator_are_taken_for_batches() -> None:
    model = torch.nn.Linear(3, 2)
    loss = ad.sample_loss(model, torch.nn.functional.mse_loss)
    gradients = ad.per_sample(ad.grad(loss), in_dims=(None, 0, 0))
    with pytest.raises(
        BatchError, match=r"Any iterator counts as batches: .* dict\(module\.named_parameters\(\)\)"
    ):
        gradients(model.named_parameters(), X, X[:, :2])
