"""Estimates in which each probe is left out in turn: XTrace and XDiag, with standard errors by the jackknife.

The samples share their products, and are correlated: their standard deviation is 0.6 to 0.9 of what it should be. The
jackknife leaves out a second probe instead, and expects too much rather than too little (B. Efron and C. Stein, "The
jackknife estimate of variance", Annals of Statistics 9, 1981). Imports `probes` and the operators.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from autodiff.operators.probes import computed_in

if TYPE_CHECKING:
    from autodiff.operators.operator import Operator
    from autodiff.operators.probes import Drawing


class _Space(NamedTuple):
    """The space of some products, and the spaces of all of them but one.

    ``Q`` are orthonormal columns, zeros beyond the rank. Column i of ``own`` are the coordinates in Q of the unit
    vector that leaves the space when product i is left out, zeros where none does. ``ranks`` are the dimensions then.

    # Q: [n, k], own: [k, k], ranks: [k]
    """

    Q: Tensor
    own: Tensor
    ranks: Tensor

    def without_own(self, coordinates: Tensor) -> Tensor:
        """Column i without its part along the vector that leaves with product i."""
        return coordinates - self.own * (self.own.conj() * coordinates).sum(0)

    def pairs(self) -> tuple[Tensor, Tensor]:
        """What also leaves the space of all but j with product i: s_i - c_ij s_j, whose square is 1 / w_ij.

        w_ij is zero where nothing leaves, and where i is j.

        # c, w: [k, k]
        """
        c = (self.own.mH @ self.own).mT
        squares = 1 - c.abs() ** 2
        leaves = (squares > torch.finfo(squares.dtype).eps ** 0.5) & (self.own.abs().amax(0) > 0)[:, None]
        leaves = leaves & ~torch.eye(c.shape[0], dtype=torch.bool, device=c.device)
        return c, torch.where(leaves, 1 / torch.where(leaves, squares, 1), 0)


def _space(Y: Tensor) -> _Space:
    """By the singular values of the products, which need not be independent.

    # Y: [n, k]
    """
    # torch raises for numbers that are not finite; the estimate is NaN by its other terms.
    U, S, Vh = torch.linalg.svd(torch.where(Y.isfinite(), Y, 0), full_matrices=False)
    eps = torch.finfo(S.dtype).eps
    # Singular values come in descending order; those below this are rounding errors.
    counts = eps * max(Y.shape) * S[:1] < S
    # Product i is alone in its direction where e_i is in the span of V: the row of V has norm one.
    inside = Vh * counts[:, None]
    alone = (inside.abs() ** 2).sum(0) > 1 - eps**0.5
    own = torch.where(counts, 1 / torch.where(counts, S, 1), 0)[:, None] * inside
    own = own / torch.linalg.vector_norm(own, dim=0).clamp_min(torch.finfo(S.dtype).tiny)
    return _Space(U * counts, own * alone, counts.sum() - alone.to(torch.int64))


def _jackknife(means: Tensor) -> Tensor:
    """The standard error of an estimate from what it is without each of the probes.

    # means: [*shape, k] -> [*shape]
    """
    k = means.shape[-1]
    squares = ((means - means.mean(-1, keepdim=True)).abs() ** 2).sum(-1)
    error: Tensor = (squares * ((k - 1) / k)) ** 0.5
    return error


def _on_sphere(forms: Tensor, squares: Tensor, dimensions: Tensor) -> Tensor:
    """x^H A x with x scaled to the norm that a probe on the sphere of so many dimensions has."""
    some = dimensions > 0
    return torch.where(some, dimensions / torch.where(some, squares, 1), 0) * forms


def xtrace(A: Operator, probes: Drawing, samples: int) -> tuple[Tensor, Tensor]:
    """Sample j is tr(Q_j^H A Q_j) + x_j^H A x_j, where Q_j spans all products but A z_j, and x_j is z_j outside of it.

    x_j is scaled to the norm that a probe of the rest would have. s_j are the columns of ``space.own``.
    """
    n, dtype = A.domain.size, computed_in(A.dtype)
    Z = probes.columns(min(samples // 2, n))
    Y = A.matmat(Z).to(dtype)
    Z = Z.to(dtype)
    space = _space(Y.detach())
    Q, s = space.Q, space.own
    AQ = A.matmat(Q.to(A.dtype)).to(dtype)
    H, W = Q.mH @ AQ, Q.mH @ Z
    part = space.without_own(W)
    x, Ax = Z - Q @ part, Y - AQ @ part
    forms, squares, missing = (x.conj() * Ax).sum(0), (x.abs() ** 2).sum(0), n - space.ranks
    sHs = s.mH @ H @ s
    left = H.diagonal().sum() - sHs.diagonal()
    estimates = left + _on_sphere(forms, squares, missing)

    # [i, j]: sample j without product i too. The vector p that leaves is added to x_j.
    c, w = space.pairs()
    pHp = (
        sHs.diagonal()[:, None] - c * sHs - c.conj() * sHs.mT + (c.abs() ** 2).to(dtype) * sHs.diagonal()
    ).detach()
    pW, pAx, xAp = (
        M - c.conj() * M.diagonal() for M in (s.mH @ W, s.mH @ (Q.mH @ Ax.detach()), (AQ.detach() @ s).mH @ x)
    )
    bigger = forms.detach() + w * (pW.conj() * pAx + pW * xAp.conj()) + w**2 * pW.abs() ** 2 * pHp
    pairs = _on_sphere(bigger, squares + w * pW.abs() ** 2, missing + (w > 0).to(missing.dtype))
    pairs = pairs + left.detach() - w * pHp
    means = (pairs.sum(1) - pairs.diagonal()) / (len(estimates) - 1)
    return estimates.mean(), _jackknife(means)


def xdiag(A: Operator, probes: Drawing, samples: int) -> tuple[Tensor, Tensor]:
    """Sample j is diag(Q_j Q_j^H A) + conj(z_j) (1 - Q_j Q_j^H) A z_j, with Q_j as in `xtrace`."""
    dtype = computed_in(A.dtype)
    Z = probes.columns(min(samples // 2, A.domain.size))
    Y = A.matmat(Z).to(dtype)
    Z = Z.to(dtype).conj()
    space = _space(Y.detach())
    Q, s = space.Q, space.own
    AHQ = A.H.matmat(Q.to(A.dtype)).to(dtype)
    part = Q.mH @ Y
    Qs, Bs = Q @ s, (AHQ @ s).conj()
    # [n, k]
    on_space = (Q * AHQ.conj()).sum(1, keepdim=True) - Qs * Bs
    estimates = on_space + Z * (Y - Q @ space.without_own(part))

    # Sums over j of the samples without product i too, [n, i], as in `xtrace`.
    c, w = space.pairs()
    Bs, k = Bs.detach(), s.shape[1]
    # p^H Q^H A z_j, where s_i^H Q^H A z_j = 0 for i other than j.
    pY = -c.conj() * (s.conj() * part.detach()).sum(0)
    weight, cw = w.to(dtype), (w * c).mT
    changes = Qs * ((Z @ (w * pY).mT) - Bs * weight.sum(1)) - (Z * Qs) @ (w * pY * c).mT
    changes = changes + (Qs @ cw) * Bs + Qs * (Bs @ cw.conj()) - (Qs * Bs) @ (w * c.abs() ** 2).to(dtype).mT
    own = estimates.detach()
    means = (own.sum(1, keepdim=True) - own + changes) / (k - 1)
    return estimates.mean(1), _jackknife(means)
