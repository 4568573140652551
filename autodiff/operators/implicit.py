"""Solutions of equations, differentiated by the implicit function theorem.

Provides `solved`, for linear equations, and `solution`, for any: what finds a solution is never differentiated itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from autodiff import _torch, checks
from autodiff.core import trees
from autodiff.core.call import is_differentiable, refilled, spread
from autodiff.core.closures import CapturedTensors, ReplacedTensors
from autodiff.core.forward import push
from autodiff.core.reverse import rerecord
from autodiff.core.rules import Rules, attach, is_tracked
from autodiff.operators.operator import Operator

if TYPE_CHECKING:
    from autodiff.core.call import Lift

# From A and b, [n] or [n, k], which are constants and without grad mode, to x of the shape of b: A x = b.
Solver: TypeAlias = Callable[[Operator, Tensor], Tensor]


class Equation(ABC):
    """An equation F(t, x) = b for x, where t are the ``tensors`` that F depends on, and b and x are flat."""

    name: str
    tensors: Sequence[Tensor]

    @abstractmethod
    def image(self, tensors: Sequence[Tensor], x: Tensor) -> Tensor:
        """F(t, x), of the shape of b."""

    @abstractmethod
    def derivative(self, tensors: Sequence[Tensor], x: Tensor) -> Operator:
        """F's derivative in x, which depends on the tensors and on x. It is square."""


class LinearEquation(Equation):
    """A x = b, where t are the tensors that A was made of."""

    def __init__(self, A: Operator, name: str) -> None:
        self.name = name
        self._leaves, self._spec = trees.flatten(A)
        self._where = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.tensors = [self._leaves[i] for i in self._where]

    def at(self, tensors: Sequence[Tensor]) -> Operator:
        """A, made of other tensors."""
        leaves = refilled(self._leaves, self._where, tensors, None)
        A: Operator = trees.unflatten(self._spec, leaves)
        return A.prepared()

    def image(self, tensors: Sequence[Tensor], x: Tensor) -> Tensor:
        return product(self.at(tensors), x)

    def derivative(self, tensors: Sequence[Tensor], x: Tensor) -> Operator:
        del x
        return self.at(tensors)


def product(A: Operator, x: Tensor) -> Tensor:
    """A x for one vector ``[n]``, or for the columns of ``[n, k]``."""
    return A.matvec(x) if x.dim() == 1 else A.matmat(x)


def solved(A: Operator, b: Tensor, solver: Solver, *, name: str = "operators.solve") -> Tensor:
    r"""The solution x of A x = b that a solver finds, differentiated in b and in the tensors that A was made of.

    .. math::

        \dot x = A^{-1} (\dot b - \dot A x), \qquad
        \bar b = A^{-\mathsf H} \bar x, \quad \bar A = -\bar b\, x^{\mathsf H}

    A derivative takes one solution with A, or with its conjugate transpose, by the same solver, and is differentiable
    in turn. Tensors that A's functions capture are found, and differentiated as well.

    Args:
        A: a square operator, prepared.
        b: ``[n]`` or ``[n, k]``, of A's dtype.
        solver: from a prepared operator and a right-hand side to the solution. Both are constants; it runs without
            grad mode, and inside the ``vmap`` that is active.
        name: the public function, for errors.

    Returns:
        A tensor like ``b``.

    Raises:
        CaptureError: A's functions capture a differentiated tensor, and hand it to a transform of their own.
    """
    equation = LinearEquation(A, name)
    if any(map(is_tracked, (*equation.tensors, b))):
        at = equation.at([tensor.detach() for tensor in equation.tensors])
    else:
        at = A
    with torch.no_grad():
        x = solver(at, b.detach()).detach()
    # One product tells whether A's functions capture tensors that are differentiated.
    found = captured(equation, lambda: product(at, x), x)
    return attached(equation, x, b, found, solver)


def captured(equation: Equation, image: Callable[[], Tensor], x: Tensor) -> CapturedTensors | None:
    """The tensors that F captures, where these are differentiated, or belong to a transform that is active.

    ``image`` is F at constants. Inside transforms it is not asked for: the tensors are looked for in any case.
    """
    if _torch.is_eager() and not (torch.is_grad_enabled() and is_tracked(image())):
        return None
    constants = [tensor.detach() for tensor in equation.tensors]
    found = CapturedTensors([*constants, x])
    # Eagerly at a level of its own, so that what F differentiates inside is not taken for captured.
    level: AbstractContextManager[Any] = _torch.grad_level() if _torch.is_eager() else nullcontext()

    def look() -> bool:
        with level, found:
            return is_tracked(equation.image(constants, x))

    try:
        tracked = _torch.under_guard(look)
    except RuntimeError as error:
        if not _torch.says(error, "a level cannot run it"):
            raise
        checks.raise_captured_inside(equation.name, error)
    if tracked:
        checks.raise_captured_inside(equation.name)
    return found if found.tensors else None


