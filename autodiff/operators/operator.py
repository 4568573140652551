"""The algebra of operators: sums, multiples, products, adjoints and blocks, none of which is ever formed.

Provides `Operator`, from which all operators are made, and the operators that are made of others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor

from autodiff import checks
from autodiff._torch import compiling
from autodiff.core.call import matching, spread
from autodiff.core.reverse import conjugated
from autodiff.operators.lazy import lazy
from autodiff.operators.linear_map import LinearMap, tree_class
from autodiff.operators.operands import is_at_least_zero, is_complex, is_scalar, traced_method
from autodiff.operators.space import Leaves, Space, added


class Operator(LinearMap):
    """A matrix that is never formed: a linear map between two spaces of trees, which multiplies vectors.

    ``A @ v`` takes a tree like ``A.domain``, a tensor ``[n]`` or a tensor ``[n, k]``, and gives the same form of
    ``A.codomain``; a tensor that is itself a whole tree of the domain counts as a tree. ``v @ A`` is ``A.T @ v``.

    Operators of differentiated functions come from :func:`autodiff.operators.hessian` and its siblings. They combine
    by ``+``, ``-``, ``*``, ``/`` and ``@``, with one another and with numbers: ``A + 0.1`` adds 0.1 to the diagonal.
    ``A["layer.*", "layer.*"]`` is the block of the leaves whose places match, rows first; each side is a pattern or
    a tuple of patterns, as in ``wrt``.

    An operator is a tree: its leaves are the tensors that it was made of.

    >>> import torch
    >>> import autodiff as ad
    >>> A = ad.operators.hessian(lambda x: x[0] ** 2 * x[1])(torch.tensor([1.0, 3.0]))
    >>> A @ torch.tensor([1.0, 1.0])
    tensor([8., 2.])
    >>> (2 * A + 1).to_matrix()
    tensor([[13.,  4.],
            [ 4.,  1.]])
    """

    # numpy leaves ``array * A`` to A.
    __array_ufunc__: ClassVar[None] = None

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, Operator):
            checks.same_space("A @ B", "B.codomain", other.codomain, "A.domain", self.domain)
            return Product((*_factors(self), *_factors(other)))
        form, leaves, count = self.domain.read(f"{self.name} @ v", other)
        product = self.multiply(leaves, count=count if form == "matrix" else None)
        return self.codomain.write(form, product, count)

    def __rmatmul__(self, other: Any) -> Any:
        """``v @ A`` is ``A.T @ v``, and ``M @ A`` for a matrix ``[k, m]`` is ``(A.T @ M.T).T``."""
        if isinstance(other, Tensor) and other.dim() == 2 and not self.codomain.is_only_leaf(other):
            return (self.T @ other.mT).mT
        return self.T @ other

    def prepared(self) -> Self:
        """This operator with all that its products have in common done now, inside the transforms that are active.

        An operator that was put together from its leaves inside a transform evaluates its function for each product.
        """
        return self

    @property
    def parts(self) -> Sequence[Operator]:
        """The operators that this one is made of."""
        return ()

    @property
    def H(self) -> Operator:  # noqa: N802  as in torch
        """The conjugate transpose."""
        return self if self.symmetric else Adjoint(self)

    @property
    def T(self) -> Operator:  # noqa: N802  as in torch
        """The transpose; of a complex operator it is the conjugate of ``A.H``."""
        return self.H.conj()

    def conj(self) -> Operator:
        """The complex conjugate."""
        return Conjugate(self) if self.dtype.is_complex else self

    def __add__(self, other: Any) -> Operator:
        if is_scalar(other):
            checks.square_operator("A + a number", self.name, self.domain, self.codomain)
            other = Identity(self.domain) * other
        if not isinstance(other, Operator):
            return NotImplemented
        checks.same_space("A + B", "B.domain", other.domain, "A.domain", self.domain)
        checks.same_space("A + B", "B.codomain", other.codomain, "A.codomain", self.codomain)
        return Sum((*_terms(self), *_terms(other)))

    __radd__ = __add__

    def __mul__(self, other: Any) -> Operator:
        if not is_scalar(other):
            return NotImplemented
        if is_complex(other):
            checks.complex_leaves("c * A", self.name, (*self.domain.leaves, *self.codomain.leaves))
        return Scaled(other, self)

    __rmul__ = __mul__

    def __neg__(self) -> Operator:
        return Scaled(-1, self)

    def __sub__(self, other: Any) -> Operator:
        return self.__add__(-other)

    def __rsub__(self, other: Any) -> Operator:
        return Scaled(-1, self).__add__(other)

    def __truediv__(self, other: Any) -> Operator:
        return self * (1 / other) if is_scalar(other) else NotImplemented

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What Python does with a tensor and an operator, for torch's tracer, which asks here instead."""
        del types, kwargs
        method = traced_method(func.__name__) if compiling() else None
        if method is None or not (len(args) == 2 and isinstance(args[1], Operator)):
            return NotImplemented
        return getattr(args[1], method)(args[0])

    def __getitem__(self, patterns: Any) -> Operator:
        rows, columns = checks.block_patterns(self.name, patterns)
        return Block(
            self,
            tuple(matching("A[rows, columns]", rows, self.codomain.paths)),
            tuple(matching("A[rows, columns]", columns, self.domain.paths)),
        )


