"""Every public transform applied in one way to a scalar function of a vector, for what all promise.

`EVERY` is parametrised over by tests of call counts, modes, tracked parameters, threads and cleanup.
The function is f_w(x) = sum w x^3, whose derivatives `GRADIENT` and `HESSIAN` are linear in w.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import autodiff as ad

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
W = torch.tensor([1.0, 3.0, -0.5], dtype=torch.float64)
T = torch.tensor([1.0, -2.0, 0.25], dtype=torch.float64)

Scalar = Callable[[Tensor], Tensor]


def cubic(x: Tensor, w: Tensor = W) -> Tensor:
    return (w * x**3).sum()


def gradient(x: Tensor, w: Tensor = W) -> Tensor:
    return 3 * w * x**2


def hessian(x: Tensor, w: Tensor = W) -> Tensor:
    return torch.diag_embed(6 * w * x)


@dataclass(frozen=True)
class Every:
    """``apply(f, x)`` is the transform's derivative of f at x; ``expected(x, w)`` that of the cubic."""

    name: str
    apply: Callable[[Scalar, Tensor], Tensor]
    expected: Callable[[Tensor, Tensor], Tensor]
    forward: bool = False


def _vjp(func: Scalar, x: Tensor) -> Tensor:
    out, pullback = ad.vjp(func, x)
    return pullback(torch.ones_like(out))[0]


def _jvp(func: Scalar, x: Tensor) -> Tensor:
    return ad.jvp(func, (x,), (T,))[1]


def _linearize(func: Scalar, x: Tensor) -> Tensor:
    return ad.linearize(func, x)[1](T)


def _hvp(func: Scalar, x: Tensor, mode: Any) -> Tensor:
    return ad.hvp(func, (x,), (T,), mode=mode)[1]


def _vmap(transform: Any, func: Scalar, x: Tensor) -> Tensor:
    return ad.vmap(transform(func))(torch.stack([x, 2 * x]))


def _batch(closed: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, w: torch.stack([closed(x, w), closed(2 * x, w)])


def _slope(x: Tensor, w: Tensor) -> Tensor:
    return gradient(x, w) @ T


def _curved(x: Tensor, w: Tensor) -> Tensor:
    return hessian(x, w) @ T


def _diagonal(x: Tensor, w: Tensor) -> Tensor:
    return 6 * w * x


def _trace(x: Tensor, w: Tensor) -> Tensor:
    return _diagonal(x, w).sum()


def _two_largest(x: Tensor, w: Tensor) -> Tensor:
    """Those at X and W, where the diagonal is 3, -18, -6: linear in w, as everything here."""
    return _diagonal(x, w)[[0, 2]]


FIRST = [
    Every("grad", lambda f, x: ad.grad(f)(x), gradient),
    Every("value_and_grad", lambda f, x: ad.value_and_grad(f)(x)[1], gradient),
    Every("grad_and_value", lambda f, x: ad.grad_and_value(f)(x)[0], gradient),
    Every("vjp", _vjp, gradient),
    Every("jvp", _jvp, _slope, forward=True),
    Every("linearize", _linearize, _slope),
    Every("jacrev", lambda f, x: ad.jacrev(f)(x), gradient),
    Every("jacrev-1", lambda f, x: ad.jacrev(f, chunk_size=1)(x), gradient),
    Every("jacfwd", lambda f, x: ad.jacfwd(f)(x), gradient, forward=True),
    Every("jacobian", lambda f, x: ad.jacobian(f)(x), gradient),
]
_OVER = {
    "reverse-over-reverse": False,
    "forward-over-reverse": True,
    "reverse-over-forward": True,
    "forward-over-forward": True,
}
SECOND = [
    Every("hessian", lambda f, x: ad.hessian(f)(x), hessian),
    Every("hvp", lambda f, x: ad.hvp(f, (x,), (T,))[1], _curved),
    *[
        Every(f"hessian-{m}", lambda f, x, m=m: ad.hessian(f, mode=m)(x), hessian, forward)
        for m, forward in _OVER.items()
    ],
    *[
        Every(f"hvp-{m}", partial(_hvp, mode=m), _curved, forward)
        for m, forward in _OVER.items()
        if m != "forward-over-forward"
    ],
    Every("hessian-1", lambda f, x: ad.hessian(f, chunk_size=1)(x), hessian),
    Every("hessian_diagonal", lambda f, x: ad.hessian_diagonal(f)(x), _diagonal),
    Every("hessian_diagonal-1", lambda f, x: ad.hessian_diagonal(f, chunk_size=1)(x), _diagonal),
    Every("hessian_block_diagonal", lambda f, x: ad.hessian_block_diagonal(f)(x), hessian),
    Every("hessian_trace", lambda f, x: ad.hessian_trace(f)(x), _trace),
    Every("hessian_eigenvalues", lambda f, x: ad.hessian_eigenvalues(f, 2)(x), _two_largest),
]
BATCHED = [
    Every("vmap", lambda f, x: ad.vmap(f)(torch.stack([x, 2 * x])), _batch(cubic)),
    Every("vmap-grad", partial(_vmap, ad.grad), _batch(gradient)),
    Every("vmap-jacfwd", partial(_vmap, ad.jacfwd), _batch(gradient), forward=True),
    Every("vmap-jacrev", partial(_vmap, ad.jacrev), _batch(gradient)),
    Every("vmap-hessian", partial(_vmap, ad.hessian), _batch(hessian)),
]
OPERATORS = [
    Every("operators.jacobian", lambda f, x: ad.operators.jacobian(f)(x) @ T.to(x.dtype), _slope),
    Every("operators.jacobian.H", lambda f, x: ad.operators.jacobian(f)(x).H.matvec(T[:1] * 0 + 1), gradient),
    Every("operators.hessian", lambda f, x: ad.operators.hessian(f)(x) @ T, _curved),
    Every("operators.hessian, matrix", lambda f, x: ad.operators.hessian(f)(x).to_matrix(), hessian),
    Every("operators.hessian, diagonal", lambda f, x: ad.operators.hessian(f)(x).diagonal(), _diagonal),
    Every(
        "vmap-operators.hessian",
        partial(_vmap, lambda f: lambda x: ad.operators.hessian(f)(x) @ T),
        _batch(_curved),
    ),
]
EVERY = [*FIRST, *SECOND, *BATCHED, *OPERATORS]

each = pytest.mark.parametrize("every", EVERY, ids=lambda every: every.name)
each_derivative = pytest.mark.parametrize("every", [*FIRST, *SECOND], ids=lambda every: every.name)
