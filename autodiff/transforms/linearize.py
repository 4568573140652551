"""One evaluation, many Jacobian-vector products. Builds on `core` and `jvp`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autodiff import checks
from autodiff.core.call import Call
from autodiff.core.linearization import linearize as linearize_flat
from autodiff.types import R


def linearize(func: Callable[..., R], *primals: Any) -> tuple[R, Callable[..., R]]:
    r"""Value of a function, and its derivative as a linear function of the tangents.

    .. math:: \operatorname{linearize}(f, x) = (f(x),\; t \mapsto J_f(x)\, t)

    ``func`` runs once, and its Python control flow once with it; each product then costs about one backward pass. The
    pullback of a function is linear in its cotangent, so the pullback of the pullback is the derivative itself (J.
    Townsend, "A new trick for calculating Jacobian vector products", 2017).

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
    linearized = linearize_flat(call.evaluate, call.primals, higher_order=True, origin=func)
    checks.tensor_outputs("linearize", linearized.outputs, call.path_of_output)

    push = linearized.jvp()

    def pushforward(*tangents: Any) -> Any:
        pushed = push(call.tangents("tangents", tangents))
        return call.like_output(call.dense_tangents(linearized.outputs, pushed))

    return call.like_output(linearized.outputs), pushforward
