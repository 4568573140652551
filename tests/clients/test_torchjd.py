"""TorchJD by its public interface, compared with plain autograd: its source archive holds no tests.

Runs with torch's transforms and with autodiff's; see `__main__`.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian
from torchjd.autogram import Engine
from torchjd.autojac import jac


def test_jac() -> None:
    x = torch.randn(4, requires_grad=True)
    (result,) = jac([x**2], [x])
    assert torch.allclose(result, torch.diag(2 * x.detach()))


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_jac_in_chunks(chunk_size: int | None) -> None:
    x, weight = torch.randn(5, 3), torch.randn(3, 2, requires_grad=True)
    (result,) = jac([(x @ weight).exp().flatten()], [weight], parallel_chunk_size=chunk_size)
    expected = jacobian(lambda weight: (x @ weight).exp().flatten(), weight)
    assert torch.allclose(result, expected)


@pytest.mark.parametrize("batch_dim", [0, None])
def test_gramian(batch_dim: int | None) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(6, 3)
    engine = Engine(model, batch_dim=batch_dim)
    gramian = engine.compute_gramian(model(x).square().squeeze(1))
    rows = []
    for one in x:
        grads = torch.autograd.grad(model(one).square().sum(), list(model.parameters()))
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    expected = torch.stack(rows) @ torch.stack(rows).T
    assert torch.allclose(gramian, expected, rtol=1e-4, atol=1e-5)
