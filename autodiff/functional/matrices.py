"""jacobian and hessian as torch.autograd.functional has them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autodiff._torch import compiling, keeps_grad_mode
from autodiff.core import trees
from autodiff.core.randomness import remember_randomness
from autodiff.errors import OptionCombinationError, OptionError, StrategyError, StrictModeError
from autodiff.functional.bounded_rows import BoundedHessian, BoundedJacobian
from autodiff.functional.contract import Contract
from autodiff.functional.vector_products import GRADIENT_CONSTANT, JACOBIAN_CONSTANT

_STRATEGIES = ("forward-mode", "reverse-mode")
_OUTPUT_INDEPENDENT = (
    "Output {output} of the user-provided function is independent of input {input}. This is not allowed in "
    "strict mode."
)


@keeps_grad_mode
def jacobian(
    func: Callable[..., Any],
    inputs: Any,
    create_graph: bool = False,
    strict: bool = False,
    vectorize: bool = False,
    strategy: str = "reverse-mode",
) -> Any:
    r"""Jacobian of a function.

    .. math:: J_{ij} = \partial f_i / \partial x_j

    >>> import torch
    >>> jacobian(lambda x, y: x[0] * y, (torch.tensor([2.0, 3.0]), torch.tensor([5.0])))
    (tensor([[5., 0.]]), tensor([[2.]]))

    Args:
        func: a function of tensors or trees that returns a tensor or a tree of them.
        inputs: a tensor, a tuple of arguments, or any other tree, which is one argument.
        create_graph: connect the result to inputs that require grad, and give it a grad_fn in any case.
            Off, it is detached.
        strict: raise where an output does not depend on an input, instead of giving zeros.
        vectorize: compute all rows (or columns) in one batch. Off, rows are pulled in batches that take
            about the memory of single rows, and one by one where they cannot be batched.
        strategy: ``"reverse-mode"`` or ``"forward-mode"``; the latter needs neither ``vectorize`` nor
            ``create_graph=False``.

    Returns:
        The Jacobian, nested as the output outside and as the inputs inside: ``jacobian[i][j]`` has the
        shape of output i followed by that of input j, in input j's dtype, or in forward mode output i's.

    Raises:
        RuntimeError: ``strict`` and something is independent, or ``strict`` with ``vectorize`` or with
            forward mode.
        TypeError: inputs or outputs are neither tensors nor trees.
        AssertionError: the strategy is unknown.

    The documented behaviour of ``torch.autograd.functional.jacobian``, over any tree.
    """
    if strategy not in _STRATEGIES:
        raise StrategyError(
            'Expected strategy to be either "forward-mode" or "reverse-mode". Hint: If your function has more '
            'outputs than inputs, "forward-mode" tends to be more performant. Otherwise, prefer to use '
            '"reverse-mode".'
        )
    contract = Contract("jacobian", inputs, create_graph, strict)
    make = partial(
        BoundedJacobian, name="jacobian", argnums=contract.argnums, holomorphic=None, strict=strict
    )
    checked = contract.checked(func)

    def of_inputs(*args: Any) -> Any:
        output = checked(*args)
        _refuse_strict_batch(strict, vectorize)
        return output

    return contract.leaving(_derivative(contract, make, of_inputs, vectorize, strategy))


@keeps_grad_mode
def hessian(
    func: Callable[..., Any],
    inputs: Any,
    create_graph: bool = False,
    strict: bool = False,
    vectorize: bool = False,
    outer_jacobian_strategy: str = "reverse-mode",
) -> Any:
    r"""Hessian of a function of one number.

    .. math:: H_{ij} = \partial^2 f / \partial x_i \partial x_j

    >>> import torch
    >>> hessian(lambda x: x[0] ** 2 * x[1], torch.tensor([1.0, 3.0]))
    tensor([[6., 2.],
            [2., 0.]])

    Args:
        func: a function of tensors or trees that returns a tensor with one element.
        inputs: a tensor, a tuple of arguments, or any other tree, which is one argument.
        create_graph: connect the result to inputs that require grad, and give it a grad_fn in any case.
            Off, it is detached.
        strict: raise where the output or its gradient does not depend on an input, instead of giving
            zeros.
        vectorize: compute all rows (or columns) in one batch. Off, rows are pulled in batches that take
            about the memory of single rows, and one by one where they cannot be batched.
        outer_jacobian_strategy: ``"reverse-mode"`` or ``"forward-mode"`` for the Jacobian of the
            gradient, which itself is always found in reverse mode.

    Returns:
        The Hessian, nested twice as the inputs are: ``hessian[i][j]`` has the shape of input i followed
        by that of input j.

    Raises:
        RuntimeError: the output has several elements, ``strict`` and something is independent, or
            ``strict`` with ``vectorize`` or with forward mode.
        TypeError: inputs or outputs are neither tensors nor trees.
        AssertionError: the strategy is unknown.

    The documented behaviour of ``torch.autograd.functional.hessian``, over any tree.
    """
    contract = Contract("hessian", inputs, create_graph, strict)
    if outer_jacobian_strategy not in _STRATEGIES:
        raise StrategyError('Expected strategy to be either "forward-mode" or "reverse-mode".')

    def refuse_constant(gradient: list[Tensor]) -> None:
        if strict:
            contract.refuse_constants(gradient, GRADIENT_CONSTANT)
        _refuse_strict_batch(strict, vectorize)

    make = partial(
        BoundedHessian,
        name="hessian",
        argnums=contract.argnums,
        holomorphic=None,
        strict=strict,
        has_aux=True,
        check_gradient=refuse_constant,
    )
    blocks = _derivative(contract, make, contract.scalar(func), vectorize, outer_jacobian_strategy)
    return contract.leaving(blocks)


def _derivative(
    contract: Contract,
    make: Callable[..., BoundedJacobian],
    func: Callable[..., Any],
    vectorize: bool,
    strategy: str,
) -> Any:
    if strategy == "forward-mode":
        if contract.strict:
            if contract.create_graph and not contract.must_be_constant:
                raise OptionCombinationError(
                    'torch.autograd.functional.jacobian: `create_graph=True` and `strategy="forward-mode"` are not '
                    "supported together (yet) with `strict=True`. Please either set `strict=False` or "
                    '`strategy="reverse-mode"`.'
                )
            raise OptionError(
                'torch.autograd.functional.jacobian: `strict=True` and `strategy="forward-mode"` are not '
                'supported together (yet). Please either set `strict=False` or `strategy="reverse-mode"`.'
            )
        return _forward(contract, make, func)
    with contract.modes(), contract.words(_OUTPUT_INDEPENDENT):
        blocks = _result(make(func=func), contract) if vectorize else _by_rows(contract, make, func)
    if contract.strict and contract.create_graph and not contract.must_be_constant:
        leaves = trees.leaves(blocks)
        per_output = len(trees.leaves(contract.args))
        for index, block in enumerate(leaves):
            if isinstance(block, Tensor) and not block.requires_grad:
                # Legacy names the output here, though it says input.
                raise StrictModeError(
                    JACOBIAN_CONSTANT.format(input=index // per_output), output=index // per_output
                )
    return blocks


def _forward(contract: Contract, make: Callable[..., BoundedJacobian], func: Callable[..., Any]) -> Any:
    """Columns by forward mode; rows, in the same dtypes, where it lacks a rule or func wants a graph."""
    recording = contract.create_graph or torch.is_grad_enabled()

    def in_callers_mode(*args: Any) -> Any:
        # Legacy's forward mode leaves grad mode as it is.
        with torch.set_grad_enabled(recording):
            return func(*args)

    forward = make(func=func, mode="forward")
    if compiling():
        with contract.modes():
            return _result(forward, contract)
    if not isinstance(forward, BoundedHessian):
        forward.func = in_callers_mode
    rewind = remember_randomness()
    with contract.modes():
        try:
            return _result(forward, contract)
        except RuntimeError as error:
            rewind()
            try:
                return _by_rows(contract, make, func, in_output_dtype=True)
            except RuntimeError:
                raise error from None


def _by_rows(
    contract: Contract,
    make: Callable[..., BoundedJacobian],
    func: Callable[..., Any],
    *,
    in_output_dtype: bool = False,
) -> Any:
    """Rows in batches of bounded memory."""
    return _result(make(func=func, bounded=True, in_output_dtype=in_output_dtype), contract)


def _result(derive: BoundedJacobian, contract: Contract) -> Any:
    result = derive(*contract.args)
    return result[0] if derive.has_aux else result


def _refuse_strict_batch(strict: bool, vectorize: bool) -> None:
    """Legacy runs the function first, and its errors come first."""
    if strict and vectorize:
        raise OptionError(
            "torch.autograd.functional.jacobian: `strict=True` and `vectorized=True` are not supported "
            "together. Please either set `strict=False` or `vectorize=False`."
        )
