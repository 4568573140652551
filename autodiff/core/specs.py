"""What a tensor looks like, where the tensor itself is not needed or is gone. Imports nothing from the package."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TensorSpec(NamedTuple):
    """A tensor's shape, dtype and device."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: Tensor) -> TensorSpec:
        """That of a tensor."""
        return TensorSpec(tensor.shape, tensor.dtype, tensor.device)

    def full(self, value: float) -> Tensor:
        """A tensor of one value."""
        return torch.full(self.shape, value, dtype=self.dtype, device=self.device)