def _as_factor(operator: Operator) -> str:
    return f"({operator.name})" if isinstance(operator, Sum) else operator.name


def _prepared(operators: Sequence[Operator]) -> tuple[Operator, ...]:
    return tuple(operator.prepared() for operator in operators)


def _terms(operator: Operator) -> tuple[Operator, ...]:
    return operator.terms if isinstance(operator, Sum) else (operator,)


def _factors(operator: Operator) -> tuple[Operator, ...]:
    return operator.factors if isinstance(operator, Product) else (operator,)


@tree_class()
@dataclass(eq=False, repr=False)
class Identity(Operator):
    """The identity of a space."""

    space: Space

    name = "identity"
    symmetric = positive = True

    @property
    def domain(self) -> Space:
        return self.space

    codomain = domain

    def multiply(self, vectors: Leaves, *, adjoint: bool = False, count: int | None = None) -> Leaves:
        del adjoint, count
        return vectors


class Wrapping(Operator):
    """An operator that is like another one in all but a few things."""

    operand: Operator

    @property
    def parts(self) -> Sequence[Operator]:
        return (self.operand,)

    def prepared(self) -> Self:
        return replace(self, operand=self.operand.prepared())  # type: ignore[type-var]

    @property
    def domain(self) -> Space:
        return self.operand.domain

    @property
    def codomain(self) -> Space:
        return self.operand.codomain

    @property
    def symmetric(self) -> bool:
        return self.operand.symmetric

    @property
    def positive(self) -> bool:
        return self.operand.positive

    @property
    def cost(self) -> float:
        return self.operand.cost

    def multiply(self, vectors: Leaves, *, adjoint: bool = False, count: int | None = None) -> Leaves:
        return self.operand.multiply(vectors, adjoint=adjoint, count=count)


@tree_class("operand")
@dataclass(eq=False, repr=False)
class Adjoint(Wrapping):
    """The conjugate transpose of an operator."""

    operand: Operator

    @property
    def name(self) -> str:
        return f"({self.operand.name}).H"

    @property
    def domain(self) -> Space:
        return self.operand.codomain

    @property
    def codomain(self) -> Space:
        return self.operand.domain

    @property
    def H(self) -> Operator:  # noqa: N802
        return self.operand

    def multiply(self, vectors: Leaves, *, adjoint: bool = False, count: int | None = None) -> Leaves:
        return self.operand.multiply(vectors, adjoint=not adjoint, count=count)


@tree_class("operand")
@dataclass(eq=False, repr=False)
class Conjugate(Wrapping):
    """The complex conjugate of an operator: with the adjoint it makes the transpose."""

    operand: Operator

    @property
    def name(self) -> str:
        return f"({self.operand.name}).conj()"

    def conj(self) -> Operator:
        return self.operand

    def multiply(self, vectors: Leaves, *, adjoint: bool = False, count: int | None = None) -> Leaves:
        return conjugated(self.operand.multiply(conjugated(vectors), adjoint=adjoint, count=count))


@tree_class("factor", "operand")
@dataclass(eq=False, repr=False)
class Scaled(Wrapping):
    """A number times an operator."""

    factor: Any
    operand: Operator

    @property
    def name(self) -> str:
        return f"{'c' if isinstance(self.factor, Tensor) else self.factor} * {_as_factor(self.operand)}"

    @property
    def symmetric(self) -> bool:
        return self.operand.symmetric and not is_complex(self.factor)

    @property
    def positive(self) -> bool:
        return self.operand.positive and is_at_least_zero(self.factor)

    def multiply(self, vectors: Leaves, *, adjoint: bool = False, count: int | None = None) -> Leaves:
        factor = self.factor
        if adjoint and is_complex(factor):
            factor = factor.conj() if isinstance(factor, Tensor) else factor.conjugate()
        # A tensor of shape () that is of another kind of number would raise a leaf's dtype.
        return [
            None if leaf is None else (leaf * factor).to(leaf.dtype)
            for leaf in self.operand.multiply(vectors, adjoint=adjoint, count=count)
        ]


