"""The minimum residual method, for symmetric operators that need not be positive. Imports `iteration`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from autodiff.operators.iteration import (
    ACTIVE,
    BAD_PRECONDITIONER,
    DONE,
    Steps,
    System,
    add,
    divided,
    inner,
    inverse,
    norm,
    rounding,
)

if TYPE_CHECKING:
    from torch import Tensor


def minres(system: System, R: Tensor, targets: Tensor, steps: Steps) -> Tensor:
    """The X for which A X - R is smallest, for a symmetric A, until the norm of each residual is at most its target.

    C. C. Paige and M. A. Saunders, "Solution of sparse indefinite systems of linear equations" (1975). Without a
    preconditioner the norm of the residual is known from the recurrence; with one the residual is updated too, since
    the recurrence has its norm in the preconditioner's inner product.

    # R: [k, n], targets: [k] -> [k, n]
    """
    A, M, little = system.multiply, system.precondition, rounding(R)
    flat = max(little, torch.finfo(R.dtype).eps ** 0.75)  # what rounding leaves of a slope; a heuristic
    X, W, W_before = (torch.zeros_like(R) for _ in range(3))
    # U: the Lanczos vector before it is normalised, U_before: the one before it; Z = M U.
    U, U_before = R, torch.zeros_like(R)
    Z = R if M is None else M(R)
    beta, bad = _length(U, Z, little)
    phi_bar, norms = beta, norm(R)
    zero = torch.zeros_like(beta)
    beta_before = sine = d_bar = epsilon = largest = zero
    cosine = zero - 1
    state = _state(norms > targets, bad)
    while steps.goes_on(state, norms):
        V = divided(Z, beta)
        product = A(V)
        # A new tensor: a product may share its memory with its vector.
        product = torch.addcmul(product, -_column(beta * inverse(beta_before), R), U_before)
        alpha = inner(V, product)
        U_before, U = U, add(product, -alpha * inverse(beta), U)
        Z = U if M is None else M(U)
        beta_before, (beta, bad) = beta, _length(U, Z, little)
        # The last rotation, and the next one.
        epsilon_before, delta = epsilon, cosine * d_bar + sine * alpha
        g_bar, epsilon, d_bar = sine * d_bar - cosine * alpha, sine * beta, -cosine * beta
        gamma = torch.hypot(g_bar, beta)
        largest = torch.maximum(largest, gamma)
        # |A r| / |r|. Zero but for rounding: r is the smallest residual of a system that has no solution.
        moving = (state == ACTIVE) & (torch.hypot(g_bar, d_bar) > flat * largest)
        cosine, sine = g_bar * inverse(gamma), beta * inverse(gamma)
        phi, phi_bar = cosine * phi_bar, sine * phi_bar
        # w = (v - delta w_1 - epsilon w_2) / gamma, for the w of the two steps before
        W_next = torch.addcmul(V, -_column(epsilon_before, R), W_before)
        W, W_before = divided(add(W_next, -delta, W), gamma), W
        X = add(X, torch.where(moving, phi, 0), W)
        if M is None:
            norms = torch.where(moving, phi_bar.abs(), norms)
        else:
            # r <- s^2 r - phi_bar c u / |u|
            R = R * _column(torch.where(moving, sine**2, 1), R)
            R = add(R, torch.where(moving, -phi_bar * cosine * inverse(beta), 0), U)
            norms = norm(R)
        state = _state(moving & (norms > targets), bad)
        norms = torch.where(alpha.isfinite(), norms, torch.nan)
    return X


def _length(U: Tensor, Z: Tensor, little: float) -> tuple[Tensor, Tensor]:
    """The norm of each u in the preconditioner's inner product, and whether that is none: u'Mu is negative."""
    if U is Z:
        length = norm(U)
        return length, torch.zeros_like(length, dtype=torch.bool)
    square = inner(U, Z)
    return square.clamp_min(0).sqrt(), square < -little * norm(U) * norm(Z)


def _state(active: Tensor, bad: Tensor) -> Tensor:
    return torch.where(active, torch.where(bad, BAD_PRECONDITIONER, ACTIVE), DONE)


def _column(numbers: Tensor, rows: Tensor) -> Tensor:
    return numbers[:, None].to(rows.dtype)
