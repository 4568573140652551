"""The public functions that make operators of functions: each takes a function, and gives what makes the operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from autodiff import checks
from autodiff.operators.derivatives import HessianOperator, JacobianOperator, Options
from autodiff.operators.operator import Operator
from autodiff.types import Argnums, Wrt

Made_co = TypeVar("Made_co", bound=Operator, covariant=True)


@dataclass(frozen=True)
class Maker(Generic[Made_co]):
    """What makes an operator at the arguments of the function."""

    kind: type[Made_co]
    options: Options

    def __call__(self, *args: Any, **kwargs: Any) -> Made_co:
        """The operator at these arguments; the function runs now, and its graph lives as long as the operator."""
        return self.kind(self.options, args, kwargs).prepared()  # type: ignore[call-arg]

    def __repr__(self) -> str:
        return f"<{self.kind.__name__} of {checks.shown_function(self.options.func)}>"


def jacobian(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    holomorphic: bool = False,
    wrt: Wrt = None,
) -> Maker[JacobianOperator]:
    r"""Jacobian of a function as an operator: ``A @ v`` is a pushforward, ``A.H @ u`` a pullback.

    .. math:: A v = J_f(x)\, v, \qquad A^{\mathsf H} u = J_f(x)^{\mathsf H} u

    >>> import torch
    >>> from autodiff import operators
    >>> A = operators.jacobian(lambda x: x[0] * x[1:])(torch.tensor([2.0, 3.0, 5.0]))
    >>> A @ torch.tensor([1.0, 0.0, 1.0])
    tensor([3., 7.])

    Args:
        func: a function of trees that returns a tree of floating or complex tensors.
        argnums: which arguments to differentiate: a position, a parameter name, or a tuple of them.
        has_aux: whether ``func`` returns ``(output, aux)``; aux is the operator's ``aux``.
        holomorphic: differentiate a complex function of complex arguments, with one complex derivative.
        wrt: which leaves to differentiate: a pattern of places (``"last.*"``, ``"*bias"``), or a tuple of patterns.

    Returns:
        A function of ``func``'s arguments that runs it once and returns the operator, from trees like the selected
        argument to trees like the output. The output is its ``value``.

    Raises:
        DtypeError: complex tensors without ``holomorphic``, or real ones with it.
        OutputError: the output is empty, or holds something else than floating or complex tensors.
        ArgnumsError, LeafError: ``argnums`` or ``wrt`` does not fit the call, or selects nothing to differentiate.
    """
    return Maker(JacobianOperator, Options(func, argnums, has_aux, holomorphic, wrt))


def hessian(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    holomorphic: bool = False,
    wrt: Wrt = None,
) -> Maker[HessianOperator]:
    r"""Hessian of a scalar function as an operator: the gradient is recorded once, and pulled back for each product.

    .. math:: A v = \nabla^2 f(x)\, v

    >>> import torch
    >>> from autodiff import operators
    >>> A = operators.hessian(lambda x: (x**3).sum())(torch.tensor([1.0, 2.0]))
    >>> A @ torch.tensor([1.0, 10.0])
    tensor([  6., 120.])
    >>> A.value, A.gradient
    (tensor(9.), tensor([ 3., 12.]))

    Args:
        func: a function of trees that returns one real tensor of shape ``()``, or a complex one with ``holomorphic``.
        argnums: which arguments to differentiate: a position, a parameter name, or a tuple of them.
        has_aux: whether ``func`` returns ``(value, aux)``; aux is the operator's ``aux``.
        holomorphic: differentiate a complex function of complex arguments, with one complex derivative.
        wrt: which leaves to differentiate: a pattern of places (``"last.*"``, ``"*bias"``), or a tuple of patterns.

    Returns:
        A function of ``func``'s arguments that runs it once and returns the operator, which is symmetric, on trees
        like the selected argument. The value of the function is its ``value``, the gradient its ``gradient``.

    Raises:
        DtypeError: complex tensors without ``holomorphic``, or real ones with it.
        OutputError: the output is not one scalar tensor.
        ArgnumsError, LeafError: ``argnums`` or ``wrt`` does not fit the call, or selects nothing to differentiate.

    B. A. Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6 (1994).
    """
    return Maker(HessianOperator, Options(func, argnums, has_aux, holomorphic, wrt))
