"""Random vectors that an operator is multiplied by, and what is said of their samples.

Provides `Drawing`, which draws them in bounded batches, the same for all samples of a `vmap`. Imports `_torch`,
`checks` and the operators.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from autodiff import checks
from autodiff._torch import OutsideTransforms, compiling

if TYPE_CHECKING:
    from collections.abc import Iterator

    from autodiff.operators.operator import Operator
    from autodiff.operators.space import Space

Distribution: TypeAlias = Literal["rademacher", "gaussian", "sphere"]

# Probes are multiplied in batches of at most this size, where a method does not have to keep them.
_BATCH_BYTES = 64 * 2**20


class Drawing(NamedTuple):
    """How probes are drawn. Each has E[z z^H] = 1, so that E[z^H A z] is the trace of A."""

    space: Space
    distribution: Distribution
    generator: torch.Generator | None

    def columns(self, count: int) -> Tensor:
        """So many probes, as the columns of a matrix in the dtype of the space.

        They are drawn on the generator's device, outside of all transforms: all samples of a batch share them.

        # [size, count]
        """
        device = self.space.device if self.generator is None else self.generator.device
        with nullcontext() if compiling() else OutsideTransforms():
            rows = self._rows((count, self.space.size), self.space.dtype, device)
            columns: Tensor = rows.to(self.space.device).mT
            return columns

    def _rows(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.distribution != "rademacher":
            rows = torch.randn(shape, dtype=dtype, device=device, generator=self.generator)
            if self.distribution == "sphere":
                rows *= shape[1] ** 0.5 / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
            return rows
        if not dtype.is_complex:
            return 2 * torch.randint(0, 2, shape, dtype=dtype, device=device, generator=self.generator) - 1
        signs = torch.tensor([1, 1j, -1, -1j], dtype=dtype, device=device)
        return signs[torch.randint(0, 4, shape, device=device, generator=self.generator)]

    def batches(
        self, count: int, bytes_each: int | None = None, at_most: int = _BATCH_BYTES
    ) -> Iterator[Tensor]:
        """So many probes in batches that take ``at_most`` bytes, ``bytes_each`` for a probe and what it leads to."""
        if bytes_each is None:
            bytes_each = self.space.size * self.space.dtype.itemsize
        size = max(1, at_most // max(bytes_each, 1))
        for start in range(0, count, size):
            yield self.columns(min(size, count - start))


def drawing(name: str, A: Operator, distribution: Distribution, generator: torch.Generator | None) -> Drawing:
    """Probes of an operator's domain, under the public name that the user called."""
    checks.untraced_drawing(name)
    return Drawing(A.domain, distribution, generator)


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and factorisations: torch has no factorisations in half precision."""
    return torch.promote_types(dtype, torch.float32)


def constant_product(A: Operator, columns: Tensor) -> Tensor:
    """A product that no derivative is taken of."""
    with torch.no_grad():
        return A.matmat(columns).detach()


def standard_error(samples: Tensor) -> Tensor:
    """The standard error of the mean of samples along dimension 0, which is not known of a single one.

    # samples: [count, *shape] -> [*shape], real
    """
    samples = samples.detach()
    count = samples.shape[0]
    if count == 1:
        return torch.full_like(samples[0].abs(), float("nan"))
    error: Tensor = samples.std(0) / count**0.5
    return error


def column_norms(matrix: Tensor) -> Tensor:
    """The norm of each column, whose square need not be a number that the dtype has.

    # [m, k] -> [k], real
    """
    scale = unit(matrix)
    norms: Tensor = torch.linalg.vector_norm(matrix / scale, dim=0) * scale
    return norms


def unit(numbers: Tensor) -> Tensor:
    """The largest of them, a constant; one where it is no number to divide by."""
    largest = (
        numbers.detach().abs().amax()
        if numbers.numel()
        else numbers.new_zeros((), dtype=numbers.dtype.to_real())
    )
    return torch.where((largest > 0) & largest.isfinite(), largest, 1)
