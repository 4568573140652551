"""Least squares by LSMR, for operators of any shape. Imports `iteration`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from autodiff.operators.iteration import ACTIVE, DONE, Steps, System, add, divided, inverse, norm

if TYPE_CHECKING:
    from torch import Tensor


def lsmr(system: System, R: Tensor, targets: Tensor, steps: Steps) -> Tensor:
    """The X of least norm for which A X - R is smallest.

    D. C.-L. Fong and M. Saunders, "LSMR: an iterative algorithm for sparse least-squares problems" (2011). It stops
    where the norm of the residual r is at most its target, or that of A'r at most ``system.slope`` times those of A and
    r. The norm of A is estimated, and left in ``system.size``. The preconditioner is on the right,
    and ``system.multiply_adjoint`` has it inside.

    # R: [k, m], targets: [k] -> [k, n]
    """
    M, adjoint, eps = system.precondition, system.multiply_adjoint, torch.finfo(R.dtype).eps
    A = system.multiply if M is None else lambda rows: system.multiply(M(rows))
    beta = norms = norm(R)
    U = divided(R, beta)
    V = adjoint(U)
    alpha = norm(V)
    V = divided(V, alpha)
    zero, one = torch.zeros_like(beta), torch.ones_like(beta)
    # The two bidiagonalisations, in the names of the paper.
    zeta_bar, alpha_bar, rho, rho_bar, c_bar, s_bar, zeta = alpha * beta, alpha, one, one, one, zero, zero
    H, H_bar, X = V, torch.zeros_like(V), torch.zeros_like(V)
    # What the residual's norm is estimated by.
    beta_dd, beta_d, rho_d, tau_tilde, theta_tilde = beta, zero, one, zero, zero
    square, size = alpha**2, alpha
    state = torch.where((norms > targets) & (alpha > 0), ACTIVE, DONE)
    while steps.goes_on(state, norms):
        active = state == ACTIVE
        image = torch.addcmul(A(V), -alpha[:, None].to(R.dtype), U)
        beta = norm(image)
        U = divided(image, beta)
        back = torch.addcmul(adjoint(U), -beta[:, None].to(R.dtype), V)
        alpha = norm(back)
        V = divided(back, alpha)
        square = square + beta**2
        size = square.sqrt()  # the norm of A, from below

        c, s, rho_next = _rotation(alpha_bar, beta)
        theta, alpha_bar = s * alpha, c * alpha
        theta_bar, rho_bar_before, zeta_before = s_bar * rho_next, rho_bar, zeta
        c_bar, s_bar, rho_bar = _rotation(c_bar * rho_next, theta)
        zeta, zeta_bar = c_bar * zeta_bar, -s_bar * zeta_bar
        # What is left is rounding: there is no more to find.
        moving = active & (rho_next > eps * size) & (rho_bar > eps * size)

        H_bar = torch.addcmul(
            H, -(theta_bar * rho_next * inverse(rho * rho_bar_before))[:, None].to(R.dtype), H_bar
        )
        rho = rho_next
        X = add(X, torch.where(moving, zeta * inverse(rho * rho_bar), 0), H_bar)
        H = torch.addcmul(V, -(theta * inverse(rho))[:, None].to(R.dtype), H)

        beta_hat, beta_dd = c * beta_dd, -s * beta_dd
        c_tilde, s_tilde, rho_tilde = _rotation(rho_d, theta_bar)
        theta_tilde_before, theta_tilde, rho_d = theta_tilde, s_tilde * rho_bar, c_tilde * rho_bar
        beta_d = c_tilde * beta_hat - s_tilde * beta_d
        tau_tilde = (zeta_before - theta_tilde_before * tau_tilde) * inverse(rho_tilde)
        tau_d = (zeta - theta_tilde * tau_tilde) * inverse(rho_d)
        norms = torch.where(moving, torch.hypot(beta_d - tau_d, beta_dd), norms)
        square = square + alpha**2
        done = (norms <= targets) | (zeta_bar.abs() <= max(system.slope, 10 * eps) * size * norms)
        state = torch.where(moving & ~done, ACTIVE, DONE)
        norms = torch.where(size.isfinite(), norms, torch.nan)
    system.size = size
    return X if M is None else M(X)


def _rotation(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    radius = torch.hypot(a, b)
    return a * inverse(radius), b * inverse(radius), radius
