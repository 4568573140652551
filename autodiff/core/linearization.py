"""A function at a point: one evaluation, and any number of products with its derivatives there.

Works on flat lists of tensors; None stands for a zero vector. Never sees a tree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from autodiff import _torch, checks
from autodiff.core import graph
from autodiff.core.reverse import ALL, pulling, record, record_pull
from autodiff.core.transpose import transpose

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from autodiff.core.call import Call, Lift
    from autodiff.core.reverse import FlatFunction, Tape

    Vectors = Sequence[Tensor | None]


class Linearization:
    """What one evaluation left: outputs, aux, and the derivative as a linear function, forwards and backwards."""

    __slots__ = ("_tape", "aux", "outputs")

    def __init__(self, tape: Tape) -> None:
        self._tape = tape
        self.outputs, self.aux = tape.outputs, tape.aux

    def vjp(
        self,
        cotangents: Vectors,
        *,
        wanted: slice = ALL,
        last: bool = False,
        create_graph: bool | None = None,
    ) -> list[Tensor | None]:
        """A cotangent for each of the primals, or the ``wanted`` ones; after the ``last`` time the graph is freed."""
        return self._tape.pull(cotangents, wanted=wanted, retain_graph=not last, create_graph=create_graph)

    def jvp(self, tangents: Vectors) -> list[Tensor | None]:
        """A tangent for each output."""
        return self.pushforward()(tangents)

    def pushforward(
        self,
        inspect: Callable[[list[Tensor | None]], None] = lambda _: None,
        *,
        at: Callable[[Tensor], Tensor] | None = None,
    ) -> Callable[[Vectors], list[Tensor | None]]:
        """`jvp` for any number of tangents: the pullback of the pullback; see `transpose` for the arguments."""
        return transpose(self._tape, inspect, at=at)

    def pulled_one_at_a_time(self) -> bool:
        """Whether cotangents must not be pulled back in a batch."""
        return not _torch.compiling() and bool(self._tape.pulled_one_at_a_time())

    def bytes_of_a_pull(self) -> tuple[int, int]:
        """The bytes of all the cotangents that a pull makes, and of the largest of them."""
        return graph.bytes_of_a_pull(self._tape.graph_outputs)

    def has_custom_gradient(self) -> bool:
        """Whether an autograd Function is in the graph: what it gives need not be the gradient of anything."""
        return not _torch.compiling() and graph.has_custom_gradient(self._tape.graph_outputs)

    def first_constant(self) -> int | None:
        """The first output that does not depend on any tensor that requires grad, None where all do."""
        return next((i for i, one in enumerate(self._tape.graph_outputs) if not one.requires_grad), None)


def linearize(func: FlatFunction, primals: Sequence[Tensor], *, higher_order: bool = False) -> Linearization:
    """Evaluate the function once; ``higher_order`` says that its pullback will be differentiated as well."""
    return Linearization(record(func, primals, higher_order=higher_order))


class Derivative:
    """What ``take`` makes of the linearization of a call, such as its gradient, as a flat function again.

    The outputs and aux of the call go along as its aux.
    """

    __slots__ = ("_count", "_take", "call")

    def __init__(self, call: Call, take: Callable[[Linearization], list[Tensor]]) -> None:
        self.call, self._take = call, take

    def __call__(self, leaves: Sequence[Tensor], lift: Lift | None) -> tuple[list[Any], list[Any]]:
        """The derivative at other primals than the call's."""
        return pulling(self.call.evaluate, self._of_tape)(leaves, lift)

    def linearize(self) -> DerivativeLinearization:
        """The derivative at the call's primals, and any number of products with its own derivative there."""
        tape = record_pull(self.call.evaluate, self.call.primals, self._of_tape)
        return DerivativeLinearization(tape, *self.values_and_aux(tape.aux))

    def values_and_aux(self, aux: list[Any]) -> tuple[list[Tensor], list[Any]]:
        """The outputs of the call and the leaves of its aux, from the leaves of this function's aux."""
        return aux[: self._count], aux[self._count :]

    def _of_tape(self, tape: Tape) -> tuple[list[Any], list[Any]]:
        self._count = len(tape.outputs)
        return self._take(Linearization(tape)), [*tape.outputs, *tape.aux]


class DerivativeLinearization(Linearization):
    """A derivative at a point; ``values`` are the outputs of the function that was differentiated."""

    __slots__ = ("values",)

    def __init__(self, tape: Tape, values: list[Tensor], aux: list[Any]) -> None:
        super().__init__(tape)
        self.values, self.aux = values, aux

    # The product of a Hessian with vectors: it is symmetric.
    hvp = Linearization.vjp


def gradient(
    call: Call, *, strict: bool = False, inspect: Callable[[Linearization], None] | None = None
) -> Derivative:
    """The gradient of a call of a scalar function; ``inspect`` is shown the function's linearization."""

    def pulled(function: Linearization) -> list[Tensor]:
        checks.scalar_output(call.name, call.out_spec, function.outputs)
        if inspect is not None:
            inspect(function)
        return call.dense_cotangents(function.vjp([torch.ones_like(function.outputs[0])], last=True), strict)

    return Derivative(call, pulled)
