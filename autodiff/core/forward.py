"""Floor 1: forward mode. Push tangents forward through one run of a function.

Works on flat lists of tensors and hands on `push`, which gives None for an output that carries no
tangent. Never sees a tree; imports `_torch`, `attention`, `tape` and `corrections`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from autodiff import _torch
from autodiff.core.reverse import record, recorded_outside, transpose
from autodiff.torch_fixes import attention
from autodiff.torch_fixes.forward_mode import corrected

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from autodiff.core.call import Lift
    from autodiff.core.reverse import Recordable


class Pushed(NamedTuple):
    """What one run left: outputs, their tangents (None where there is none), and aux."""

    outputs: list[Any]
    tangents: list[Tensor | None]
    aux: list[Any]


@_torch.whole
def push(
    func: Recordable,
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor],
    *,
    mode: Callable[[], AbstractContextManager[Any]] = corrected,
) -> Pushed:
    """Run ``func`` once with a tangent on every primal, inside ``mode``."""
    if _torch.compiling():
        return _push_traced(func, primals, tangents)
    # On plain tensors torch's rules for softmax and its kin write over what their pullback needs.
    on_ground = _torch.on_ground() and not recorded_outside((*primals, *tangents))
    on = _push_on_ground if on_ground else _push_on_level

    def moded(leaves: Sequence[Tensor], lift: Lift | None) -> tuple[list[Any], list[Any]]:
        # Around the function alone: what is done here with its duals costs twice as much inside.
        with mode():
            return func(leaves, lift)

    with attention.unfused:
        pushed = on(moded, primals, tangents)
    if torch.is_grad_enabled() or _torch.forward_level_active():
        return pushed
    # A pull inside made a graph, since tangents need one, but grad mode is off out here.
    return Pushed(*([_torch.detached(leaf) for leaf in leaves] for leaves in pushed))


def _push_on_ground(func: Recordable, primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> Pushed:
    with _torch.dual_ground():
        outputs, aux = func(_duals(primals, tangents), _torch.outside_inference)
        pairs = [_split(output) for output in outputs]
        aux = [_split(leaf)[0] for leaf in aux]
    return Pushed([primal for primal, _ in pairs], [tangent for _, tangent in pairs], aux)


def _push_on_level(func: Recordable, primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> Pushed:
    with _torch.dual_stacked() as level:
        outputs, aux = func(_duals(primals, tangents), lambda tensor: _torch.wrap(tensor, level))
        pairs = [_split(output) for output in outputs]
        return Pushed(
            [_torch.unwrap(primal, level) for primal, _ in pairs],
            [_torch.unwrap(tangent, level) for _, tangent in pairs],
            [_torch.unwrap(_split(leaf)[0], level) for leaf in aux],
        )


def _push_traced(func: Recordable, primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> Pushed:
    """The pullback of the pullback: what of it no result needs, the compiler leaves out.

    The compiled code is as fast as that of torch.func.jvp, whose rules need corrections that no tracer can follow, and
    end the process at a tangent that is a zero without memory.
    """
    tape = record(func, primals, twice=True)
    return Pushed(tape.outputs, transpose(tape)(tangents), tape.aux)


def _duals(primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> list[Tensor]:
    return [
        _torch.make_dual(_torch.outside_inference(primal), _torch.outside_inference(tangent))
        for primal, tangent in zip(primals, tangents, strict=True)
    ]


def _split(leaf: Any) -> tuple[Any, Tensor | None]:
    if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
        return leaf, None
    primal, tangent = _torch.unpack_dual(leaf)
    if tangent is not None and tangent.dtype != primal.dtype:
        # torch promotes the tangent of a 0-dim float32 tensor times a Python float to float64.
        tangent = tangent.to(primal.dtype)
    return primal, tangent
