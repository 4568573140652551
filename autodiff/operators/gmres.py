"""The generalised minimum residual method, for square operators. Imports `iteration`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from autodiff.operators.iteration import (
    ACTIVE,
    DONE,
    Steps,
    System,
    add,
    divided,
    inner_products,
    inverse,
    norm,
    rounding,
)

if TYPE_CHECKING:
    from torch import Tensor


def gmres(system: System, R: Tensor, targets: Tensor, steps: Steps) -> Tensor:
    """The X of a Krylov space for which A X - R is smallest, of at most ``system.restart`` dimensions.

    Y. Saad and M. H. Schultz, "GMRES: a generalized minimal residual algorithm for solving nonsymmetric linear
    systems" (1986). The preconditioner is on the right, so that the residuals are those of the system. The
    memory is that of ``system.restart`` vectors for each right-hand side.

    # R: [k, n], targets: [k] -> [k, n]
    """
    A, M, little = system.multiply, system.precondition, rounding(R) / 100
    norms = norm(R)
    basis = [divided(R, norms)]
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    # The product of all rotations: the Hessenberg matrix times it is triangular. It grows by a row in each step.
    size = system.restart + 1
    unit = torch.eye(size, dtype=R.dtype, device=R.device)
    start, rotations = norms.to(R.dtype), [unit[0].expand(R.shape[0], size)]
    largest = torch.zeros_like(norms)
    state = torch.where(norms > targets, ACTIVE, DONE)
    while len(columns) < system.restart and steps.goes_on(state, norms):
        step, active = len(columns), state == ACTIVE
        image = A(basis[-1] if M is None else M(basis[-1]))
        image, column = _orthogonalised(image, basis)
        length = norm(image)
        # What is left of the image is rounding: the Krylov space is closed under A.
        size_of_image = torch.linalg.vector_norm(torch.stack([*column, length.to(R.dtype)], -1), dim=-1)
        length = torch.where(length > little * size_of_image, length, 0)
        largest = torch.maximum(largest, size_of_image)
        basis.append(divided(image, length))
        rotations.append(unit[step + 1].expand(R.shape[0], size))
        entries = torch.stack([*column, length.to(R.dtype)], -1)
        # h: [k, step + 2], Q: [k, step + 2, size]
        Q = torch.stack(rotations, -2)
        rotated = (Q[..., : step + 2] @ entries[..., None])[..., 0]
        a, radius = rotated[..., step], torch.hypot(rotated[..., step].abs(), length)
        c, s = a.conj() * inverse(radius), (length * inverse(radius)).to(R.dtype)
        upper, lower = rotations[step], rotations[step + 1]
        rotations[step] = c[..., None] * upper + s[..., None] * lower
        rotations[step + 1] = c.conj()[..., None] * lower - s[..., None] * upper
        # A is singular where the radius is zero but for rounding: no step.
        moving = active & (radius > little * largest)
        columns.append((rotated[..., :step], radius, moving))
        norms = torch.where(moving, (rotations[step + 1][..., 0] * start).abs(), norms)
        state = torch.where(moving & (norms > targets), ACTIVE, DONE)
        norms = torch.where(radius.isfinite(), norms, torch.nan)
    if not columns:
        return torch.zeros_like(R)
    X = _combination(basis, columns, [row[..., 0] * start for row in rotations])
    return X if M is None else M(X)


def _orthogonalised(image: Tensor, basis: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A vector without what it has of the basis, by modified Gram and Schmidt; and that, as coefficients.

    # image, basis[i]: [k, n] -> [k, n], [k] for each i
    """
    coefficients = []
    for i, vector in enumerate(basis):
        coefficient = inner_products(vector, image)
        # A new tensor at first, since a product may share its memory with its vector.
        image = add(image, -coefficient, vector) if i else torch.addcmul(image, -coefficient[:, None], vector)
        coefficients.append(coefficient)
    return image, coefficients


def _combination(
    basis: list[Tensor], columns: list[tuple[Tensor, Tensor, Tensor]], right: list[Tensor]
) -> Tensor:
    """The sum of the basis with the coefficients that solve the triangular system.

    # column: ([k, step], [k], [k]), right[i]: [k] -> [k, n]
    """
    solved: list[Tensor] = []
    remaining = list(right)
    for step in reversed(range(len(columns))):
        above, radius, moving = columns[step]
        # A right-hand side that did not move in this step has no coefficient for its vector.
        coefficient = torch.where(moving, remaining[step] * inverse(radius), 0)
        solved.append(coefficient)
        for i in range(step):
            remaining[i] = remaining[i] - above[..., i] * coefficient
    X = torch.zeros_like(basis[0])
    for vector, coefficient in zip(basis, reversed(solved), strict=False):
        X = add(X, coefficient, vector)
    return X
