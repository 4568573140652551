"""The vector-Jacobian product. Builds on `core` and `grad`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

from autodiff import checks
from autodiff.core.call import Call
from autodiff.core.reverse import record
from autodiff.types import A, R, Trees


@overload
def vjp(func: Callable[..., R], *primals: Any, strict: bool = False) -> tuple[R, Callable[..., Any]]: ...
@overload
def vjp(
    func: Callable[..., tuple[R, A]], *primals: Any, has_aux: Literal[True], strict: bool = False
) -> tuple[R, Callable[..., Any], A]: ...
@overload
def vjp(func: Callable[..., Any], *primals: Any, has_aux: bool = False, strict: bool = False) -> Trees: ...
def vjp(func: Callable[..., Any], *primals: Any, has_aux: bool = False, strict: bool = False) -> Trees:
    r"""Value of a function, and the pullback that takes cotangents of it to cotangents of its inputs.

    .. math:: \operatorname{vjp}(f, x) = (f(x),\; v \mapsto v^\top J_f(x))

    >>> import torch
    >>> value, pullback = vjp(torch.sin, torch.zeros(2))
    >>> pullback(torch.tensor([1.0, 3.0]))
    (tensor([1., 3.]),)

    Args:
        func: a function of the primals that returns a tree of floating or complex tensors.
        primals: ``func``'s positional arguments, each any tree.
        has_aux: whether ``func`` returns ``(output, aux)``.
        strict: let the pullback raise where no output depends on a leaf, instead of giving zeros.

    Returns:
        ``(output, pullback)``, and ``(output, pullback, aux)`` with ``has_aux``.
        ``pullback(cotangents, retain_graph=True, create_graph=None)`` takes a tree like the output and returns a
        tuple with a tree like each primal: the cotangent at floating and complex leaves, None at others. It may be
        called any number of times, unless the last was with ``retain_graph=False``. ``create_graph=None`` makes the
        result differentiable where somebody can watch it.

    Raises:
        OutputError: the output is empty, or holds something else than floating or complex tensors.
        LeafError: no primal holds a floating or complex tensor.
        StructureError, ShapeError, DtypeError: cotangents do not match the output.
        IndependenceError: ``strict`` and no output depends on a leaf.
    """
    call = Call("vjp", func, primals, {}, None, has_aux)
    tape = record(call.evaluate, call.primals, origin=func)
    checks.tensor_outputs("vjp", tape.outputs, call.path_of_output)

    def pullback(cotangents: Any, retain_graph: bool = True, create_graph: bool | None = None) -> Any:
        seeds = call.cotangents(tape.outputs, cotangents)
        pulled = tape.pull(seeds, retain_graph=retain_graph, create_graph=create_graph)
        return call.like_arguments(call.dense_cotangents(pulled, strict))

    output = call.like_output(tape.outputs)
    return (output, pullback, call.aux(tape.aux)) if has_aux else (output, pullback)