def attached(
    equation: Equation, x: Tensor, b: Tensor, found: CapturedTensors | None, solver: Solver
) -> Tensor:
    """The value x of a solution, differentiated by the rules of its equation."""
    shown = [] if found is None else found.shown
    saved = [*equation.tensors, *shown, b, x]
    if not any(map(is_tracked, saved)):
        return x
    tracked = set() if found is None else found.tracked
    rules = ImplicitRules(equation, solver, [] if found is None else found.tensors, tracked)
    (result,) = attach(rules, [x], saved)
    tied: Tensor = result
    return tied


@dataclass(frozen=True, eq=False)
class ImplicitRules(Rules):
    """The rules of a solution. Saved are the equation's tensors, those that F captures, b, and the value of x."""

    equation: Equation
    solver: Solver
    captured: Sequence[Tensor]
    tracked: set[int]

    def pull(
        self, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        (cotangent,) = cotangents
        if cotangent is None:
            return [None] * len(saved)
        *tensors, _, _ = saved
        with self._with_captured(tensors):
            x, A = self._at(saved)
            b_bar = self.solve(A.H, cotangent)
        picked = [*wanted[: len(tensors)], False]
        if not any(map(_is_picked, (*tensors, x), picked)):
            return [*[None] * len(tensors), b_bar, None]
        tape, where = rerecord(self._image, [*tensors, x], picked)
        pulled = spread(tape.pull([-b_bar]), where, len(tensors))
        return [*pulled, b_bar, None]

    def push(self, saved: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        *tensors, _, _ = saved
        *of_tensors, right, _ = tangents
        with self._with_captured(tensors):
            x, A = self._at(saved)
            where = [i for i, tangent in enumerate(of_tensors) if tangent is not None]
            if where:
                moved = self._pushed(tensors, x, where, [one for one in of_tensors if one is not None])
                if moved is not None:
                    right = -moved if right is None else right - moved
            if right is None:
                return [None]
            return [self.solve(A, right)]

    def solve(self, A: Operator, right: Tensor) -> Tensor:
        """The solution for F's derivative A, or for its adjoint."""
        return solved(A, right, self.solver, name=self.equation.name)

    def _at(self, saved: Sequence[Tensor]) -> tuple[Tensor, Operator]:
        """The solution as it depends on what is saved, and F's derivative there."""
        *tensors, _, value = saved
        (x,) = attach(self, [value], saved) if any(map(is_tracked, saved)) else (value,)
        return x, self.equation.derivative(self._own(tensors), x)

    def _own(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors[: len(tensors) - len(self.captured)]

    def _image(self, tensors_and_x: Sequence[Tensor]) -> list[Any]:
        *tensors, x = tensors_and_x
        with self._with_captured(tensors) as unused:
            image = self.equation.image(self._own(tensors), x)
        if not unused.isdisjoint(self.tracked):
            # A transform inside was handed the captured tensor itself.
            checks.raise_captured_inside(self.equation.name)
        return [image]

    def _pushed(
        self, tensors: Sequence[Tensor], x: Tensor, where: Sequence[int], vectors: Sequence[Tensor]
    ) -> Tensor | None:
        def func(primals: Sequence[Tensor], lift: Lift | None) -> tuple[list[Any], list[Any]]:
            return self._image(refilled([*tensors, x], where, primals, lift)), []

        return push(func, [tensors[i] for i in where], vectors).tangents[0]

    @contextmanager
    def _with_captured(self, tensors: Sequence[Tensor]) -> Iterator[set[int]]:
        """Where F finds the tensors that are saved in place of those that it captured; which it has not used."""
        if not self.captured:
            yield set()
            return
        replaced = ReplacedTensors(self.captured, tensors[len(tensors) - len(self.captured) :])
        try:
            with replaced:
                yield replaced.unused
        except RuntimeError as error:
            # A transform inside was handed the captured tensor itself, whose level is gone.
            if _torch.says(error, "a level that is gone"):
                checks.raise_captured_inside(self.equation.name, error)
            raise


def _is_picked(tensor: Tensor, wanted: bool) -> bool:
    return wanted and is_differentiable(tensor)
