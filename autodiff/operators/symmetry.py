"""Whether an operator that is not known to be symmetric acts so. Imports `core` alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from autodiff._torch import fully_unwrapped
from autodiff.core.seeds import generic_vector
from autodiff.core.specs import TensorSpec

if TYPE_CHECKING:
    from autodiff.operators.linear_map import LinearMap


def acts_symmetric(operator: LinearMap) -> bool:
    """Whether <v, A u> is the conjugate of <u, A v> for two vectors that have nothing to do with the operator.

    They may differ by what rounding makes of sums of random signs. It takes two products.
    """
    size, dtype = operator.shape[0], operator.dtype
    spec = TensorSpec((size,), dtype, operator.device)
    with torch.no_grad():
        u, v = generic_vector(spec), generic_vector(spec, elsewhere=True)
        v = v / v.abs().amax() if size else v
        Au, Av = operator.matmat(torch.stack([u, v], 1)).detach().unbind(1)
        # The largest numbers, since squares may underflow.
        scale = sum((vector.abs().amax() if size else 0) for vector in (Au, Av)) * size**0.5
        differ = (torch.vdot(v, Au) - torch.vdot(Av, u)).abs() > 4 * torch.finfo(dtype).eps ** (2 / 3) * scale
    return not bool(fully_unwrapped(differ).any())
