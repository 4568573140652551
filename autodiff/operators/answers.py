"""Answers of a user's solver, tied to what it was asked about by the condition that holds at an answer.

Provides the conditions, and `differentiable`, which makes a solver differentiable by one. Builds on `implicit`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from autodiff import _torch, checks
from autodiff._torch import MESSAGES
from autodiff.core import trees
from autodiff.core.call import parameter_names, refilled, wraps
from autodiff.core.captures import reaches_wrapper
from autodiff.core.closures import unseen
from autodiff.core.rules import inplace_counts, is_tracked
from autodiff.operators.implicit import Equation, Solver, attached, captured
from autodiff.operators.lazy import lazy
from autodiff.operators.linear_solver import LinearSolver, Method
from autodiff.operators.makers import hessian, jacobian
from autodiff.operators.operator import Operator
from autodiff.operators.refinement import Tolerance
from autodiff.operators.space import Space
from autodiff.transforms.grad import grad
from autodiff.types import P, R

# The residual of an answer is at most such a part of what it is made of. A heuristic: SciPy's solvers stop at 1e-5 and
# below, and a derivative then has errors of that size.
_TOLERANCE = 1e-4
# A matrix with at most so many rows is made and factorised: exact, for the time of as many products in batches.
_DENSE = 256


class Condition(ABC):
    """A function of x and of other arguments, by which an answer x is known: a residual of it is zero there."""

    name: ClassVar[str]
    # What is zero, and its derivative, for messages.
    zero: ClassVar[str]
    matrix: ClassVar[str]
    # What solves systems with the derivative where it is large.
    method: ClassVar[Method] = "gmres"

    def __init__(self, func: Callable[..., Any]) -> None:
        self.func = func

    @abstractmethod
    def residual(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """What is zero at the answer, a tree like x."""

    def derivative(self, space: Space, x: Any, *args: Any, **kwargs: Any) -> Operator:
        """The residual's derivative in x."""
        return jacobian(self.residual, holomorphic=space.dtype.is_complex)(x, *args, **kwargs)

    def at(self, x: Any, *args: Any, **kwargs: Any) -> tuple[list[Any], list[Any], Space]:
        """The leaves of x, those of the function's value there, and the space of both."""
        space = Space.of(x, self.name, "x")
        value = checks.like_start(self.name, f"{self.shown}(x)", self.func(x, *args, **kwargs), space, "x")
        return trees.leaves(x), value, space

    @property
    def shown(self) -> str:
        """The function's name."""
        return checks.shown_function(self.func)

    @lazy
    def _keywords(self) -> frozenset[str] | None:
        """The keywords that the function takes; None where it may take any."""
        try:
            parameters = inspect.signature(self.func).parameters.values()
        except (TypeError, ValueError):
            return None
        if any(one.kind is one.VAR_KEYWORD for one in parameters):
            return None
        return frozenset(one.name for one in parameters if one.kind is not one.POSITIONAL_ONLY)

    def takes(self, keyword: str) -> bool:
        """Whether the function takes a keyword argument of the solver."""
        return self._keywords is None or keyword in self._keywords