@tree_class("terms")
@dataclass(eq=False, repr=False)
class Sum(Operator):
    """A sum of operators between the same spaces."""

    terms: tuple[Operator, ...]

    @property
    def parts(self) -> Sequence[Operator]:
        return self.terms

    def prepared(self) -> Sum:
        return Sum(_prepared(self.terms))

    @property
    def name(self) -> str:
        return " + ".join(term.name for term in self.terms)

    @property
    def domain(self) -> Space:
        return self.terms[0].domain

    @property
    def codomain(self) -> Space:
        return self.terms[0].codomain

    @property
    def symmetric(self) -> bool:
        return all(term.symmetric for term in self.terms)

    @property
    def positive(self) -> bool:
        return all(term.positive for term in self.terms)

    @property
    def cost(self) -> float:
        return sum(term.cost for term in self.terms)

    def multiply(self, vectors: Leaves, *, adjoint: bool = False, count: int | None = None) -> Leaves:
        return added([term.multiply(vectors, adjoint=adjoint, count=count) for term in self.terms])


@tree_class("factors")
@dataclass(eq=False, repr=False)
class Product(Operator):
    """A product of operators, the last of which is applied first."""

    factors: tuple[Operator, ...]
    # Whether it is symmetric, and positive. That is seen by which factors are one object, and remembered.
    known: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if not self.known:
            middle = _middle(self.factors)
            self.known = (False, False) if middle is None else (middle.symmetric, middle.positive)

    @property
    def parts(self) -> Sequence[Operator]:
        return self.factors

    def prepared(self) -> Product:
        return Product(_prepared(self.factors), self.known)

    @property
    def name(self) -> str:
        return " @ ".join(map(_as_factor, self.factors))

    @property
    def domain(self) -> Space:
        return self.factors[-1].domain

    @property
    def codomain(self) -> Space:
        return self.factors[0].codomain

    @property
    def symmetric(self) -> bool:
        return self.known[0]

    @property
    def positive(self) -> bool:
        return self.known[1]

    @property
    def cost(self) -> float:
        return sum(factor.cost for factor in self.factors)

    def multiply(self, vectors: Leaves, *, adjoint: bool = False, count: int | None = None) -> Leaves:
        for factor in self.factors if adjoint else reversed(self.factors):
            vectors = factor.multiply(vectors, adjoint=adjoint, count=count)
        return vectors


def _middle(factors: tuple[Operator, ...]) -> Operator | None:
    """M of a product B.H @ M @ B, the identity where it is B.H @ B, None where it is neither."""
    domain = factors[-1].domain
    while len(factors) > 1 and _are_adjoint(factors[0], factors[-1]):
        factors = factors[1:-1]
    if not factors:
        return Identity(domain)
    return factors[0] if len(factors) == 1 else None


def _are_adjoint(one: Operator, other: Operator) -> bool:
    if isinstance(one, Adjoint):
        return one.operand is other
    if isinstance(other, Adjoint):
        return other.operand is one
    return one is other and one.symmetric


@tree_class("operand")
@dataclass(eq=False, repr=False)
class Block(Wrapping):
    """The block of some leaves of the codomain and some of the domain."""

    operand: Operator
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"block of {self.operand.name}"

    @lazy
    def domain(self) -> Space:
        return self.operand.domain.part(self.columns)

    @lazy
    def codomain(self) -> Space:
        return self.operand.codomain.part(self.rows)

    @property
    def symmetric(self) -> bool:
        return self.operand.symmetric and self.rows == self.columns

    @property
    def positive(self) -> bool:
        return self.operand.positive and self.rows == self.columns

    def multiply(self, vectors: Leaves, *, adjoint: bool = False, count: int | None = None) -> Leaves:
        given, taken = (self.rows, self.columns) if adjoint else (self.columns, self.rows)
        whole = self.operand.codomain if adjoint else self.operand.domain
        full = spread(vectors, given, len(whole.leaves))
        image = self.operand.multiply(full, adjoint=adjoint, count=count)
        return [image[i] for i in taken]
