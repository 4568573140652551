"""The Jacobian-vector product. Builds on `core` alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

from autodiff import checks
from autodiff.core.call import Call
from autodiff.core.forward import push
from autodiff.types import A, R, Trees


@overload
def jvp(func: Callable[..., R], primals: Trees, tangents: Trees, *, strict: bool = False) -> tuple[R, R]: ...
@overload
def jvp(
    func: Callable[..., tuple[R, A]],
    primals: Trees,
    tangents: Trees,
    *,
    strict: bool = False,
    has_aux: Literal[True],
) -> tuple[R, R, A]: ...
@overload
def jvp(
    func: Callable[..., Any], primals: Trees, tangents: Trees, *, strict: bool = False, has_aux: bool = False
) -> Trees: ...
def jvp(
    func: Callable[..., Any],
    primals: Trees,
    tangents: Trees,
    *,
    strict: bool = False,
    has_aux: bool = False,
) -> Trees:
    r"""Value of a function and its directional derivative, in one evaluation by forward mode.

    .. math:: \operatorname{jvp}(f, x, t) = (f(x),\; J_f(x)\, t)

    >>> import torch
    >>> jvp(lambda x: x**2, (torch.tensor([3.0, 4.0]),), (torch.tensor([1.0, 0.5]),))
    (tensor([ 9., 16.]), tensor([6., 4.]))

    Args:
        func: a function of the primals that returns a tree of floating or complex tensors.
        primals: a tuple of ``func``'s positional arguments, each any tree.
        tangents: a tuple of the same structure, with a tensor of the leaf's shape and dtype at every
            floating and complex leaf; what stands at other leaves is ignored.
        strict: raise where an output does not depend on the primals, instead of giving zeros.
        has_aux: whether ``func`` returns ``(output, aux)``.

    Returns:
        ``(output, tangent)``, two trees of the same structure and dtypes, and
        ``(output, tangent, aux)`` with ``has_aux``.

    Raises:
        StructureError, ShapeError, DtypeError: tangents do not match the primals.
        OutputError: the output is empty, or holds something else than floating or complex tensors.
        LeafError: no primal holds a floating or complex tensor.
        IndependenceError: ``strict`` and an output is independent of the primals.
    """
    checks.tuple_of_primals("jvp", primals)
    call = Call("jvp", func, primals, {}, None, has_aux)
    pushed = push(call.evaluate, call.primals, call.tangents("tangents", tangents))
    checks.tensor_outputs("jvp", pushed.outputs, call.path_of_output)
    product = call.dense_tangents(pushed.outputs, pushed.tangents, strict)
    result = call.like_output(pushed.outputs), call.like_output(product)
    return (*result, call.aux(pushed.aux)) if has_aux else result
