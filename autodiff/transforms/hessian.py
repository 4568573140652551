"""Floor 2: second derivatives, composed of two first ones. Builds on `core`, `grad` and `blocks`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, assert_never

import torch

from autodiff import checks
from autodiff._torch import compiling
from autodiff.core.call import Call
from autodiff.core.forward import push
from autodiff.core.reverse import lifted_by, record, record_pull
from autodiff.transforms.blocks import by_mode
from autodiff.transforms.grad import dense
from autodiff.transforms.mode_combinations import ORDERS, first_that_has_rules

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from autodiff.core.call import Argnums, Lift, Wrt
    from autodiff.core.chunks import ChunkSize
    from autodiff.core.reverse import Tape
    from autodiff.transforms.blocks import JacobianMode

HessianMode: TypeAlias = Literal[
    "auto", "reverse-over-reverse", "forward-over-reverse", "reverse-over-forward", "forward-over-forward"
]
HvpMode: TypeAlias = Literal["auto", "reverse-over-reverse", "forward-over-reverse", "reverse-over-forward"]

_HVP_MODES = ("auto", "reverse-over-reverse", "forward-over-reverse", "reverse-over-forward")
_HESSIAN_MODES = (*_HVP_MODES, "forward-over-forward")


def hessian(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    mode: HessianMode = "auto",
    has_aux: bool = False,
    chunk_size: ChunkSize = None,
    holomorphic: bool = False,
    strict: bool = False,
    wrt: Wrt = None,
) -> Callable[..., Any]:
    r"""Hessian: ``jacrev(jacrev(f))`` by default, the Jacobian of the Jacobian.

    .. math:: \operatorname{hessian}(f)(x)_{ij} = \partial^2 f / \partial x_i \partial x_j

    For a scalar function the inner Jacobian is the gradient, found by one pull, and the outer one pulls
    all its rows in one batch. It takes less time and memory than forward over reverse in every case
    measured on the CPU (docs/architecture.md).

    >>> import torch
    >>> hessian(lambda x: x[0] ** 2 * x[1])(torch.tensor([1.0, 3.0]))
    tensor([[6., 2.],
            [2., 0.]])

    Args:
        func: a function of trees that returns a tree of floating or complex tensors (for the usual
            Hessian one tensor of shape ``()``), or a pair ``(output, aux)`` if ``has_aux``.
        argnums: which arguments to differentiate: a position, a parameter name, or a tuple of them.
        mode: ``"reverse-over-reverse"``, ``"forward-over-reverse"``, ``"reverse-over-forward"`` or
            ``"forward-over-forward"``: the outer mode over the inner one; or ``"auto"``, the first of these
            for which no operation lacks a rule. The function runs again for another one.
        has_aux: whether ``func`` returns ``(output, aux)``.
        chunk_size: how many rows to compute in one batch; None computes all, ``"auto"`` learns from the
            first rows how many fit in half of the free memory. Less takes less memory.
        holomorphic: differentiate a complex function of complex arguments.
        strict: raise where an output or its derivative does not depend on a leaf, as that of a linear
            function does, instead of giving zeros.
        wrt: which leaves of these arguments to differentiate, by patterns of their places, as for
            :func:`autodiff.grad`.

    Returns:
        A function of ``func``'s arguments that returns a tree like the output, holding at every leaf a
        tree like the selected argument, and in that again one, whose floating leaves hold blocks of
        shape ``(*out_shape, *in_shape_i, *in_shape_j)``. With ``has_aux`` it returns ``(hessian, aux)``.

    Raises:
        OptionError: ``mode`` is unknown, or ``chunk_size`` is not a positive int, ``"auto"`` or None.
        DtypeError: complex tensors without ``holomorphic``, or real ones with it.
        OutputError: the output is empty, or holds something else than floating or complex tensors.
        ArgnumsError, LeafError: ``argnums`` or ``wrt`` does not fit the call, or selects nothing to differentiate.
        IndependenceError: ``strict`` and an output or its derivative is independent of a leaf.
        MissingRuleError: ``mode="auto"``, and torch lacks a rule for every order.
    """
    checks.choice("hessian", "mode", mode, _HESSIAN_MODES)
    checks.chunk_size("hessian", chunk_size)
    outer: JacobianMode
    inner: JacobianMode
    match mode:
        case "auto" | "reverse-over-reverse":
            outer, inner = "reverse", "reverse"
        case "forward-over-reverse":
            outer, inner = "forward", "reverse"
        case "reverse-over-forward":
            outer, inner = "reverse", "forward"
        case "forward-over-forward":
            outer, inner = "forward", "forward"
        case _:
            assert_never(mode)

    def over(
        outer: JacobianMode, inner: JacobianMode, others: Callable[[], Any] = tuple
    ) -> Callable[..., Any]:
        first = by_mode(
            "hessian", func, argnums, inner, has_aux, None, holomorphic, strict, wrt=wrt, inner=True
        )
        return by_mode(
            "hessian", first, argnums, outer, has_aux, chunk_size, holomorphic, strict, wrt=wrt, others=others
        )

    if mode == "auto":
        return over(outer, inner, lambda: [over(*order) for order in ORDERS[1:]])
    return over(outer, inner)


def hvp(
    func: Callable[..., Any],
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
    *,
    mode: HvpMode = "auto",
    has_aux: bool = False,
) -> tuple[Any, ...]:
    r"""Value of a scalar function and the product of its Hessian with a vector, without the Hessian.

    .. math:: \operatorname{hvp}(f, x, t) = (f(x),\; \nabla^2 f(x)\, t)

    B. A. Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6 (1994).

    >>> import torch
    >>> hvp(lambda x: (x**3).sum(), (torch.tensor([1.0, 2.0]),), (torch.tensor([1.0, 10.0]),))
    (tensor(9.), tensor([  6., 120.]))

    Args:
        func: a function of the primals that returns one real tensor of shape ``()``, or a pair
            ``(value, aux)`` if ``has_aux``.
        primals: a tuple of ``func``'s positional arguments, each any tree.
        tangents: a tuple of the same structure, with a tensor of the leaf's shape and dtype at every
            floating and complex leaf.
        mode: ``"reverse-over-reverse"``, ``"forward-over-reverse"`` or ``"reverse-over-forward"``, or
            ``"auto"``, the first of these for which no operation lacks a rule.
        has_aux: whether ``func`` returns ``(value, aux)``.

    Returns:
        ``(value, product)``, and ``(value, product, aux)`` with ``has_aux``. The product is a tree like
        the one primal, or a tuple of such trees where there are several.

    Raises:
        StructureError, ShapeError, DtypeError: tangents do not match the primals.
        OutputError: the output is not one real scalar tensor.
        OptionError: ``mode`` is unknown.
        LeafError: no primal holds a floating or complex tensor.
        MissingRuleError: ``mode="auto"``, and torch lacks a rule for every order.
    """
    checks.choice("hvp", "mode", mode, _HVP_MODES)
    checks.tuple_of_primals("hvp", primals)
    call = Call("hvp", func, primals, {}, None, has_aux)
    directions = call.tangents("tangents", tangents)
    match mode:
        case "auto":
            value, product, aux = _in_the_first_order(call, directions)
        case "reverse-over-reverse":
            value, product, aux = _reverse_over_reverse(call, directions)
        case "forward-over-reverse":
            value, product, aux = _forward_over_reverse(call, directions)
        case "reverse-over-forward":
            value, product, aux = _reverse_over_forward(call, directions)
        case _:
            assert_never(mode)
    shaped = call.like_arguments(dense(call, product, strict=False))
    result = value, shaped[0] if len(primals) == 1 else shaped
    return (*result, call.aux(aux)) if has_aux else result


# Each gives the value, the product for each primal (None for zero), and the leaves of aux.
_Product: TypeAlias = "tuple[Tensor, list[Tensor | None], list[Any]]"


def _in_the_first_order(call: Call, directions: list[Tensor]) -> _Product:
    """Of the orders, the first for which no operation lacks a rule."""
    if compiling():
        return _reverse_over_reverse(call, directions)
    others = (_forward_over_reverse, _reverse_over_forward)
    return first_that_has_rules(
        call.name,
        lambda: _reverse_over_reverse(call, directions),
        lambda: [partial(other, call, directions) for other in others],
    )


def _reverse_over_reverse(call: Call, directions: list[Tensor]) -> _Product:
    """The pullback of the gradient: the Hessian is symmetric."""
    tape = gradient_tape(call)
    value, *aux = tape.aux
    return value, tape.pull(directions), aux


def _forward_over_reverse(call: Call, directions: list[Tensor]) -> _Product:
    """The pushforward of the gradient."""

    def slopes(leaves: Sequence[Tensor], lift: Lift | None) -> tuple[list[Any], list[Any]]:
        return _gradient(call, record(lifted_by(lift, call.evaluate), leaves, inner=True))

    pushed = push(slopes, call.primals, directions)
    value, *aux = pushed.aux
    return value, pushed.tangents, aux


def _reverse_over_forward(call: Call, directions: list[Tensor]) -> _Product:
    """The gradient of the directional derivative."""

    def slope(leaves: Sequence[Tensor], lift: Lift | None) -> tuple[list[Any], list[Any]]:
        pushed = push(lifted_by(lift, call.evaluate), leaves, directions)
        checks.scalar_output("hvp", call.out_spec, pushed.outputs)
        return [_or_zeros(t, pushed.outputs[0]) for t in pushed.tangents], [*pushed.outputs, *pushed.aux]

    tape = record(slope, call.primals)
    value, *aux = tape.aux
    return value, tape.pull([torch.ones_like(tape.outputs[0])]), aux


def gradient_tape(call: Call, *, strict: bool = False, look: Callable[[Tape], None] = lambda _: None) -> Tape:
    """The gradient of one call, recorded; the value and aux ride along as the tape's aux.

    ``look`` is shown the tape of the value.
    """

    def pull(tape: Tape) -> tuple[list[Any], list[Any]]:
        look(tape)
        return _gradient(call, tape, strict)

    return record_pull(call.evaluate, call.primals, pull)


def _gradient(call: Call, tape: Tape, strict: bool = False) -> tuple[list[Any], list[Any]]:
    checks.scalar_output(call.name, call.out_spec, tape.outputs)
    pulled = tape.pull([torch.ones_like(tape.outputs[0])])
    return dense(call, pulled, strict), [*tape.outputs, *tape.aux]


def _or_zeros(tensor: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tensor is None else tensor