class ZeroResidual(Condition):
    """A function of x that is zero."""

    name = "operators.root"
    zero = "the residual"
    matrix = "the Jacobian of the residual in x"

    def residual(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        _, value, space = self.at(x, *args, **kwargs)
        return space.tree([value[i] for i in space.positions])


class FixedPoint(Condition):
    """A function that maps x to itself."""

    name = "operators.fixed_point"
    zero = "x - map(x)"
    matrix = "the Jacobian of x - map(x)"

    def residual(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        leaves, value, space = self.at(x, *args, **kwargs)
        return space.tree([leaves[i] - value[i] for i in space.positions])


class Minimum(Condition):
    """A scalar function that is minimal at x: its gradient is zero."""

    name = "operators.minimum"
    zero = "the gradient"
    matrix = "the Hessian of the objective"
    method = "minres"

    def residual(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return grad(self._objective)(x, *args, **kwargs)

    def derivative(self, space: Space, x: Any, *args: Any, **kwargs: Any) -> Operator:
        checks.real_minimum(self.name, space)
        return hessian(self._objective)(x, *args, **kwargs)

    def _objective(self, x: Any, *args: Any, **kwargs: Any) -> Tensor:
        leaves, spec = trees.flatten(self.func(x, *args, **kwargs))
        checks.scalar_output(self.name, spec, leaves)
        value: Tensor = leaves[0]
        return value


class _ConditionAt(Equation):
    """A condition as an equation: t are all tensors among the arguments, and b is zero."""

    def __init__(self, condition: Condition, x: Any, space: Space, given: tuple[Any, Any]) -> None:
        self.name, self._condition, self.space = condition.name, condition, space
        self._x_leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in trees.leaves(x)]
        self._leaves, self._spec = trees.flatten(given)
        self._where = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.tensors = [self._leaves[i] for i in self._where]
        # The rules get them from what was saved.
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]

    def tree(self, x: Tensor) -> Any:
        """The tree of x, with the leaves that are not differentiated as the solver gave them."""
        split = self.space.split(x)
        return trees.unflatten(self.space.spec, refilled(self._x_leaves, self.space.positions, split, None))

    def _given(self, tensors: Sequence[Tensor]) -> tuple[Any, Any]:
        args, kwargs = trees.unflatten(self._spec, refilled(self._leaves, self._where, tensors, None))
        return args, kwargs

    def image(self, tensors: Sequence[Tensor], x: Tensor) -> Tensor:
        args, kwargs = self._given(tensors)
        leaves = trees.leaves(self._condition.residual(self.tree(x), *args, **kwargs))
        return self.space.joined([leaves[i] for i in self.space.positions])

    def derivative(self, tensors: Sequence[Tensor], x: Tensor) -> Operator:
        args, kwargs = self._given(tensors)
        return self._condition.derivative(self.space, self.tree(x), *args, **kwargs)


@dataclass(frozen=True, eq=False)
class DifferentiableSolver:
    """A user's solver, whose answers are known by a condition."""

    solver: Callable[..., Any]
    condition: Condition
    solve: Solver
    has_aux: bool
    check: bool

    @property
    def name(self) -> str:
        """The public name, for messages."""
        return self.condition.name

    @property
    def shown(self) -> str:
        """The solver's name."""
        return checks.shown_function(self.solver)

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The solver's answer, tied to its arguments."""
        checks.untraced_iteration(self.name)
        start, given = self._split(args, kwargs)
        x, aux = _torch.under_guard(self._solved, start, args, kwargs)
        space = Space.of(start, self.name, "start")
        leaves = checks.like_start(self.name, f"{self.shown}(start, ...)", x, space, "start")
        equation = _ConditionAt(self.condition, trees.unflatten(space.spec, leaves), space, given)
        value = space.joined([leaves[i].detach() for i in space.positions])
        result = equation.tree(self._tied(equation, start, value))
        return (result, aux) if self.has_aux else result

    def _split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, Any]]:
        """The start, and what the condition's function is given besides x."""
        if args:
            start, rest, named = args[0], args[1:], kwargs
        else:
            first = next(iter(parameter_names(self.solver)), "start")
            start, rest = kwargs.get(first), ()
            named = {key: value for key, value in kwargs.items() if key != first}
        taken = {key: value for key, value in named.items() if self.condition.takes(key)}
        for key in named.keys() - taken.keys():
            if any(isinstance(leaf, Tensor) and is_tracked(leaf) for leaf in trees.leaves(named[key])):
                checks.raise_unused_keyword(self.name, key, self.shown, self.condition.shown)
        return start, (rest, taken)

    def _solved(self, start: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """What the solver returns for constants: the answer, and aux.

        Outside of all transforms, if no batch hides among them, and the solver reaches nothing that belongs to one: it
        may be SciPy's. It may write into its start.
        """
        leaves, spec = trees.flatten((args, kwargs))
        starts = set(map(id, trees.leaves(start)))
        batched = bool(_torch.batch_levels([leaf for leaf in leaves if isinstance(leaf, Tensor)]))
        outside = not (batched or _torch.is_eager() or reaches_wrapper(self.solver))

        def constant(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            plain = (_torch.fully_unwrapped(leaf) if outside else leaf).detach()
            return plain.clone() if id(leaf) in starts else plain

        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if outside:
                stack.enter_context(_torch.OutsideTransforms())
                stack.enter_context(unseen())
            constants = list(map(constant, leaves))
            kept = [one for one, leaf in zip(constants, leaves, strict=True) if id(leaf) not in starts]
            versions = inplace_counts(kept)
            given, named = trees.unflatten(spec, constants)
            result = self._run(given, named, _LOOP if batched else _ARGUMENT)
        if inplace_counts(kept) != versions:
            checks.raise_solver_wrote(self.name, self.shown)
        if not self.has_aux:
            return result, None
        checks.aux_pair(self.name, result)
        leaves, spec = trees.flatten(result[1])
        return result[0], trees.unflatten(
            spec, [one.detach() if isinstance(one, Tensor) else one for one in leaves]
        )

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], way_out: str) -> Any:
        try:
            return self.solver(*args, **kwargs)
        except RuntimeError as error:
            phrases = (*MESSAGES["cannot be batched"], *MESSAGES["a level that is gone"])
            checks.advise(self.name, error, phrases, way_out)
            raise

    def _tied(self, equation: _ConditionAt, start: Any, x: Tensor) -> Tensor:
        """The value x, differentiated by the rules of its equation where anything that it depends on is tracked."""
        constants = [tensor.detach() for tensor in equation.tensors]
        image = cache(lambda: equation.image(constants, x))
        found = captured(equation, image, x)
        if found is None and not any(map(is_tracked, equation.tensors)):
            return x
        if self.check:
            with torch.no_grad():
                norm = torch.linalg.vector_norm(image().detach())
                scales = self._scales(equation, constants, start, x)
                tolerance = max(_TOLERANCE, 4 * torch.finfo(x.dtype).eps)
                checks.holds_at_answer(self.name, self.shown, self.condition.zero, norm, scales, tolerance)
        return attached(equation, x, torch.zeros_like(x), found, self.solve)

    def _scales(
        self, equation: _ConditionAt, constants: Sequence[Tensor], start: Any, x: Tensor
    ) -> Iterator[Tensor]:
        """What the residual is made of: its derivative times x, and what it was at the start."""
        yield torch.linalg.vector_norm(equation.derivative(constants, x).matvec(x))
        leaves = trees.leaves(start)
        begin = equation.space.joined([leaves[i].detach() for i in equation.space.positions])
        yield torch.linalg.vector_norm(equation.image(constants, begin))


