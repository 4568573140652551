"""Floor 2: one evaluation, many Jacobian-vector products. Builds on `core` and `jvp`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from autodiff.core import checks
from autodiff.core.arguments import Call
from autodiff.core.tape import record
from autodiff.transforms.jvp import dense_tangents

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from autodiff.core.tape import Tape


def linearize(func: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    r"""Value of a function, and its derivative as a linear function of the tangents.

    .. math:: \operatorname{linearize}(f, x) = (f(x),\; t \mapsto J_f(x)\, t)

    ``func`` runs once, and its Python control flow once with it; each product then costs about one
    backward pass. The pullback of a function is linear in its cotangent, so the pullback of the
    pullback is the derivative itself (J. Townsend, "A new trick for calculating Jacobian vector
    products", 2017).

    >>> import torch
    >>> value, pushforward = linearize(torch.sin, torch.zeros(2))
    >>> pushforward(torch.tensor([1.0, 3.0]))
    tensor([1., 3.])

    Args:
        func: a function of the primals that returns a tree of floating or complex tensors.
        primals: ``func``'s positional arguments, each any tree.

    Returns:
        ``(output, pushforward)``; ``pushforward(*tangents)`` takes one tree like each primal and returns
        a tree like the output. It may be called any number of times.

    Raises:
        OutputError: the output is empty, or holds something else than floating or complex tensors.
        LeafError: no primal holds a floating or complex tensor.
        StructureError, ShapeError, DtypeError: tangents do not match the primals.
    """
    call = Call("linearize", func, primals, {}, None, has_aux=False)
    tape = record(call.evaluate, call.primals, twice=True)
    checks.tensor_outputs("linearize", tape.outputs, call.path_of_output)
    push = transpose(tape)

    def pushforward(*tangents: Any) -> Any:
        moved = push(call.tangents("tangents", tangents))
        return call.like_output(dense_tangents(call, tape.outputs, moved, strict=False))

    return call.like_output(tape.outputs), pushforward


def transpose(
    tape: Tape, look: Callable[[list[Tensor | None]], None] = lambda _: None
) -> Callable[[Sequence[Tensor]], list[Tensor | None]]:
    """The tape's derivative as a function of tangents: the pullback of its pullback.

    Conjugate twice: the engine's pullback is the conjugate transpose, and so is its own pullback.
    ``look`` is shown what the first pullback gives, None where no output depends on an input.
    """
    reached: list[int] = []

    def pull(cotangents: Sequence[Tensor], _: Any) -> tuple[list[Tensor], list[Any]]:
        pulled = tape.pull(cotangents, retain_graph=True)
        look(pulled)
        reached[:] = [i for i, cotangent in enumerate(pulled) if cotangent is not None]
        return [cotangent for cotangent in pulled if cotangent is not None], []

    # The derivative does not depend on where the pullback, a linear function, is recorded.
    origin = [torch.zeros_like(output) for output in tape.outputs]
    pullback = record(pull, origin, private=tape.inputs)

    def push(tangents: Sequence[Tensor]) -> list[Tensor | None]:
        return pullback.pull([tangents[i] for i in reached], retain_graph=True)

    return push
