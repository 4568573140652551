"""PyPose by its public interface, compared with plain autograd: its source archive holds no tests.

Runs with torch's transforms and with autodiff's; see `__main__`.
"""

from __future__ import annotations

from typing import Any

import pypose
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.func import jacfwd, jacrev, vmap


@pytest.mark.parametrize("kind", ["randn_SO3", "randn_SE3", "randn_RxSO3"])
def test_classes_are_kept(kind: str) -> None:
    pose, points = getattr(pypose, kind)(5), torch.randn(5, 3)
    with pypose.retain_ltype():
        assert torch.allclose(vmap(lambda pose, x: pose @ x)(pose, points), pose @ points, atol=1e-6)
        assert torch.allclose(vmap(lambda pose: pose.Log().tensor())(pose), pose.Log().tensor(), atol=1e-6)
        result = jacrev(lambda pose, x: pose @ x)(pose[0], points[0])
    expected = jacobian(lambda pose: pose @ points[0], pose[0])
    assert torch.allclose(result, expected.as_subclass(Tensor), atol=1e-6)


def test_errors_without_its_context() -> None:
    pose, points = pypose.randn_SE3(5), torch.randn(5, 3)
    with pytest.raises(RuntimeError, match="Expected size"):
        vmap(lambda pose, x: pose @ x)(pose, points)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        jacfwd(lambda pose, x: pose @ x)(pose[:1], points[:1])


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_own_jacrev(chunk_size: int | None) -> None:
    pose, points = pypose.randn_SE3(1), torch.randn(1, 3)
    result = pypose.func.jacrev(lambda pose, x: pose @ x, chunk_size=chunk_size)(pose, points)
    expected = jacobian(lambda pose: pose @ points, pose)
    assert torch.allclose(result, expected.as_subclass(Tensor), atol=1e-6)


@pytest.mark.parametrize("name", ["modjacrev", "modjacfwd", "modjac"])
def test_jacobians_of_modules(name: str) -> None:
    module, x = nn.Linear(3, 2), torch.randn(3)
    result = getattr(pypose.optim.functional, name)(module, x)
    blocks = list(result.values()) if isinstance(result, dict) else list(result)
    expected = torch.zeros(2, 2, 3)
    expected[0, 0], expected[1, 1] = x, x
    assert torch.allclose(blocks[0], expected)


def test_filter_and_optimizer() -> None:
    class Inverse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pose = pypose.Parameter(pypose.randn_SE3(2, 2, sigma=0.1))

        def forward(self, inputs: Any) -> Tensor:
            result: Tensor = (self.pose @ inputs).Log().tensor()
            return result

    inputs, module = pypose.randn_SE3(2, 2, sigma=0.1), Inverse()
    optimizer = pypose.optim.LM(module, strategy=pypose.optim.strategy.Constant(damping=1e-4))
    first = optimizer.step(inputs)
    assert optimizer.step(inputs) <= first
