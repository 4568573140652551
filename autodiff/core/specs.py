"""Tensor specs: shape, dtype and device of a tensor that may be gone, or not be there yet. Imports nothing of ours."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch


class TensorSpec(NamedTuple):
    """What a tensor looks like, without its numbers and levels."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorSpec:
        """That of a tensor."""
        return TensorSpec(tensor.shape, tensor.dtype, tensor.device)

    @property
    def nbytes(self) -> int:
        """The size of its numbers."""
        return prod(self.shape) * self.dtype.itemsize

    def full(self, value: float) -> torch.Tensor:
        """A tensor of one value."""
        return torch.full(self.shape, value, dtype=self.dtype, device=self.device)
