"""Eigenvalues and eigenvectors that were found as constants, with derivatives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from autodiff.core.rules import is_tracked

if TYPE_CHECKING:
    from autodiff.operators.operator import Operator


def with_derivatives(name: str, A: Operator, values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    del name
    image = A.matmat(vectors).to(vectors.dtype)
    quotients = torch.linalg.vecdot(vectors, image, dim=0).real
    return values + (quotients - quotients.detach()), vectors
