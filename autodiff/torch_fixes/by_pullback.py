"""Forward mode by reverse mode: an operation's pushforward is the pullback of its pullback.

Provides `by_pullback`, an override that differentiates one operation so, in both modes and at every order, and
`by_pullback_of_same_draw`, for operations that may draw random numbers.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autodiff import _torch, checks
from autodiff.core import trees
from autodiff.core.call import is_differentiable, spread
from autodiff.core.randomness import has_drawn, random_numbers_from, random_state
from autodiff.core.reverse import rerecord
from autodiff.core.rules import Rules, attach
from autodiff.core.transpose import transpose
from autodiff.errors import ForwardRuleError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autodiff.core.randomness import RandomState
    from autodiff.core.reverse import Flat


_WAY_OUT = (
    "has no correct rule for forward mode in torch. The derivative of its pullback was used instead, and failed. Use "
    "reverse mode: grad, vjp or jacrev."
)


_OTHER_VALUES = (
    "gave other values when it ran again for its derivative: the tangent would be that of another draw. Expected an "
    "operation that draws from torch's default generators, which are set back for the second run, or from a "
    "torch.Generator among its arguments. Use reverse mode: grad, vjp or jacrev; or pass the random numbers to it."
)
# Another run may sum in another order.
_SAME = {torch.float64: 1e-6, torch.complex128: 1e-6}


def by_pullback(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call's result, differentiated by the pullback of this operation alone."""
    return _by_pullback(func, args, kwargs, may_draw=False)


def by_pullback_of_same_draw(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The same of an operation that may draw random numbers: what it gives when it runs again is the same draw."""
    return _by_pullback(func, args, kwargs, may_draw=True)


def _by_pullback(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, may_draw: bool
) -> Any:
    leaves, spec = trees.flatten((args, kwargs))
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    out_spec: Any = None

    def flat(tensors: Sequence[Tensor]) -> list[Any]:
        nonlocal out_spec
        filled = list(leaves)
        for position, tensor in zip(where, tensors, strict=True):
            filled[position] = tensor
        args, kwargs = trees.unflatten(spec, filled)
        # The operation itself: a rule may run where it would be overridden again.
        with _torch.WithoutFunctionModes():
            outputs, out_spec = trees.flatten(func(*args, **kwargs))
        return outputs

    flat.__name__ = getattr(func, "__name__", str(func))
    tensors = [leaves[i] for i in where]
    if may_draw:
        generators = [leaf for leaf in leaves if isinstance(leaf, torch.Generator)]
        result = _of_same_draw(flat, tensors, random_state(generators))
    else:
        result = _with_pullback_rules(flat, tensors)
    return trees.unflatten(out_spec, result)


def _of_same_draw(func: Flat, tensors: Sequence[Tensor], states: RandomState) -> list[Any]:
    """``func`` of the tensors, which draws the same numbers when it runs again."""
    values = func([tensor.detach() for tensor in tensors])
    drew = has_drawn(states)

    def again(tensors: Sequence[Tensor]) -> list[Any]:
        with random_numbers_from(states) if drew else nullcontext():
            outputs = func(tensors)
        # Inside a transform a value may have other batches than it had.
        if not _torch.functorch_active() and not all(map(_is_same, outputs, values)):
            raise ForwardRuleError(f"forward mode: {func.__name__} {_OTHER_VALUES}")
        return outputs

    again.__name__ = func.__name__
    return attach(_ByPullback(again), values, tensors)


def _is_same(output: Any, value: Any) -> bool:
    if not is_differentiable(value):
        return True
    closeness = _SAME.get(value.dtype, 1e-2)
    return torch.allclose(output.detach(), value, rtol=closeness, atol=closeness, equal_nan=True)


def _with_pullback_rules(func: Flat, tensors: Sequence[Tensor]) -> list[Any]:
    """``func`` of the tensors, differentiated by its pullback."""
    return attach(_ByPullback(func), func([tensor.detach() for tensor in tensors]), tensors)


class _ByPullback(Rules):
    """Both modes by pullbacks alone, also where these are differentiated forward in turn."""

    def __init__(self, func: Flat) -> None:
        self._func = func

    def pull(
        self, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        given, seeds = _without_none(cotangents)

        def pulled(tensors: Sequence[Tensor]) -> list[Any]:
            tape, where = rerecord(self._func, tensors[: len(saved)], wanted)
            result = tape.pull(spread(tensors[len(saved) :], given, len(cotangents)))
            return list(spread(result, where, len(saved)))

        return _pushed_by_pullback(pulled, [*saved, *seeds])

    def push(self, saved: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        given, vectors = _without_none(tangents)

        def pushed(tensors: Sequence[Tensor]) -> list[Any]:
            filled = spread(tensors[len(saved) :], given, len(saved))
            everything = [True] * len(saved)
            try:
                with nullcontext() if _torch.functorch_active() else _torch.ForwardModeIgnored():
                    tape, where = rerecord(self._func, tensors[: len(saved)], everything, higher_order=True)
                    return transpose(tape)([filled[i] for i in where])
            except (RuntimeError, NotImplementedError) as error:
                checks.advise("forward mode", error, ("",), f"{self._func.__name__} {_WAY_OUT}")
                raise

        return _pushed_by_pullback(pushed, [*saved, *vectors])


def _without_none(vectors: Sequence[Tensor | None]) -> tuple[list[int], list[Tensor]]:
    """Where there are vectors, and these."""
    pairs = [(i, vector) for i, vector in enumerate(vectors) if vector is not None]
    return [i for i, _ in pairs], [vector for _, vector in pairs]


def _pushed_by_pullback(func: Flat, tensors: Sequence[Tensor]) -> list[Any]:
    """``func`` of the tensors; where these carry tangents of an outer forward mode, by pullbacks again."""
    if _torch.forward_level_active() and any(map(_torch.has_tangent_at_any_depth, tensors)):
        return _with_pullback_rules(func, tensors)
    return func(tensors)
