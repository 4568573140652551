"""A function at a point: one evaluation, and any number of products with its derivatives there.

Works on flat lists of tensors; None stands for a zero vector. Never sees a tree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from autodiff import _torch, checks
from autodiff.core import graph
from autodiff.core.chunks import Sizes
from autodiff.core.reverse import conjugated, differentiated, record, record_derivative
from autodiff.core.tape import ALL, ONE_BY_ONE
from autodiff.core.transpose import transpose

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from autodiff.core.call import Call
    from autodiff.core.tape import FlatFunction, Tape

    Vectors: TypeAlias = Sequence[Tensor | None]
    # From the tape of a call to the leaves of its derivative.
    Differentiate: TypeAlias = Callable[[Tape], list[Tensor]]


class Linearization:
    """The result of one evaluation: outputs, aux, and the derivative as a linear function, forwards and backwards.

    Of a derivative, ``values`` are the outputs of the function that was differentiated.
    """

    __slots__ = ("_tape", "aux", "outputs", "values")

    values: list[Tensor]

    def __init__(self, tape: Tape) -> None:
        self._tape, self.outputs, self.aux = tape, tape.outputs, tape.aux

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

    # Of a gradient: the product of the Hessian, which is symmetric for real functions.
    hvp = vjp

    def jvp(
        self, inspect: Callable[[list[Tensor | None]], None] = lambda _: None
    ) -> Callable[[Vectors], list[Tensor | None]]:
        """A function from tangents to a tangent for each output, by the pullback of the pullback.

        It is made once for all tangents; see `transpose` for the argument.
        """
        return transpose(self._tape, inspect)

    def batchable(self, sizes: Sizes) -> Sizes:
        """The sizes of batches of cotangents: one, where torch pulls a batch back wrongly."""
        alone = not _torch.compiling() and ONE_BY_ONE in self._tape.policies()
        return Sizes(1) if alone else sizes

    def bytes_of_a_pull(self) -> tuple[int, int]:
        """The bytes of all the cotangents that a pull makes, and of the largest of them."""
        return graph.bytes_of_a_pull(self._tape.nodes())

    def has_custom_gradient(self) -> bool:
        """Whether a pull may give something else than the derivative: by a hook, a Function or scaled frequencies."""
        return not _torch.compiling() and (
            self.has_hooks() or bool(self._tape.functions()) or _torch.scales_by_frequency(self._tape.nodes())
        )

    def has_hooks(self) -> bool:
        """Whether a hook was registered while the function ran."""
        return self._tape.has_hooks

    def is_differentiable_once(self) -> bool:
        """Whether torch cannot differentiate its pullback, since a backward is marked so."""
        return not _torch.compiling() and any(map(_torch.is_differentiable_once, self._tape.functions()))

    def first_constant(self) -> int | None:
        """The first output that does not depend on any tensor that requires grad, None where all do."""
        return next((i for i, one in enumerate(self._tape.graph_outputs) if not one.requires_grad), None)


def linearize(
    func: FlatFunction,
    primals: Sequence[Tensor],
    *,
    higher_order: bool = False,
    origin: Callable[..., Any] | None = None,
) -> Linearization:
    """Evaluate the function once; ``higher_order`` says that its pullback will be differentiated as well.

    ``origin`` is the user's function inside, for `record`.
    """
    return Linearization(record(func, primals, higher_order=higher_order, origin=origin))


def linearize_derivative(call: Call, differentiate: Differentiate) -> Linearization:
    """What ``differentiate`` makes of the tape of a call, such as its gradient, evaluated once itself."""
    tape = record_derivative(call.evaluate, call.primals, _of_tape(differentiate), origin=call.func)
    result, count = Linearization(tape), call.output_count
    result.values, result.aux = tape.aux[:count], tape.aux[count:]
    return result


def derivative(call: Call, differentiate: Differentiate) -> FlatFunction:
    """The same as a flat function of the primals; the call's outputs come first in its aux."""
    return differentiated(call.evaluate, _of_tape(differentiate))


def _of_tape(differentiate: Differentiate) -> Callable[[Tape], tuple[list[Any], list[Any]]]:
    return lambda tape: (differentiate(tape), [*tape.outputs, *tape.aux])


def gradient(
    call: Call,
    *,
    strict: bool = False,
    holomorphic: bool = False,
    inspect: Callable[[Linearization], None] | None = None,
) -> Differentiate:
    """How a call of a scalar function is differentiated; ``inspect`` is shown the function's linearization."""

    def pulled(tape: Tape) -> list[Tensor]:
        checks.scalar_output(call.name, call.out_spec, tape.outputs, holomorphic)
        if inspect is not None:
            inspect(Linearization(tape))
        slope = tape.pull([torch.ones_like(tape.outputs[0])])
        return call.dense_cotangents(conjugated(slope) if holomorphic else slope, strict)

    return pulled
