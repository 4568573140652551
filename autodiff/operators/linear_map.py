"""What every operator can do with its products: vectors in each form, batches, conversions.

Provides `LinearMap`, on which `Operator` puts the algebra, and `tree_class`. Imports `core`, `checks` and `space`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from autodiff import checks, pytree
from autodiff.core import trees
from autodiff.core.call import spread
from autodiff.core.products import products
from autodiff.core.seeds import Given, StandardBasis
from autodiff.operators.scipy_operator import scipy_operator
from autodiff.operators.space import Leaves, Space

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autodiff.core.chunks import Sizes

C = TypeVar("C", bound=type)

# So many rows of a dense matrix, or of its diagonal, are computed at a time.
_ROWS = 64


def tree_class(*children: str) -> Callable[[C], C]:
    """Make a dataclass of operators a tree: these fields are its children, the others say what else it is.

    So an operator can be an argument of a transformed function, and algorithms see the tensors that it is made of.
    """

    def register(cls: C) -> C:
        fields = [field.name for field in dataclasses.fields(cls) if field.init]
        rest = tuple(field for field in fields if field not in children)

        def flatten(operator: Any) -> tuple[Sequence[Any], Any]:
            return tuple(getattr(operator, one) for one in children), tuple(
                getattr(operator, one) for one in rest
            )

        def unflatten(metadata: Any, parts: Sequence[Any]) -> Any:
            # Past __init__, which may compute: the parts may be anything.
            operator: Any = object.__new__(cls)
            operator.__dict__.update(zip((*children, *rest), (*parts, *metadata), strict=True))
            return operator

        trees.register(cls, flatten, unflatten, children)
        return cls

    return register


class LinearMap(ABC):
    """A linear map between two spaces, known by its products with vectors and those of its conjugate transpose."""

    @property
    @abstractmethod
    def domain(self) -> Space:
        """The space of the vectors that it multiplies."""

    @property
    @abstractmethod
    def codomain(self) -> Space:
        """The space of the products."""

    @abstractmethod
    def multiply(self, vectors: Leaves, *, adjoint: bool = False, count: int | None = None) -> Leaves:
        """The product with a vector, as leaves, or with ``count`` of them stacked in front of each leaf.

        ``adjoint`` multiplies by the conjugate transpose instead. None stands for zero.
        """

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is, for its repr and for messages."""

    @property
    def symmetric(self) -> bool:
        """Whether it is known to equal its conjugate transpose."""
        return False

    @property
    def positive(self) -> bool:
        """Whether it is known to be symmetric and positive semidefinite."""
        return False

    @property
    def cost(self) -> float:
        """About how long a product takes, in gradients of the function that was differentiated."""
        return 0.0

    # Products with flat vectors, which algorithms use.

    def matvec(self, vector: Tensor) -> Tensor:
        """The product with a vector ``[n]``, as a tensor ``[m]``, whatever trees the spaces are."""
        return self.codomain.joined(self.multiply(self.domain.split(vector)))

    def matmat(self, matrix: Tensor) -> Tensor:
        """The product with a matrix ``[n, k]``, as a tensor ``[m, k]``, whatever trees the spaces are."""
        count = matrix.shape[1]
        if count == 1:
            return self.matvec(matrix[:, 0])[:, None]
        rows = self.multiply(self.domain.split_columns(matrix), count=count)
        return self.codomain.joined_columns(rows, count)

    # What it is.

    @property
    def shape(self) -> tuple[int, int]:
        """The sizes of codomain and domain, ``(m, n)``."""
        return self.codomain.size, self.domain.size

    @property
    def dtype(self) -> torch.dtype:
        """The common dtype of the domain and the codomain."""
        return torch.promote_types(self.domain.dtype, self.codomain.dtype)

    @property
    def device(self) -> torch.device:
        """The device of the domain's first leaf."""
        return self.domain.device

    def __repr__(self) -> str:
        known = "positive semidefinite" if self.positive else "symmetric" if self.symmetric else ""
        cost = f"{self.cost:.3g} gradient{'s' * (self.cost != 1)} a product" if self.cost else ""
        facts = (f"{list(self.shape)}", f"{self.dtype}", f"{self.device}", known, cost)
        return f"<{self.name}: {', '.join(fact for fact in facts if fact)}>"

    # Conversions.

    def to_matrix(self) -> Tensor:
        """The matrix itself, ``[m, n]``: a product for each row or each column, whichever are fewer."""
        rows, columns = self.shape
        if rows < columns:
            return self._basis_products(adjoint=True).mH.resolve_conj().to(self.dtype)
        return self._basis_products(adjoint=False).to(self.dtype)

    def _basis_products(self, *, adjoint: bool) -> Tensor:
        """The products with the standard basis, as columns."""
        space, image = (self.codomain, self.domain) if adjoint else (self.domain, self.codomain)
        basis = StandardBasis([spec.full(0.0) for spec in space.leaves])
        columns = [] if space.size else [torch.zeros((image.size, 0), dtype=image.dtype, device=image.device)]
        for start in range(0, space.size, _ROWS):
            count = min(_ROWS, space.size - start)
            rows = self.multiply(basis.vectors(start, start + count), adjoint=adjoint, count=count)
            columns.append(image.joined_columns(rows, count))
        return columns[0] if len(columns) == 1 else torch.cat(columns, 1)

    def to_tree(self) -> Any:
        """The matrix as a transform gives it: a tree like the codomain, of trees like the domain, of blocks."""
        return pytree.from_matrix(self.to_matrix(), self.codomain.zeros(), self.domain.zeros())

    def diagonal(self) -> Any:
        """The diagonal as a tree like the domain, by a product for each of its numbers.

        :func:`autodiff.operators.diagonal` estimates it from fewer.
        """
        checks.square_operator("A.diagonal()", self.name, self.domain, self.codomain)
        parts = []
        for position, spec in enumerate(self.domain.leaves):
            model, kept = spec.full(0.0), []
            for start in range(0, model.numel(), _ROWS):
                stop = min(start + _ROWS, model.numel())
                rows: list[Tensor | None] = [None] * len(self.domain.leaves)
                rows[position] = StandardBasis([model]).vectors(start, stop)[0]
                strip = self.multiply(rows, count=stop - start)[position]
                if strip is None:
                    kept.append(model.reshape(-1)[start:stop])
                else:
                    own_block = strip.reshape((stop - start, model.numel()))
                    kept.append(own_block.diagonal(start).clone())
            parts.append((torch.cat(kept) if kept else model).reshape(spec.shape))
        return self.domain.tree(parts)

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.linalg.LinearOperator``, for NumPy vectors ``[n]`` and matrices ``[n, k]``.

        Raises:
            ImportError: SciPy is not installed.
            DtypeError: NumPy does not have the dtype, such as bfloat16.
        """
        return scipy_operator(self)


def in_batches(
    apply: Callable[[Leaves], Leaves], space: Space, rows: Leaves, count: int, at_once: Sizes
) -> Leaves:
    """``apply`` of each of ``count`` vectors of the space, so many at once in one batch."""
    if all(row is None for row in rows):
        rows = space.dense(rows, count)
    where = [i for i, row in enumerate(rows) if row is not None]

    def product(vectors: Sequence[Tensor | None], *, last: bool) -> list[Tensor | None]:
        del last
        return list(apply(spread(vectors, where, len(rows))))

    given = Given([row for row in rows if row is not None], count)
    return products(product, given, at_once)
