"""Laplace by its public interface, compared with plain autograd: its source archive holds no tests.

Runs with torch's transforms and with autodiff's; see `__main__`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laplace import Laplace
from torch import nn
from torch.autograd.functional import jacobian
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
@pytest.mark.parametrize("likelihood", ["regression", "classification"])
def test_fit_and_predict(likelihood: Any, structure: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(12, 3)
    y = torch.randn(12, 2) if likelihood == "regression" else torch.randint(2, (12,))
    posterior = Laplace(model, likelihood, subset_of_weights="all", hessian_structure=structure)
    posterior.fit(DataLoader(TensorDataset(x, y), batch_size=4))
    params = {name: param.detach() for name, param in model.named_parameters()}
    result = posterior(x, pred_type="glm")
    if structure == "full":
        blocks = jacobian(
            lambda *ps: functional_call(model, dict(zip(params, ps, strict=True)), (x,)),
            tuple(params.values()),
        )
        jacobians = torch.cat([block.reshape(24, -1) for block in blocks], 1)
        if likelihood == "regression":
            expected = jacobians.T @ jacobians
        else:
            p = model(x).softmax(-1).detach()
            lam = torch.block_diag(*(torch.diag(one) - torch.outer(one, one) for one in p))
            expected = jacobians.T @ lam @ jacobians
        assert torch.allclose(posterior.H, expected, rtol=1e-3, atol=1e-4)
    means = result[0] if likelihood == "regression" else result
    assert torch.isfinite(means).all()


def test_jacobians() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    posterior = Laplace(model, "regression", subset_of_weights="all", hessian_structure="full")
    jacobians, outputs = posterior.backend.jacobians(x)
    assert torch.allclose(outputs, model(x))
    assert jacobians.shape == (5, 2, sum(param.numel() for param in model.parameters()))
