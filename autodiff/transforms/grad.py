"""Gradients of scalar functions. Builds on `core` alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Unpack, overload

import torch
from torch import Tensor

from autodiff import checks
from autodiff._torch import traced_inline_only
from autodiff.core.call import Call, wraps
from autodiff.core.reverse import conjugated, record
from autodiff.types import A, Argnums, GradOptions, P, WithAux, Wrt


@overload
def grad(
    func: WithAux[P, A], argnums: Argnums = 0, *, has_aux: Literal[True], **kw: Unpack[GradOptions]
) -> WithAux[P, A]: ...
@overload
def grad(
    func: Callable[P, Any], argnums: Argnums = 0, has_aux: bool = False, **kw: Unpack[GradOptions]
) -> Callable[P, Any]: ...
def grad(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    holomorphic: bool = False,
    strict: bool = False,
    wrt: Wrt = None,
) -> Callable[..., Any]:
    r"""Gradient of a scalar function.

    .. math:: \operatorname{grad}(f)(x) = \nabla f(x)

    >>> import torch
    >>> grad(lambda x: (x**3).sum())(torch.tensor([1.0, 2.0]))
    tensor([ 3., 12.])
    >>> grad(lambda w, b: w.sin() * b, argnums=("w", "b"))(torch.tensor(0.0), torch.tensor(2.0))
    (tensor(2.), tensor(0.))
    >>> grad(lambda p: p["a"] * p["b"], wrt="a")({"a": torch.tensor(1.0), "b": torch.tensor(3.0)})
    {'a': tensor(3.), 'b': None}

    Args:
        func: a function of trees that returns one real tensor of shape ``()``.
        argnums: which arguments to differentiate: a position, a parameter name, or a tuple of them.
        has_aux: whether ``func`` returns ``(value, aux)``.
        holomorphic: differentiate a complex function of complex arguments, with one complex derivative.
        strict: raise where the value does not depend on a leaf, instead of giving zeros.
        wrt: which leaves of these arguments to differentiate: a pattern of places (``"last.*"``, ``"*bias"``;
            a place is the way to the leaf with dots, as in ``"layers.0.weight"``), or a tuple of patterns.
            The others pass through, and None stands for them in the result.

    Returns:
        A function of ``func``'s arguments, keywords included. It returns a tree like the selected argument (a tuple
        of trees for a tuple of ``argnums``) whose floating and complex leaves hold the gradient, with the leaf's
        shape, dtype and device, and whose other leaves hold None. With ``has_aux`` it returns ``(gradient, aux)``.

    Raises:
        OutputError: the output is not one real scalar tensor (with ``holomorphic`` one scalar tensor).
        DtypeError: ``holomorphic`` and a differentiated leaf or the output is real.
        ArgnumsError: ``argnums`` does not fit the call, or ``wrt`` matches nothing.
        LeafError: the selected arguments hold no floating or complex tensor.
        IndependenceError: ``strict`` and the value is independent of a leaf.

    For a complex leaf the result is the conjugate Wirtinger gradient, as in ``torch.autograd``. With
    ``holomorphic`` it is the derivative itself, not its conjugate:

    >>> grad(lambda z: z**3, holomorphic=True)(torch.tensor(1 + 1j))
    tensor(0.+6.j)
    """

    @wraps(func)
    def gradient(*args: Any, **kwargs: Any) -> Any:
        result = differentiate("grad", func, argnums, has_aux, strict, args, kwargs, wrt, holomorphic)
        return (result.gradient, result.aux) if has_aux else result.gradient

    return gradient


@overload
def value_and_grad(
    func: Callable[P, Any], argnums: Argnums = 0, **kw: Unpack[GradOptions]
) -> Callable[P, tuple[Tensor, Any]]: ...
@overload
def value_and_grad(
    func: WithAux[P, A], argnums: Argnums = 0, *, has_aux: Literal[True], **kw: Unpack[GradOptions]
) -> Callable[P, tuple[tuple[Tensor, A], Any]]: ...
@overload
def value_and_grad(
    func: Callable[P, Any], argnums: Argnums = 0, has_aux: bool = False, **kw: Unpack[GradOptions]
) -> Callable[P, Any]: ...
def value_and_grad(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    holomorphic: bool = False,
    strict: bool = False,
    wrt: Wrt = None,
) -> Callable[..., Any]:
    r"""Value and gradient of a scalar function, from one evaluation of it.

    .. math:: \operatorname{value\_and\_grad}(f)(x) = (f(x), \nabla f(x))

    >>> import torch
    >>> value_and_grad(lambda x: (x**3).sum())(torch.tensor([1.0, 2.0]))
    (tensor(9.), tensor([ 3., 12.]))

    Args:
        func: a function of trees that returns one real tensor of shape ``()``.
        argnums: which arguments to differentiate: a position, a parameter name, or a tuple of them.
        has_aux: whether ``func`` returns ``(value, aux)``.
        holomorphic: differentiate a complex function of complex arguments, with one complex derivative.
        strict: raise where the value does not depend on a leaf, instead of giving zeros.
        wrt: which leaves to differentiate: a pattern of places (``"last.*"``, ``"*bias"``), or a tuple of patterns.

    Returns:
        A function that returns ``(value, gradient)``, and ``((value, aux), gradient)`` with
        ``has_aux``: JAX's order. :func:`grad_and_value` keeps that of torch.func.

    Raises:
        OutputError: the output is not one real scalar tensor (with ``holomorphic`` one scalar tensor).
        DtypeError: ``holomorphic`` and a differentiated leaf or the output is real.
        ArgnumsError: ``argnums`` does not fit the call, or ``wrt`` matches nothing.
        LeafError: the selected arguments hold no floating or complex tensor.
        IndependenceError: ``strict`` and the value is independent of a leaf.
    """

    @wraps(func)
    def valued(*args: Any, **kwargs: Any) -> Any:
        result = differentiate(
            "value_and_grad", func, argnums, has_aux, strict, args, kwargs, wrt, holomorphic
        )
        return ((result.value, result.aux) if has_aux else result.value), result.gradient

    return valued


@overload
def grad_and_value(
    func: Callable[P, Any], argnums: Argnums = 0, **kw: Unpack[GradOptions]
) -> Callable[P, tuple[Any, Tensor]]: ...
@overload
def grad_and_value(
    func: WithAux[P, A], argnums: Argnums = 0, *, has_aux: Literal[True], **kw: Unpack[GradOptions]
) -> Callable[P, tuple[Any, tuple[Tensor, A]]]: ...
@overload
def grad_and_value(
    func: Callable[P, Any], argnums: Argnums = 0, has_aux: bool = False, **kw: Unpack[GradOptions]
) -> Callable[P, Any]: ...
def grad_and_value(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    holomorphic: bool = False,
    strict: bool = False,
    wrt: Wrt = None,
) -> Callable[..., Any]:
    r"""Gradient and value of a scalar function, in torch.func's order.

    .. math:: \operatorname{grad\_and\_value}(f)(x) = (\nabla f(x), f(x))

    >>> import torch
    >>> grad_and_value(lambda x: (x**3).sum())(torch.tensor([1.0, 2.0]))
    (tensor([ 3., 12.]), tensor(9.))

    Args:
        func: a function of trees that returns one real tensor of shape ``()``.
        argnums: which arguments to differentiate: a position, a parameter name, or a tuple of them.
        has_aux: whether ``func`` returns ``(value, aux)``.
        holomorphic: differentiate a complex function of complex arguments, with one complex derivative.
        strict: raise where the value does not depend on a leaf, instead of giving zeros.
        wrt: which leaves to differentiate: a pattern of places (``"last.*"``, ``"*bias"``), or a tuple of patterns.

    Returns:
        A function that returns ``(gradient, value)``, and ``(gradient, (value, aux))`` with ``has_aux``.

    Raises:
        OutputError: the output is not one real scalar tensor (with ``holomorphic`` one scalar tensor).
        DtypeError: ``holomorphic`` and a differentiated leaf or the output is real.
        ArgnumsError: ``argnums`` does not fit the call, or ``wrt`` matches nothing.
        LeafError: the selected arguments hold no floating or complex tensor.
        IndependenceError: ``strict`` and the value is independent of a leaf.
    """

    @wraps(func)
    def valued(*args: Any, **kwargs: Any) -> Any:
        result = differentiate(
            "grad_and_value", func, argnums, has_aux, strict, args, kwargs, wrt, holomorphic
        )
        return result.gradient, ((result.value, result.aux) if has_aux else result.value)

    return valued


class Differentiated(NamedTuple):
    """What one evaluation and one pull give; aux is None where there is none."""

    gradient: Any
    value: Tensor
    aux: Any


@traced_inline_only
def differentiate(
    name: str,
    func: Callable[..., Any],
    argnums: Argnums | None,
    has_aux: bool,
    strict: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    wrt: Wrt = None,
    holomorphic: bool = False,
) -> Differentiated:
    """Value, gradient and aux of one call, under the public name that the user called."""
    call = Call(name, func, args, kwargs, argnums, has_aux, wrt)
    if holomorphic:
        checks.holomorphic_dtypes(name, call.primals, holomorphic, "inputs")
    tape = record(call.evaluate, call.primals, origin=func)
    checks.scalar_output(name, call.out_spec, tape.outputs, holomorphic)
    (value,) = tape.outputs
    pulled = tape.pull([torch.ones_like(value)])
    if holomorphic:
        pulled = conjugated(pulled)
    gradient = call.like_arguments(call.dense_cotangents(pulled, strict))
    return Differentiated(gradient, value, call.aux(tape.aux) if has_aux else None)
