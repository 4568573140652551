"""Floor 3: vjp, jvp, vhp and hvp as torch.autograd.functional has them, made of the transforms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autodiff.core import checks
from autodiff.core.arguments import Call
from autodiff.core.batch import remember_randomness
from autodiff.core.tape import record
from autodiff.functional.contract import Contract
from autodiff.functional.forward import BackwardOnly, BackwardOnlyError
from autodiff.transforms.grad import dense
from autodiff.transforms.hessian import gradient_tape
from autodiff.transforms.jvp import dense_tangents
from autodiff.transforms.jvp import jvp as transform_jvp
from autodiff.transforms.linearize import transpose
from autodiff.transforms.vjp import vjp as transform_vjp

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from autodiff.core.tape import Tape

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
_JACOBIAN_CONSTANT = (
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
_ONE_INPUT = "the input to the user-provided function is a single Tensor with a single element."


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
    call = Contract("vjp", inputs, create_graph, strict)
    with call.modes():
        output, pullback = transform_vjp(call.checked(func), *call.args, strict=strict)
        cotangents = call.vector(v, output, isinstance(output, tuple), _ONE_OUTPUT)
        with call.words(_OUTPUT_INDEPENDENT):
            product = pullback(cotangents, retain_graph=False)
    if strict and create_graph:
        call.refuse_constants(product, _JACOBIAN_CONSTANT)
    return output, call.outward(product)


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
    call = Contract("jvp", inputs, create_graph, strict)
    tangents = _input_vector(call, v)
    with call.modes():
        if not (strict or create_graph):
            rewind = remember_randomness(call.args)
            try:
                return transform_jvp(_as_forward_sees(call.checked(func)), call.args, tangents)
            except (BackwardOnlyError, RuntimeError):
                # No forward rule, or something in func that only a backward pass honours. An error of
                # func's own comes again below.
                rewind()
        recorded = Call("jvp", call.checked(func), call.args, {}, None, has_aux=False)
        tape = record(recorded.evaluate, recorded.primals)
        checks.tensor_outputs("jvp", tape.outputs, recorded.path_of_output)
        push = transpose(tape, _looking_for_independence(call, _OUTPUT_INDEPENDENT))
        pushed = push(recorded.tangents("v", tangents))
        with call.words(_ENTRY_INDEPENDENT):
            product = recorded.like_output(dense_tangents(recorded, tape.outputs, pushed, strict))
        output = recorded.like_output(tape.outputs)
    if strict and create_graph:
        call.refuse_constants(product, _JACOBIAN_CONSTANT)
    return output, product


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
    vector = _input_vector(contract, v)
    with contract.modes():
        call, tape, output = _second_order(contract, func)
        with contract.words(_JACOBIAN_INDEPENDENT):
            product = call.like_arguments(dense(call, tape.pull(call.tangents("v", vector)), strict))
    if strict and create_graph:
        contract.refuse_constants(product, _HESSIAN_CONSTANT)
    return output, contract.outward(product)


def hvp(
    func: Callable[..., Any], inputs: Any, v: Any = None, create_graph: bool = False, strict: bool = False
) -> tuple[Any, Any]:
    r"""Value of a function and the product of its Hessian with a vector.

    .. math:: (f(x),\; \nabla^2 f(x)\, v)

    The Hessian is symmetric, so this is :func:`vhp`, about twice as fast as the double-backward trick.
    Where func's graph holds an ``autograd.Function``, whose gradient need not be the gradient of
    anything, the trick is used, as torch does.

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
    vector = _input_vector(contract, v)
    with contract.modes():
        custom: list[bool] = []
        call, tape, output = _second_order(
            contract, func, lambda value: custom.append(value.has_custom_gradient())
        )
        tangents = call.tangents("v", vector)
        if strict or custom[0]:
            push = transpose(tape, _looking_for_independence(contract, _JACOBIAN_INDEPENDENT))
            pushed = push(tangents)
        else:
            pushed = tape.pull(tangents)
        with contract.words(_HESSIAN_ENTRY_INDEPENDENT):
            product = call.like_arguments(dense(call, pushed, strict))
    if strict and create_graph:
        contract.refuse_constants(product, _HESSIAN_CONSTANT)
    return output, contract.outward(product)


def _second_order(
    contract: Contract, func: Callable[..., Any], look: Callable[[Tape], None] = lambda _: None
) -> tuple[Call, Tape, Tensor]:
    """The gradient of a function of one number, recorded, and the number as the function shaped it.

    ``look`` is shown the tape of the number.
    """
    call = Call(contract.name, contract.scalar(func), contract.args, {}, None, has_aux=True)
    with contract.words(_OUTPUT_INDEPENDENT):
        tape = gradient_tape(call, strict=contract.strict, look=look)
    constant = tape.first_constant() if contract.strict else None
    if constant is not None:
        contract.refuse(GRADIENT_CONSTANT, input=constant)
    _, output = tape.aux
    return call, tape, output


def _looking_for_independence(contract: Contract, message: str) -> Callable[[list[Tensor | None]], None]:
    """Where strict: legacy's errors for what the first pullback of its double-backward trick gives."""

    def look(pulled: list[Tensor | None]) -> None:
        if not contract.strict:
            return
        for index, cotangent in enumerate(pulled):
            if cotangent is None:
                contract.refuse(message, input=index)
            if not cotangent.requires_grad:
                contract.refuse(_GRADIENT_INDEPENDENT, input=index)

    return look


def _input_vector(call: Contract, v: Any) -> tuple[Any, ...]:
    """``v`` as a tuple over the arguments."""
    like = call.args if call.several else call.args[0]
    vector = call.vector(v, like, call.several, _ONE_INPUT)
    return vector if call.several else (vector,)


def _as_forward_sees(func: Callable[..., Any]) -> Callable[..., Any]:
    def watched(*args: Any) -> Any:
        with BackwardOnly():
            return func(*args)

    return watched
