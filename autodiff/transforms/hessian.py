"""Second derivatives: the Hessian, and its product with a vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Unpack, cast, overload

import torch
from torch import Tensor

from autodiff import checks
from autodiff._torch import compiling
from autodiff.core.call import Call, Lift
from autodiff.core.chunks import Sizes
from autodiff.core.forward import push
from autodiff.core.linearization import Linearization, derivative, gradient, linearize, linearize_derivative
from autodiff.core.products import Blocks
from autodiff.core.reverse import lifted_by
from autodiff.core.seeds import StandardBasis
from autodiff.core.tape import FlatFunction, Tape
from autodiff.transforms.jacobian import Jacobian, RowRange
from autodiff.transforms.mode_combinations import BY_ROWS, Mode, first_supported
from autodiff.types import A, Argnums, ChunkSize, HessianMode, HessianOptions, HvpMode, P, Trees, WithAux, Wrt

_HVP_MODES = ("auto", "reverse-over-reverse", "forward-over-reverse", "reverse-over-forward")
_HESSIAN_MODES = (*_HVP_MODES, "forward-over-forward")


@overload
def hessian(
    func: WithAux[P, A], argnums: Argnums = 0, *, has_aux: Literal[True], **kw: Unpack[HessianOptions]
) -> WithAux[P, A]: ...
@overload
def hessian(
    func: Callable[P, Any], argnums: Argnums = 0, *, has_aux: bool = False, **kw: Unpack[HessianOptions]
) -> Callable[P, Any]: ...
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
            Hessian one tensor of shape ``()``).
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
        wrt: which leaves to differentiate: a pattern of places (``"last.*"``, ``"*bias"``), or a tuple of patterns.

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
    outer, inner = _combination(mode)
    return Hessian(
        name="hessian",
        func=func,
        argnums=argnums,
        mode=outer,
        has_aux=has_aux,
        chunk_size=chunk_size,
        holomorphic=holomorphic,
        strict=strict,
        wrt=wrt,
        inner=inner,
        try_other_modes=mode == "auto",
    ).public()


def _combination(mode: HessianMode) -> tuple[Mode, Mode]:
    """The outer mode and the inner one."""
    if mode == "auto":
        return "reverse", "reverse"
    outer, _, inner = mode.split("-")
    return cast("Mode", outer), cast("Mode", inner)


@dataclass(kw_only=True, eq=False)
class Hessian(Jacobian):
    """The Jacobian of the Jacobian, which is found in the mode ``inner``.

    ``try_other_modes`` tries other combinations of modes where an operation lacks a rule.
    """

    inner: Mode = "reverse"
    try_other_modes: bool = False

    def blocks(self, call: Call) -> tuple[Blocks, list[Any]]:
        """A block for each block of the Jacobian and each primal, and the leaves of aux."""
        if not self.try_other_modes:
            return super().blocks(call)

        def in_combination(outer: Mode, inner: Mode) -> tuple[Blocks, list[Any]]:
            if (outer, inner) == (self.mode, self.inner):
                return super(Hessian, self).blocks(call)
            return replace(self, mode=outer, inner=inner, try_other_modes=False).blocks(call)

        return first_supported(self.name, in_combination)

    def some_rows(self, call: Call, start: int, stop: int) -> tuple[list[Tensor], list[RowRange]]:
        """As of any Jacobian, in the first mode combination that has them by pulls."""
        if not self.try_other_modes:
            return super().some_rows(call, start, stop)

        def in_combination(outer: Mode, inner: Mode) -> tuple[list[Tensor], list[RowRange]]:
            one = replace(self, mode=outer, inner=inner, try_other_modes=False)
            return one.some_rows(call, start, stop)

        return first_supported(self.name, in_combination, BY_ROWS)

    def nested(self, call: Call, blocks: Sequence[Sequence[Any]]) -> Any:
        """The blocks in trees.

        # H: [tree(out), tree(in), tree(in), *out_shape, *in_shape, *in_shape]
        """
        rows = [call.like_arguments(of_block) for of_block in blocks]
        count = len(call.primals)
        return call.like_output(
            [call.like_arguments(rows[at : at + count]) for at in range(0, len(rows), count)]
        )

    def flat_function(self, call: Call) -> FlatFunction:
        """The Jacobian's blocks, between leaves."""
        if self._inner_is_forward:
            return partial(self._pushed, call)
        flat = derivative(call, partial(self.first_derivative, call))

        def blocks_and_aux(leaves: Sequence[Tensor], lift: Lift | None) -> tuple[list[Any], list[Any]]:
            blocks, aux = flat(leaves, lift)
            return blocks, aux[call.output_count :]

        return blocks_and_aux

    def linearization(self, call: Call) -> Linearization:
        """The Jacobian, evaluated once."""
        if self._inner_is_forward:
            linearized = linearize(self.flat_function(call), call.primals, origin=call.func)
        else:
            linearized = linearize_derivative(call, partial(self.first_derivative, call))
        self.check_dependence(call, linearized, partial(self.path_of_output, call))
        return linearized

    def path_of_output(self, call: Call, position: int) -> str:
        """The place of a block of the Jacobian, written as code."""
        output, primal = divmod(position, len(call.primals))
        return call.path_of_primal(primal, call.path_of_output(output))

    def first_derivative(self, call: Call, tape: Tape) -> list[Tensor]:
        """The blocks of the Jacobian from one evaluation; for a scalar function, one pull."""
        linearized = Linearization(tape)
        self.check_outputs(call, linearized.outputs)
        self.check_dependence(call, linearized, call.path_of_output)
        if self.inner == "reverse" and len(linearized.outputs) == 1 and linearized.outputs[0].dim() == 0:
            pull = self.puller(linearized)
            # Not ones_like: of a batched tensor that would be a one for every sample, and a pull that keeps 10 % more.
            (one,) = StandardBasis(linearized.outputs).vectors(0, 1)
            return call.dense_cotangents(pull([one[0]], last=True))
        blocks = self.blocks_of(linearized, call.primals, self.inner, Sizes(None))
        return [block for of_output in blocks for block in of_output]

    @property
    def _inner_is_forward(self) -> bool:
        """Whether the Jacobian is found by pushes: not while torch.compile traces; see `push`."""
        return self.inner == "forward" and not compiling()

    def _pushed(self, call: Call, leaves: Sequence[Tensor], lift: Lift | None) -> tuple[list[Any], list[Any]]:
        """The Jacobian by pushes."""
        first = Jacobian.flat_function(self, call)
        blocks, aux = self.by_columns(call, lifted_by(lift, first), leaves, Sizes(None))
        return [block for of_output in blocks for block in of_output], aux


