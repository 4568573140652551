"""The conjugate gradient method. Imports `core` and `iteration`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from autodiff.core.seeds import generic_vector
from autodiff.operators.iteration import (
    ACTIVE,
    BAD_PRECONDITIONER,
    DONE,
    INDEFINITE,
    Steps,
    System,
    add,
    add_to_multiple,
    divided,
    inner,
    inverse,
    norm,
    rounding,
)

if TYPE_CHECKING:
    from torch import Tensor

# So many products find the size of an operator that may be indefinite.
_POWERS = 8


def conjugate_gradient(system: System, R: Tensor, targets: Tensor, steps: Steps) -> Tensor:
    """The X that A maps to R, for a positive definite A, until the norm of each residual is at most its target.

    M. R. Hestenes and E. Stiefel, "Methods of conjugate gradients for solving linear systems" (1952). A step reads or
    writes a vector 12 times, besides the product: two inner products and three updates. R is overwritten.

    # R: [k, n], targets: [k] -> [k, n]
    """
    A, M, eps, little = system.multiply, system.precondition, torch.finfo(R.dtype).eps, rounding(R)
    X = torch.zeros_like(R)
    Z = R if M is None else M(R)
    P = Z.clone()
    # r'Mr, and p'M^{-1}p, by which p'Ap is a curvature: r and the last p are orthogonal.
    squares = lengths = inner(R, Z)
    norms = norm(R)
    largest = torch.zeros_like(norms)
    state = torch.where(norms > targets, ACTIVE, DONE)
    if M is not None:
        state = _marked(state, squares, norms, Z, little)
    curvature, AP, lengths_before = largest, P, lengths

    def certain() -> Tensor:
        return _certain(system, state, curvature, largest, lengths_before, AP)

    while steps.goes_on(state, norms, certain):
        active = state == ACTIVE
        AP = A(P)
        curvature = inner(P, AP) * inverse(lengths)
        largest = torch.maximum(largest, curvature.abs())
        moving = active & (curvature > eps / 10 * largest)
        step = torch.where(moving, squares * inverse(curvature * lengths), 0)
        X, R = add(X, step, P), add(R, -step, AP)
        norms = norm(R)
        Z = R if M is None else M(R)
        before, squares = squares, norms**2 if M is None else inner(R, Z)
        ratio = torch.where(moving, squares * inverse(before), 0)
        lengths_before, lengths = lengths, squares + ratio**2 * lengths
        P = add_to_multiple(P, ratio, Z)
        state = torch.where(moving & (norms > targets), ACTIVE, DONE)
        if M is not None:
            state = _marked(state, squares, norms, Z, little)
        state = torch.where(active & ~moving, INDEFINITE, state)
        # NaN in a product makes no curvature and no step.
        norms = torch.where(curvature.isfinite(), norms, torch.nan)
    return X


def _certain(
    system: System, state: Tensor, curvature: Tensor, largest: Tensor, lengths: Tensor, AP: Tensor
) -> Tensor:
    """The state without what rounding alone may have made indefinite, which is DONE.

    Along the direction p the curvature is not positive. Of a positive semidefinite A it is zero but for rounding, which
    is a part of A's largest curvature, and A p is as well.
    """
    M = system.precondition
    size, V = largest, generic_vector(AP, elsewhere=True)
    for _ in range(_POWERS):  # the power method
        V = divided(V, norm(V))
        V = system.multiply(V) if M is None else M(system.multiply(V))
        size = torch.maximum(size, norm(V))
    negative = curvature < -rounding(AP) * size
    if M is None:
        bent = norm(AP) * inverse(lengths.sqrt())
        negative = negative | (bent > 10 * torch.finfo(AP.dtype).eps ** 0.5 * size)
    return torch.where((state == INDEFINITE) & ~negative, DONE, state)


def _marked(state: Tensor, squares: Tensor, norms: Tensor, Z: Tensor, little: float) -> Tensor:
    """Mark where r'Mr is negative, and not by rounding alone."""
    return torch.where((state == ACTIVE) & (squares < -little * norms * norm(Z)), BAD_PRECONDITIONER, state)
