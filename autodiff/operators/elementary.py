"""Operators that know how to multiply one vector, and take several of them in batches."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from autodiff.core.chunks import Sizes
from autodiff.operators.linear_map import in_batches
from autodiff.operators.operator import Operator

if TYPE_CHECKING:
    from collections.abc import Callable

    from autodiff.operators.space import Leaves


class Elementary(Operator):
    """An operator that multiplies one vector at a time, and several of them in batches."""

    @abstractmethod
    def product(self, *, adjoint: bool) -> Callable[[Leaves], Leaves]:
        """What multiplies one vector. All that the products have in common is done before this returns."""

    def at_once(self) -> Sizes:
        """How many vectors are multiplied in one batch."""
        return Sizes(None)

    def multiply(self, vectors: Leaves, *, adjoint: bool = False, count: int | None = None) -> Leaves:
        product = self.product(adjoint=adjoint)
        if count is None:
            return product(vectors)
        start, end = (self.codomain, self.domain) if adjoint else (self.domain, self.codomain)
        if count == 0:
            return end.dense([None] * len(end.leaves), 0)
        return in_batches(product, start, vectors, count, self.at_once())
