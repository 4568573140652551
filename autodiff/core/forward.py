"""Forward mode: push tangents forward through one run of a function.

Works on flat lists of tensors and provides `push`, which gives None for an output that carries no
tangent. Never sees a tree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor

from autodiff import _torch
from autodiff.core import hooks
from autodiff.core.reverse import record
from autodiff.core.tape import recorded_outside
from autodiff.core.transpose import transpose

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from autodiff.core.call import Lift
    from autodiff.core.tape import FlatFunction


class Pushed(NamedTuple):
    """The result of one run: outputs, their tangents (None where there is none), and aux."""

    outputs: list[Any]
    tangents: list[Tensor | None]
    aux: list[Any]


class ForwardMode(_torch.FunctionMode):
    """Sends every operation that a function calls to its override, if it has one: 0.9 us for each operation."""

    def __enter__(self) -> Self:
        # Inside itself it would see every operation twice.
        self._entered = type(_torch.function_mode()) is not type(self)
        return super().__enter__() if self._entered else self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._entered:
            super().__exit__(kind, error, trace)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            override = hooks.forward_overrides.get(func) or hooks.forward_overrides_by_type.get(type(func))
            # A pull may run a checkpoint again, which is not part of the forward mode around it.
            if override is not None and _torch.forward_level_active():
                return override(func, args, kwargs or {})
            return func(*args, **kwargs) if kwargs else func(*args)
        except NotImplementedError as error:
            for find in hooks.missing_forward_rule.values():
                override = find(func, error)
                if override is not None:
                    try:
                        return override(func, args, kwargs or {})
                    except (RuntimeError, NotImplementedError):
                        raise error from None
            raise


@_torch.traced_inline_only
def push(
    func: FlatFunction,
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor],
    *,
    mode: Callable[[], AbstractContextManager[Any]] = ForwardMode,
) -> Pushed:
    """Run ``func`` once with a tangent on every primal, inside ``mode``."""
    if _torch.compiling():
        return _push_traced(func, primals, tangents)
    if torch.is_inference_mode_enabled():
        return _torch.without_inference_mode(push, func, primals, tangents, mode=mode)
    return _torch.under_guard(_push, func, primals, tangents, mode)


def _push(
    func: FlatFunction,
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor],
    mode: Callable[[], AbstractContextManager[Any]],
) -> Pushed:
    # Plain forward AD may write over what the pullback of a tangent needs.
    eager = _torch.is_eager() and not recorded_outside((*primals, *tangents))
    push_impl = _push_eagerly if eager else _push_on_level

    def in_mode(leaves: Sequence[Tensor], lift: Lift | None) -> tuple[list[Any], list[Any]]:
        # Around the function alone: the mode would also intercept how dual tensors are made and opened.
        with mode():
            return func(leaves, lift)

    pushed: Pushed = hooks.around_higher_order(push_impl, in_mode, primals, tangents)
    if torch.is_grad_enabled() or _torch.forward_level_active():
        return pushed
    # A pull inside made a graph, since tangents need one, but grad mode is off out here.
    return Pushed(*([_torch.detached(leaf) for leaf in leaves] for leaves in pushed))


def _push_eagerly(func: FlatFunction, primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> Pushed:
    with _torch.eager_forward_level():
        outputs, aux = func(_duals(primals, tangents), _torch.outside_inference_mode)
        pairs = [_split(output) for output in outputs]
        aux = [_split(leaf)[0] for leaf in aux]
    return Pushed([primal for primal, _ in pairs], [tangent for _, tangent in pairs], aux)


def _push_on_level(func: FlatFunction, primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> Pushed:
    with _torch.functorch_forward_level() as level:
        outputs, aux = func(_duals(primals, tangents), lambda tensor: _torch.wrap(tensor, level))
        pairs = [_split(output) for output in outputs]
        return Pushed(
            [_torch.unwrap(primal, level) for primal, _ in pairs],
            [_torch.unwrap(tangent, level) for _, tangent in pairs],
            [_torch.unwrap(_split(leaf)[0], level) for leaf in aux],
        )


def _push_traced(func: FlatFunction, primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> Pushed:
    """The pullback of the pullback: the compiler removes what no result needs.

    The compiled code is as fast as that of torch.func.jvp, and needs no overrides, which no tracer can follow.
    """
    tape = record(func, primals, higher_order=True)
    return Pushed(tape.outputs, transpose(tape)(tangents), tape.aux)


def _duals(primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> list[Tensor]:
    return [
        _torch.make_dual(_prepared(primal), _torch.outside_inference_mode(tangent))
        for primal, tangent in zip(primals, tangents, strict=True)
    ]


def _prepared(primal: Tensor) -> Tensor:
    """A primal that can carry a tangent. It gets the strides: elements in one place, as in unfold, would share it."""
    primal = _torch.outside_inference_mode(primal)
    return primal.clone() if _torch.may_overlap(primal) else primal


def _split(leaf: Any) -> tuple[Any, Tensor | None]:
    if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
        return leaf, None
    return _torch.unpack_dual(leaf)