_LOOP = (
    "the solver cannot be batched. Use autodiff.vmap(..., fallback='loop'), which runs it sample by sample."
)
_ARGUMENT = (
    "the solver captures a tensor of a transform around it. Pass it as an argument, which it gets unwrapped."
)


def differentiable(
    condition: Condition, solver: Callable[P, R], solve: Solver | None, has_aux: bool, check: bool
) -> Callable[P, R]:
    """The solver, whose answers are differentiated by their condition."""
    one = DifferentiableSolver(solver, condition, solve or partial(_solve, condition), has_aux, check)

    @wraps(solver)
    @_torch.traced_inline_only
    def answered(*args: P.args, **kwargs: P.kwargs) -> R:
        answer: R = one.answer(args, kwargs)
        return answer

    return answered


def _solve(condition: Condition, A: Operator, b: Tensor) -> Tensor:
    """The solution by a factorisation, or by iterations where the matrix is large."""
    return _solve_dense(condition, A, b) if len(b) <= _DENSE else _solve_iteratively(condition, A, b)


def _solve_iteratively(condition: Condition, A: Operator, b: Tensor) -> Tensor:
    checks.solver_dtypes(condition.name, [b.dtype])
    tolerance = Tolerance(torch.finfo(b.dtype).eps ** (2 / 3), 0.0)
    solver = LinearSolver(
        condition.name, condition.method, tolerance, None, None, 20, progress=False, check=False
    )
    solution = solver.find(A, b[:, None])
    solver.warn(solver.found[0], "in a derivative, ", stacklevel=2)
    return solution[:, 0]


def _solve_dense(condition: Condition, A: Operator, b: Tensor) -> Tensor:
    # torch has no factorisations in half precision.
    dtype = torch.promote_types(A.dtype, torch.float32)
    matrix, size = A.to_matrix().to(dtype), b.shape[0]
    if not size:
        return b
    # Rows of different units, as of a residual's parts, say nothing about whether there is an inverse.
    scale = matrix.abs().amax(1)
    matrix = matrix / scale[:, None]
    diagonal = torch.linalg.lu_factor_ex(matrix).LU.diagonal().abs()
    regular = diagonal.amin() > size * torch.finfo(dtype).eps * diagonal.amax()
    if not _torch.fully_unwrapped(regular).all():
        checks.raise_singular(condition.name, condition.matrix)
    # Not lu_solve, which torch 2.13 batches wrongly inside two vmaps of which one batches the matrix alone.
    solution: Tensor = torch.linalg.solve_ex(matrix, b.to(dtype) / scale).result
    return solution.to(b.dtype)
