"""Operators that are given: a diagonal, a matrix, or a function that multiplies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from autodiff import checks
from autodiff._torch import compiling, fully_unwrapped, functorch_active
from autodiff.core import trees
from autodiff.core.call import is_differentiable
from autodiff.core.chunks import Sizes
from autodiff.core.seeds import generic_vector
from autodiff.core.transpose import LinearityCheck, transposed
from autodiff.operators.elementary import Elementary
from autodiff.operators.lazy import keeping, kept_outside_transforms, lazy
from autodiff.operators.linear_map import tree_class
from autodiff.operators.operator import Identity, Operator
from autodiff.operators.space import Leaves, Space

if TYPE_CHECKING:
    from collections.abc import Sequence


def identity_like(A: Operator) -> Operator:
    """The identity of the space that a square operator maps to itself.

    >>> import torch
    >>> from autodiff import operators
    >>> A = operators.from_matrix(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    >>> (A - operators.identity_like(A)).to_matrix()
    tensor([[1., 1.],
            [1., 1.]])

    Args:
        A: an operator from a space to itself.

    Returns:
        The identity operator of that space.

    Raises:
        ShapeError: the operator's domain and codomain differ.
    """
    checks.square_operator("operators.identity_like", A.name, A.domain, A.codomain)
    return Identity(A.domain)


def diagonal(d: Any) -> Operator:
    """The diagonal operator of a tree: each number is multiplied by its own.

    >>> import torch
    >>> from autodiff import operators
    >>> operators.diagonal(torch.tensor([1.0, 2.0])).to_matrix()
    tensor([[1., 0.],
            [0., 2.]])

    Args:
        d: a tree with at least one floating or complex tensor.

    Raises:
        LeafError: the tree holds no floating or complex tensor.
    """
    operator = Diagonal(d)
    operator.domain  # noqa: B018  raises where there is none
    return operator


@tree_class("tree")
@dataclass(eq=False, repr=False)
class Diagonal(Operator):
    """Numbers that multiply a vector one by one."""

    tree: Any

    name = "diagonal"

    @lazy
    def domain(self) -> Space:
        return Space.of(self.tree, "operators.diagonal", "diagonal")

    @property
    def codomain(self) -> Space:
        return self.domain

    @lazy
    def _leaves(self) -> list[Tensor]:
        leaves = trees.leaves(self.tree)
        return [leaves[i] for i in self.domain.positions]

    @property
    def symmetric(self) -> bool:
        return not self.dtype.is_complex

    def multiply(self, vectors: Leaves, *, adjoint: bool = False, count: int | None = None) -> Leaves:
        del count
        return [
            None if vector is None else vector * (leaf.conj() if adjoint else leaf)
            for vector, leaf in zip(vectors, self._leaves, strict=True)
        ]


def from_matrix(M: Tensor, structure: Any = None, codomain: Any = None) -> Operator:
    """A matrix as an operator between trees.

    >>> import torch
    >>> from autodiff import operators
    >>> A = operators.from_matrix(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), {"x": torch.zeros(()), "y": torch.zeros(1)})
    >>> A @ {"x": torch.tensor(1.0), "y": torch.tensor([2.0])}
    {'x': tensor(4.), 'y': tensor([6.])}

    Args:
        M: a tensor of shape ``[m, n]``, floating or complex. It is used as it is, not copied.
        structure: a tree like the vectors that the matrix multiplies, with n numbers in its floating and complex
            leaves; None for vectors ``[n]``.
        codomain: a tree like the products, with m numbers; None for one like ``structure``, or ``[m]`` where the
            matrix is not square.

    Raises:
        DtypeError: some of them are real, and others complex.
        ShapeError: M is not a matrix, or does not have a row and a column for each number of the trees.
    """
    if not is_differentiable(M):
        came = f"dtype {M.dtype}" if isinstance(M, Tensor) else f"type {type(M).__name__}"
        checks.raise_not_a_matrix("operators.from_matrix", "M", came)
    if M.dim() != 2:
        checks.raise_not_a_matrix("operators.from_matrix", "M", f"shape {tuple(M.shape)}")
    rows, columns = M.shape
    start = Space.of(
        M.new_zeros(columns) if structure is None else structure, "operators.from_matrix", "structure"
    )
    if codomain is None:
        codomain = structure if structure is not None and rows == columns else M.new_zeros(rows)
    end = Space.of(codomain, "operators.from_matrix", "codomain")
    expected = (end.size, start.size)
    checks.shape(
        "operators.from_matrix",
        "M",
        M,
        expected,
        "a row for each number of the product, a column for each of the vector",
    )
    checks.real_or_complex(
        "operators.from_matrix", "M, structure and codomain", (M, *start.leaves, *end.leaves)
    )
    return Matrix(M, start, end)


@tree_class("matrix")
@dataclass(eq=False, repr=False)
class Matrix(Operator):
    """A matrix that is given."""

    matrix: Tensor
    space: Space
    image: Space

    name = "matrix"

    @property
    def domain(self) -> Space:
        return self.space

    @property
    def codomain(self) -> Space:
        return self.image

    def multiply(self, vectors: Leaves, *, adjoint: bool = False, count: int | None = None) -> Leaves:
        matrix, start, end = self.matrix, self.space, self.image
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.promote_types(start.dtype, end.dtype)))
        if adjoint:
            matrix, start, end = matrix.mH, end, start
        if count is None:
            return end.split(matrix @ start.joined(vectors).to(matrix.dtype))
        return end.split_columns(matrix @ start.joined_columns(vectors, count).to(matrix.dtype))


def from_matvec(
    matvec: Callable[[Any], Any],
    domain: Any,
    codomain: Any = None,
    *,
    rmatvec: Callable[[Any], Any] | None = None,
    symmetric: bool = False,
    positive: bool = False,
    batched: bool = False,
    check: bool = True,
) -> Operator:
    """A function that multiplies as an operator.

    It is multiplied by four vectors at once, to see whether it is linear, and symmetric where it is said to be.

    >>> import torch
    >>> from autodiff import operators
    >>> difference = operators.from_matvec(lambda v: v[1:] - v[:-1], torch.zeros(3), torch.zeros(2))
    >>> difference.to_matrix()
    tensor([[-1.,  1.,  0.],
            [ 0., -1.,  1.]])

    Args:
        matvec: a linear function of a tree like ``domain`` that returns one like ``codomain``.
        domain: a tree like the vectors; its numbers do not matter.
        codomain: a tree like the products; None for one like ``domain``.
        rmatvec: the product of the conjugate transpose, from a tree like ``codomain`` to one like ``domain``. None
            differentiates ``matvec``, whose operations torch then has to know.
        symmetric: promise that the operator is its own conjugate transpose.
        positive: promise that it is symmetric and positive semidefinite.
        batched: multiply several vectors by ``vmap`` of the function, instead of one after the other.
        check: whether to see if the promises hold for two vectors.

    Raises:
        RuleError: the function is not linear, or the operator not what it is promised to be.
        StructureError, ShapeError, DtypeError: domain and codomain do not go together, or
            ``matvec`` or ``rmatvec`` returns something else than it should.
    """
    start = Space.of(domain, "operators.from_matvec", "domain")
    end = start if codomain is None else Space.of(codomain, "operators.from_matvec", "codomain")
    checks.real_or_complex("operators.from_matvec", "domain and codomain", (*start.leaves, *end.leaves))
    if symmetric or positive:
        checks.square_operator("operators.from_matvec", checks.shown_function(matvec), start, end)
    operator = Function(matvec, rmatvec, start, end, symmetric or positive, positive, batched)
    if check and not compiling():
        _check_promises(operator)
    return operator


@tree_class()
@dataclass(eq=False, repr=False)
class Function(Elementary):
    """A function that multiplies."""

    function: Callable[[Any], Any]
    adjoint_function: Callable[[Any], Any] | None
    space: Space
    image: Space
    is_symmetric: bool
    is_positive: bool
    batched: bool

    @property
    def name(self) -> str:
        return checks.shown_function(self.function)

    @property
    def domain(self) -> Space:
        return self.space

    @property
    def codomain(self) -> Space:
        return self.image

    @property
    def symmetric(self) -> bool:
        return self.is_symmetric

    @property
    def positive(self) -> bool:
        return self.is_positive

    def at_once(self) -> Sizes:
        return Sizes(None if self.batched else 1)

    def product(self, *, adjoint: bool) -> Callable[[Leaves], Leaves]:
        if not adjoint or self.is_symmetric:
            return partial(_called, self.function, self.space, self.image, "matvec(v)")
        if self.adjoint_function is not None:
            return partial(_called, self.adjoint_function, self.image, self.space, "rmatvec(v)")
        return kept_outside_transforms(self, "_transpose", self._transposed)

    def prepared(self) -> Self:
        known = self.is_symmetric or self.adjoint_function is not None
        # Outside of transforms the transpose is kept once it is asked for, which it need not be: torch may not know it.
        if known or not (compiling() or functorch_active()):
            return self
        return keeping(self, "_transpose", self.product(adjoint=True))

    def _transposed(self) -> Callable[[Leaves], Leaves]:
        product, leaves = self.product(adjoint=False), self.space.leaves
        if compiling():
            return transposed(product, [spec.full(1.0) for spec in leaves])
        # Not the operator, which keeps this.
        refuse = partial(checks.raise_not_linear, "operators.from_matvec", self.name)
        return transposed(
            product, [generic_vector(one) for one in leaves], LinearityCheck(refuse, unless_shown=True)
        )


def _called(
    func: Callable[[Any], Any], start: Space, end: Space, path: str, vector: Leaves
) -> Sequence[Tensor | None]:
    product = func(start.tree(start.dense(vector)))
    return end.read("operators.from_matvec", product, path, only_trees=True).leaves


def _check_promises(operator: Function) -> None:
    """Compare products with vectors that have nothing to do with the function, a small, a large and the zero vector."""
    space, image = operator.space, operator.image
    u = [generic_vector(spec) for spec in space.leaves]
    v = [generic_vector(spec, elsewhere=True) for spec in space.leaves]
    # What sums of random signs differ by, in iterations that are not converged to the last digit.
    tolerance = 4 * torch.finfo(operator.dtype).eps ** (1 / 3)

    def inner(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return torch.vdot(one, other), tolerance * one.norm() * other.norm()

    with torch.no_grad():
        u_flat, v_flat = space.joined(u), space.joined(v)
        Au, Av = image.joined(operator.multiply(u)), image.joined(operator.multiply(v))
        # Over the complex numbers where the vectors are. It is the large vector that is multiplied: what is not linear
        # would cancel but for a part as small as u. And by a negative number, in which |v| and relu(v) are not linear.
        factor = 2j if space.dtype.is_complex else -2
        Aw = image.joined(operator.multiply([a + factor * b for a, b in zip(u, v, strict=True)]))
        constant = image.joined(operator.multiply([None] * len(u)))
        differs = _exceeds((Au + factor * Av - Aw).norm(), tolerance * (Au.norm() + Av.norm() + Aw.norm()))
        if differs or _exceeds(constant.norm(), tolerance * Au.norm()):
            checks.raise_not_linear("operators.from_matvec", operator.name)
        if operator.is_symmetric:
            (one, bound), (other, _) = inner(v_flat, Au), inner(Av, u_flat)
            if _exceeds((one - other).abs(), bound + tolerance * Av.norm() * u_flat.norm()):
                checks.raise_not_symmetric("operators.from_matvec", operator.name)
        elif operator.adjoint_function is not None:
            y = [generic_vector(spec, elsewhere=True) for spec in image.leaves]
            y_flat, back = image.joined(y), space.joined(operator.multiply(y, adjoint=True))
            (one, bound), (other, _) = inner(y_flat, Au), inner(back, u_flat)
            if _exceeds((one - other).abs(), bound + tolerance * back.norm() * u_flat.norm()):
                checks.raise_not_adjoint("operators.from_matvec", operator.name)
        if operator.is_positive:
            value, bound = inner(v_flat, Av)
            if _exceeds(-value.real, bound):
                checks.raise_not_positive("operators.from_matvec", operator.name)


def _exceeds(value: Tensor, bound: Tensor) -> bool:
    return bool(fully_unwrapped(value > bound).any())
