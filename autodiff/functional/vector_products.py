"""vjp, jvp, vhp and hvp as torch.autograd.functional has them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from autodiff import checks
from autodiff._torch import compiling, keeps_grad_mode
from autodiff.core.call import Call, is_differentiable
from autodiff.core.forward import push
from autodiff.core.linearization import Linearization, gradient, linearize, linearize_derivative
from autodiff.core.randomness import remember_randomness
from autodiff.errors import OutputError
from autodiff.functional.backward_only import BackwardOnlyError, refusing_backward_only
from autodiff.functional.contract import Contract

_OUTPUT_INDEPENDENT = (
    "The output of the user-provided function is independent of input {input}. This is not allowed in "
    "strict mode."
)
_GRADIENT_INDEPENDENT = (
    "The gradient with respect to input {input} is independent of the inputs of the user-provided "
    "function. This is not allowed in strict mode."
)
_JACOBIAN_INDEPENDENT = (
    "The jacobian of the user-provided function is independent of input {input}. This is not allowed in "
    "strict mode."
)
JACOBIAN_CONSTANT = (
    "The jacobian of the user-provided function is independent of input {input}. This is not allowed in "
    "strict mode when create_graph=True."
)
_HESSIAN_CONSTANT = (
    "The hessian of the user-provided function is independent of input {input}. This is not allowed in "
    "strict mode when create_graph=True."
)
GRADIENT_CONSTANT = (
    "While computing the hessian, found that the jacobian of the user-provided function with respect to "
    "input {input} is independent of the input. This is not allowed in strict mode. You should ensure that "
    "your function is twice differentiable and that the jacobian depends on the inputs (this would be "
    "violated by a linear function for example)."
)
_ENTRY_INDEPENDENT = (
    "The gradient with respect to the input is independent of entry {output} in the grad_outputs when using "
    "the double backward trick to compute forward mode gradients. This is not allowed in strict mode."
)
_HESSIAN_ENTRY_INDEPENDENT = (
    "The hessian of the user-provided function is independent of entry {input} in the grad_jacobian. This "
    "is not allowed in strict mode as it prevents from using the double backward trick to replace forward "
    "mode AD."
)
_ONE_OUTPUT = "the user-provided function returns a single Tensor with a single element."


@keeps_grad_mode
def vjp(
    func: Callable[..., Any], inputs: Any, v: Any = None, create_graph: bool = False, strict: bool = False
) -> tuple[Any, Any]:
    r"""Value of a function and the product of a vector with its Jacobian.

    .. math:: (f(x),\; v^\top J_f(x))

    >>> import torch
    >>> vjp(lambda x: x**2, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 10.0]))
    (tensor([1., 4.]), tensor([ 2., 40.]))

    Args:
        func: a function of tensors or trees that returns a tensor or a tree of them.
        inputs: a tensor, a tuple of arguments, or any other tree, which is one argument.
        v: like the output; may be left out where that is one tensor with one element.
        create_graph: connect output and product to inputs that require grad, and give them a grad_fn in
            any case. Off, both are detached.
        strict: raise where an output does not depend on an input, instead of giving zeros.

    Returns:
        ``(output, product)``; the product is nested as the inputs are, with their shapes and dtypes.

    Raises:
        RuntimeError: ``v`` does not fit the output, or ``strict`` and something is independent.
        TypeError: inputs, ``v`` or outputs are neither tensors nor trees.

    The documented behaviour of ``torch.autograd.functional.vjp``, over any tree.
    """
    contract = Contract("vjp", inputs, create_graph, strict)
    call = contract.call(func)
    with contract.modes():
        linearized = linearize(call.evaluate, call.primals)
        checks.tensor_outputs("vjp", linearized.outputs, call.path_of_output, any_dtype=True)
        output = call.like_output(linearized.outputs)
        cotangents = contract.vector(v, output, isinstance(output, tuple), _ONE_OUTPUT, of=_is_tensor)
        with contract.words(_OUTPUT_INDEPENDENT):
            product = call.like_arguments(
                call.dense_cotangents(linearized.vjp(cotangents, last=True), strict)
            )
    if strict and create_graph:
        contract.refuse_constants(product, JACOBIAN_CONSTANT)
    return contract.leaving((output, product))


@keeps_grad_mode
def jvp(
    func: Callable[..., Any], inputs: Any, v: Any = None, create_graph: bool = False, strict: bool = False
) -> tuple[Any, Any]:
    r"""Value of a function and the product of its Jacobian with a vector.

    .. math:: (f(x),\; J_f(x)\, v)

    Forward mode serves where it gives what a backward pass would, in about a third of the time;
    otherwise the pullback of the pullback does.

    >>> import torch
    >>> jvp(lambda x: x**2, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 10.0]))
    (tensor([1., 4.]), tensor([ 2., 40.]))

    Args:
        func: a function of tensors or trees that returns a tensor or a tree of them.
        inputs: a tensor, a tuple of arguments, or any other tree, which is one argument.
        v: like the inputs; may be left out where they are one tensor with one element.
        create_graph: connect output and product to inputs that require grad, and give them a grad_fn in
            any case. Off, both are detached.
        strict: raise where an output does not depend on an input, instead of giving zeros.

    Returns:
        ``(output, product)``; the product is nested as the output is.

    Raises:
        RuntimeError: ``v`` does not fit the inputs, or ``strict`` and something is independent.
        TypeError: inputs, ``v`` or outputs are neither tensors nor trees.

    The documented behaviour of ``torch.autograd.functional.jvp``, over any tree.
    """
    contract = Contract("jvp", inputs, create_graph, strict)
    tangents = contract.input_vector(v)
    with contract.modes():
        if not (strict or contract.create_graph or compiling()):
            rewind = remember_randomness()
            try:
                return _pushed(contract.call(refusing_backward_only(func)), tangents)
            except (BackwardOnlyError, RuntimeError):
                # No forward rule, or something in func that only a backward pass honours. An error of
                # func's own comes again below.
                rewind()
        call = contract.call(func)
        linearized = linearize(call.evaluate, call.primals, higher_order=True)
        _check_outputs_of_jvp(call, linearized.outputs)
        pushed = _by_double_backward(contract, linearized, tangents, _OUTPUT_INDEPENDENT)
        with contract.words(_ENTRY_INDEPENDENT):
            product = call.like_output(call.dense_tangents(linearized.outputs, pushed, strict))
    if strict and create_graph:
        contract.refuse_constants(product, JACOBIAN_CONSTANT)
    return contract.leaving((call.like_output(linearized.outputs), product))


@keeps_grad_mode
def vhp(
    func: Callable[..., Any], inputs: Any, v: Any = None, create_graph: bool = False, strict: bool = False
) -> tuple[Any, Any]:
    r"""Value of a function and the product of a vector with its Hessian.

    .. math:: (f(x),\; v^\top \nabla^2 f(x))

    >>> import torch
    >>> vhp(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 10.0]))
    (tensor(9.), tensor([  6., 120.]))

    Args:
        func: a function of tensors or trees that returns a tensor with one element.
        inputs: a tensor, a tuple of arguments, or any other tree, which is one argument.
        v: like the inputs; may be left out where they are one tensor with one element.
        create_graph: connect output and product to inputs that require grad, and give them a grad_fn in
            any case. Off, both are detached.
        strict: raise where the output or its gradient does not depend on an input, instead of giving
            zeros.

    Returns:
        ``(output, product)``; the product is nested as the inputs are, with their shapes and dtypes.

    Raises:
        RuntimeError: the output has several elements, ``v`` does not fit the inputs, or ``strict`` and
            something is independent.
        TypeError: inputs, ``v`` or the output are neither tensors nor trees.

    The documented behaviour of ``torch.autograd.functional.vhp``, over any tree.
    """
    contract = Contract("vhp", inputs, create_graph, strict)
    vector = contract.input_vector(v)
    with contract.modes():
        call, gradient_at_point, output = _gradient(contract, func)
        with contract.words(_JACOBIAN_INDEPENDENT):
            product = call.like_arguments(
                call.dense_cotangents(gradient_at_point.hvp(vector, last=True), strict)
            )
    if strict and create_graph:
        contract.refuse_constants(product, _HESSIAN_CONSTANT)
    return contract.leaving((output, product))


@keeps_grad_mode
def hvp(
    func: Callable[..., Any], inputs: Any, v: Any = None, create_graph: bool = False, strict: bool = False
) -> tuple[Any, Any]:
    r"""Value of a function and the product of its Hessian with a vector.

    .. math:: (f(x),\; \nabla^2 f(x)\, v)

    The Hessian is symmetric, so this is :func:`vhp`, about twice as fast as the double-backward trick.
    Where func registers a hook, or its graph holds an ``autograd.Function``, the gradient need not be
    the gradient of anything, and the trick is used, as torch does.

    >>> import torch
    >>> hvp(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]), torch.tensor([1.0, 10.0]))
    (tensor(9.), tensor([  6., 120.]))

    Args:
        func: a function of tensors or trees that returns a tensor with one element.
        inputs: a tensor, a tuple of arguments, or any other tree, which is one argument.
        v: like the inputs; may be left out where they are one tensor with one element.
        create_graph: connect output and product to inputs that require grad, and give them a grad_fn in
            any case. Off, both are detached.
        strict: raise where the output or its gradient does not depend on an input, instead of giving
            zeros.

    Returns:
        ``(output, product)``; the product is nested as the inputs are, with their shapes and dtypes.

    Raises:
        RuntimeError: the output has several elements, ``v`` does not fit the inputs, or ``strict`` and
            something is independent.
        TypeError: inputs, ``v`` or the output are neither tensors nor trees.

    The documented behaviour of ``torch.autograd.functional.hvp``, over any tree.
    """
    contract = Contract("hvp", inputs, create_graph, strict)
    vector = contract.input_vector(v)
    with contract.modes():
        custom: list[bool] = []

        def inspect(linearized: Linearization) -> None:
            custom.append(linearized.has_custom_gradient())

        call, gradient_at_point, output = _gradient(contract, func, inspect)
        if strict or any(custom):
            pushed = _by_double_backward(contract, gradient_at_point, vector, _JACOBIAN_INDEPENDENT)
        else:
            pushed = gradient_at_point.hvp(vector, last=True)
        with contract.words(_HESSIAN_ENTRY_INDEPENDENT):
            product = call.like_arguments(call.dense_cotangents(pushed, strict))
    if strict and create_graph:
        contract.refuse_constants(product, _HESSIAN_CONSTANT)
    return contract.leaving((output, product))


def _gradient(
    contract: Contract,
    func: Callable[..., Any],
    inspect: Callable[[Linearization], None] | None = None,
) -> tuple[Call, Linearization, Tensor]:
    """The gradient of a function of one number at a point, and the number as the function shaped it."""
    call = contract.call_of_scalar(func)
    with contract.words(_OUTPUT_INDEPENDENT):
        gradient_at_point = linearize_derivative(
            call, gradient(call, strict=contract.strict, inspect=inspect)
        )
    constant = gradient_at_point.first_constant() if contract.strict and not compiling() else None
    if constant is not None:
        contract.refuse(GRADIENT_CONSTANT, input=constant)
    (output,) = gradient_at_point.aux
    return call, gradient_at_point, output


def _by_double_backward(
    contract: Contract, linearized: Linearization, tangents: list[Tensor], independent: str
) -> list[Tensor | None]:
    """The derivative's product with tangents; where strict, with legacy's errors for what the first pullback gives."""

    def inspect(pulled: list[Tensor | None]) -> None:
        for index, cotangent in enumerate(pulled if contract.strict else ()):
            if cotangent is None:
                contract.refuse(independent, input=index)
            if not cotangent.requires_grad:
                contract.refuse(_GRADIENT_INDEPENDENT, input=index)

    return linearized.jvp(inspect)(tangents)


def _check_outputs_of_jvp(call: Call, outputs: list[Any]) -> None:
    checks.tensor_outputs("jvp", outputs, call.path_of_output, any_dtype=True)
    if not all(map(is_differentiable, outputs)):
        raise OutputError("Only Tensors of floating point and complex dtype can require gradients")


def _is_tensor(leaf: object) -> bool:
    # Legacy takes a vector for an integer output too, and has no use for it.
    return isinstance(leaf, Tensor)


def _pushed(call: Call, tangents: list[Tensor]) -> tuple[Any, Any]:
    """Output and product by forward mode, on copies: a write in place succeeds, and is nobody else's."""
    copies = [primal.clone() for primal in call.primals]
    # The function enters forward mode itself.
    outputs, pushed, _ = push(call.evaluate, copies, tangents, mode=nullcontext)
    _check_outputs_of_jvp(call, outputs)
    return call.like_output(outputs), call.like_output(call.dense_tangents(outputs, pushed))
