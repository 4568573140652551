"""Functions of a matrix with closed forms from matrix calculus, B the inverse of A.

So no mode of differentiation checks another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

MATRICES = torch.tensor(
    [
        [[3.0, 0.5, 0.1], [-0.4, 2.5, 0.3], [0.2, -0.7, 4.0]],
        [[2.0, -0.3, 0.6], [0.8, 3.5, -0.2], [-0.5, 0.4, 2.8]],
    ],
    dtype=torch.float64,
)
U, B_SIDE = (
    torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64),
    torch.tensor([0.3, 1.0, -1.5], dtype=torch.float64),
)


class Case(NamedTuple):
    func: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor], Tensor]
    hessian: Callable[[Tensor], Tensor]


def log_gradient(a: Tensor) -> Tensor:
    return a.inverse().T


def log_hessian(a: Tensor) -> Tensor:
    b = a.inverse()
    return -torch.einsum("jk,li->ijkl", b, b)


def det_hessian(a: Tensor) -> Tensor:
    b = a.inverse()
    return a.det() * (torch.einsum("ji,lk->ijkl", b, b) - torch.einsum("jk,li->ijkl", b, b))


def solve_gradient(a: Tensor) -> Tensor:
    return -torch.outer(a.inverse().T @ U, a.inverse() @ B_SIDE)


def solve_hessian(a: Tensor) -> Tensor:
    b = a.inverse()
    left, right = b.T @ U, b @ B_SIDE
    one, other = torch.einsum("k,li,j->ijkl", left, b, right), torch.einsum("i,jk,l->ijkl", left, b, right)
    return one + other


CASES = {
    "slogdet": Case(lambda a: torch.linalg.slogdet(a)[1], log_gradient, log_hessian),
    "logdet": Case(torch.logdet, log_gradient, log_hessian),
    "det": Case(torch.linalg.det, lambda a: a.det() * a.inverse().T, det_hessian),
    "solve": Case(lambda a: U @ torch.linalg.solve(a, B_SIDE), solve_gradient, solve_hessian),
    "inverse": Case(lambda a: U @ torch.linalg.inv(a) @ B_SIDE, solve_gradient, solve_hessian),
}
