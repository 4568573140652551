"""Jacobians and Hessians as operators: one evaluation of the function is kept, and each product pulls through it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from autodiff import checks
from autodiff._torch import MESSAGES, compiling
from autodiff.core.call import Call
from autodiff.core.chunks import Sizes
from autodiff.core.linearization import Linearization, gradient, linearize, linearize_derivative
from autodiff.core.reverse import conjugated
from autodiff.operators.elementary import Elementary
from autodiff.operators.lazy import keeping, kept_outside_transforms, lazy
from autodiff.operators.linear_map import tree_class
from autodiff.operators.space import Leaves, Space
from autodiff.operators.symmetry import acts_symmetric
from autodiff.operators.written import Arguments
from autodiff.types import Argnums, Wrt

if TYPE_CHECKING:
    from torch import Tensor

# So many vectors go through a graph in one batch that its largest cotangent takes this many bytes: a heuristic. Then
# what an operation costs in itself no longer counts, and a batch only costs the memory that it moves. 32 products with
# the Hessian of an MLP 784-512-512-10 with 256 samples take 1.2 x as long in batches of 8 as one by one, 1.4 x in one.
_ENOUGH_PER_OPERATION = 384 * 2**10


@dataclass(frozen=True)
class Options:
    """What a derivative is taken of, and how: the options of the transform that would form the matrix.

    ``caller`` is the public name in messages, where that is not the derivative's own.
    """

    func: Callable[..., Any]
    argnums: Argnums = 0
    has_aux: bool = False
    holomorphic: bool = False
    wrt: Wrt = None
    caller: str = ""

    def for_batch(self, number: int) -> Options:
        """The options for one batch of a data set."""
        del number
        return self


class Evaluation(NamedTuple):
    """A call of a function that was evaluated, or its gradient; and what pushes vectors, where no pull does."""

    call: Call
    linearization: Linearization
    arguments: Arguments
    push: Callable[[Leaves], Leaves] | None = None


class Derivative(Elementary):
    """A derivative of a function at the arguments of a call; it is evaluated once, when a product is first needed."""

    options: Options
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    kind: str

    @property
    def name(self) -> str:
        return f"{self.kind} of {checks.shown_function(self.options.func)}"

    def _new_call(self) -> Call:
        one = self.options
        name = one.caller or f"operators.{self.kind}"
        call = Call(name, one.func, self.args, self.kwargs, one.argnums, one.has_aux, one.wrt)
        if one.caller:  # which has no such option
            checks.real_tensors(name, call.primals, call.path_of_primal)
        else:
            checks.holomorphic_dtypes(name, call.primals, one.holomorphic, "inputs")
        return call

    @lazy
    def domain(self) -> Space:
        return Space.of_arguments(self._new_call())

    @property
    def evaluated(self) -> Evaluation:
        """The function, or its gradient, evaluated once."""
        return kept_outside_transforms(self, "_evaluation", lambda: self._evaluate(self._new_call()))

    @property
    def current(self) -> Evaluation:
        """The same, refused where an argument was written in place since."""
        evaluated = self.evaluated
        evaluated.arguments.refuse_written(self.name)
        return evaluated

    def prepared(self) -> Self:
        return keeping(self, "_evaluation", self.current)

    @property
    def linearized(self) -> Linearization:
        """What was recorded, for pulls."""
        return self.evaluated.linearization

    @abstractmethod
    def _evaluate(self, call: Call) -> Evaluation:
        """Run the function once."""

    def _arguments(self) -> Arguments:
        return Arguments(self.args, self.kwargs)

    @property
    def aux(self) -> Any:
        """The auxiliary output of the function, with ``has_aux``."""
        call, linearization, *_ = self.evaluated
        return call.aux(linearization.aux)

    def at_once(self) -> Sizes:
        if compiling():
            return Sizes(None)
        _, largest = self.linearized.bytes_of_a_pull()
        return self.linearized.batchable(Sizes(max(1, _ENOUGH_PER_OPERATION // max(largest, 1))))

    def advised(self, multiply: Callable[[Leaves], Leaves]) -> Callable[[Leaves], Leaves]:
        """``multiply``, whose errors say what to do where the graph that was kept is not what it was."""

        def product(vector: Leaves) -> Leaves:
            try:
                return multiply(vector)
            except RuntimeError as error:
                checks.advise(self.name, error, MESSAGES["a graph was freed"], _FREED)
                checks.advise(self.name, error, MESSAGES["a saved tensor was written"], _WRITTEN)
                raise

        return product


_FREED = (
    "the graph of the operator was freed by a backward pass outside of it. Make the operator anew, or pass "
    "retain_graph=True to that backward."
)
_WRITTEN = (
    "a tensor that the operator was made at was written in place since then, as by an optimizer. Make the operator "
    "anew, or at clones."
)


@tree_class("args", "kwargs")
@dataclass(eq=False, repr=False)
class JacobianOperator(Derivative):
    """The Jacobian of a function at a point."""

    options: Options
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    kind = "jacobian"

    def _evaluate(self, call: Call) -> Evaluation:
        linearized = linearize(call.evaluate, call.primals, higher_order=True, origin=call.func)
        checks.tensor_outputs(call.name, linearized.outputs, call.path_of_output)
        checks.holomorphic_dtypes(call.name, linearized.outputs, self.options.holomorphic, "outputs")
        return Evaluation(call, linearized, self._arguments(), linearized.jvp())

    @property
    def value(self) -> Any:
        """The output of the function."""
        call, linearization, *_ = self.evaluated
        return call.like_output(linearization.outputs)

    @lazy
    def codomain(self) -> Space:
        call, linearization, *_ = self.evaluated
        return Space.of_outputs(call, linearization.outputs)

    @property
    def cost(self) -> float:
        return 1.0

    def product(self, *, adjoint: bool) -> Callable[[Leaves], Leaves]:
        _, linearization, _, push = self.current
        assert push is not None
        return self.advised(linearization.vjp if adjoint else push)


@tree_class("args", "kwargs")
@dataclass(eq=False, repr=False)
class HessianOperator(Derivative):
    """The Hessian of a scalar function at a point."""

    options: Options
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    kind = "hessian"

    def _evaluate(self, call: Call) -> Evaluation:
        linearized = linearize_derivative(call, gradient(call, holomorphic=self.options.holomorphic))
        evaluation = Evaluation(call, linearized, self._arguments())
        if self.symmetric and linearized.has_custom_gradient():
            # What a backward of the user's gives need not be the gradient of anything.
            made = keeping(self, "_evaluation", evaluation)
            if not acts_symmetric(made):
                checks.raise_no_gradient(call.name, self.name)
        return evaluation

    @property
    def value(self) -> Tensor:
        """The value of the function, of shape ``()``."""
        return self.linearized.values[0]

    @property
    def gradient(self) -> Any:
        """The gradient, a tree like the domain."""
        return self.domain.tree(self.linearized.outputs)

    @property
    def codomain(self) -> Space:
        return self.domain

    @property
    def symmetric(self) -> bool:
        return not self.options.holomorphic

    @property
    def cost(self) -> float:
        return 2.0

    def product(self, *, adjoint: bool) -> Callable[[Leaves], Leaves]:
        pull = self.advised(self.current.linearization.vjp)
        # The matrix is symmetric. A pull multiplies by its conjugate transpose, which is its conjugate.
        if adjoint or not self.options.holomorphic:
            return pull
        return lambda vector: conjugated(pull(conjugated(vector)))