@overload
def hvp(
    func: Callable[..., Any], primals: Trees, tangents: Trees, *, mode: HvpMode = "auto"
) -> tuple[Tensor, Any]: ...
@overload
def hvp(
    func: WithAux[..., A], primals: Trees, tangents: Trees, *, mode: HvpMode = "auto", has_aux: Literal[True]
) -> tuple[Tensor, Any, A]: ...
@overload
def hvp(
    func: Callable[..., Any], primals: Trees, tangents: Trees, *, mode: HvpMode = "auto", has_aux: bool = ...
) -> Trees: ...
def hvp(
    func: Callable[..., Any],
    primals: Trees,
    tangents: Trees,
    *,
    mode: HvpMode = "auto",
    has_aux: bool = False,
) -> Trees:
    r"""Value of a scalar function and the product of its Hessian with a vector, without the Hessian.

    .. math:: \operatorname{hvp}(f, x, t) = (f(x),\; \nabla^2 f(x)\, t)

    B. A. Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6 (1994).

    >>> import torch
    >>> hvp(lambda x: (x**3).sum(), (torch.tensor([1.0, 2.0]),), (torch.tensor([1.0, 10.0]),))
    (tensor(9.), tensor([  6., 120.]))

    Args:
        func: a function of the primals that returns one real tensor of shape ``()``.
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

    def product(outer: Mode, inner: Mode) -> tuple[Tensor, list[Tensor | None], list[Any]]:
        return _product(call, directions, outer, inner)

    value, pushed, aux = first_supported("hvp", product) if mode == "auto" else product(*_combination(mode))
    shaped = call.like_arguments(call.dense_cotangents(pushed))
    result = value, shaped[0] if len(primals) == 1 else shaped
    return (*result, call.aux(aux)) if has_aux else result


def _product(
    call: Call, directions: list[Tensor], outer: Mode, inner: Mode
) -> tuple[Tensor, list[Tensor | None], list[Any]]:
    """The value, the Hessian's product for each primal (None for zero), and the leaves of aux."""
    if inner == "forward":
        # The gradient of the directional derivative.
        def directional_derivative(
            leaves: Sequence[Tensor], lift: Lift | None
        ) -> tuple[list[Any], list[Any]]:
            pushed = push(lifted_by(lift, call.evaluate), leaves, directions)
            checks.scalar_output("hvp", call.out_spec, pushed.outputs)
            return call.dense_tangents(pushed.outputs, pushed.tangents), [*pushed.outputs, *pushed.aux]

        linearized = linearize(directional_derivative, call.primals, origin=call.func)
        value, *aux = linearized.aux
        return value, linearized.vjp([torch.ones_like(linearized.outputs[0])], last=True), aux
    if outer == "forward":
        pushed = push(derivative(call, gradient(call)), call.primals, directions)
        value, *aux = pushed.aux
        return value, pushed.tangents, aux
    slope = linearize_derivative(call, gradient(call))
    return slope.values[0], slope.hvp(directions, last=True), slope.aux
