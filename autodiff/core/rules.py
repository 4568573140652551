"""Operations whose derivatives are given by rules, under every transform and at every order.

Provides `Rules`, and `attach`, which ties values to the tensors that they depend on by rules. Never sees a tree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from autodiff import _torch
from autodiff.core import batch
from autodiff.core.call import is_differentiable
from autodiff.core.specs import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from autodiff.types import Randomness


class Rules(ABC):
    """How an operation is differentiated. ``saved`` are the tensors that it depends on.

    A rule is evaluated inside the transforms that surround its use, and is itself differentiated there.
    None stands for a zero vector, and for that of a tensor that is not differentiated.
    """

    @abstractmethod
    def pull(
        self, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """A cotangent for each of ``saved``; what is given where it is not ``wanted`` is ignored."""

    def user_code(self) -> Iterable[Any]:
        """The code of the user's that the rules run: it may reach more than ``saved``, and need not be linear."""
        return ()

    @abstractmethod
    def push(self, saved: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """A tangent for each output."""


def attach(
    rules: Rules, values: Sequence[Any], saved: Sequence[Tensor], *, constant: bool = True
) -> list[Any]:
    """``values``, differentiated by ``rules``; leaves that are no floating or complex tensors as they are.

    ``constant`` values are cut off from all graphs first. What is differentiated is a zero that is added to them: minus
    zero, which leaves the sign of a zero alone. So a value may be computed anywhere, and be any tensor.
    """
    if constant:
        values = [value.detach() if isinstance(value, Tensor) else value for value in values]
    values = list(values)
    where = [i for i, value in enumerate(values) if is_differentiable(value)]
    specs = [TensorSpec.of(values[i]) for i in where]
    for i, zero in zip(where, _RuleFunction.apply(_RulesAndSpecs(rules, specs), *saved), strict=True):
        values[i] = values[i] + zero
    return values


def user_code(node: Any) -> Sequence[Any]:
    """What the backward of an autograd Function may run that is the user's; empty for rules of this package."""
    ruled: _RulesAndSpecs | None = getattr(node, "ruled", None)
    if ruled is not None:
        return list(ruled.rules.user_code())
    classes = _torch.user_function(node).__mro__
    own = (cls for cls in classes if not cls.__module__.startswith("torch.") and cls is not object)
    return [vars(node), *(member for cls in own for member in vars(cls).values())]


def is_tracked(tensor: Tensor) -> bool:
    """Whether what is made of the tensor now is differentiated: by a graph, or by a tangent.

    Without grad mode a level inside others hides from itself alone.
    """
    with _torch.WithoutFunctionModes():  # no mode of the user's sees what is inside wrappers
        if (torch.is_grad_enabled() or _torch.functorch_active()) and _torch.requires_grad_at_any_depth(
            tensor
        ):
            return True
        return _torch.forward_level_active() and _torch.has_tangent_at_any_depth(tensor)


def inplace_counts(leaves: Iterable[Any]) -> list[int]:
    """How often each tensor was written in place, below all wrappers; those of inference mode do not know."""
    with _torch.WithoutFunctionModes():  # no mode of the user's sees what is inside wrappers
        tensors = [_torch.fully_unwrapped(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
        return _torch.versions([tensor for tensor in tensors if not tensor.is_inference()])


class _RulesAndSpecs(NamedTuple):
    """Rules, and what the outputs look like."""

    rules: Rules
    specs: Sequence[TensorSpec]


class _RuleFunction(torch.autograd.Function):
    """Zeros with the derivatives that the rules give.

    torch dispatches a Function level by level. Forward mode is off inside its jvp, for all levels, and the
    saved tensors still carry the tangents of this one: as it stands, the outer of two forward modes sees zeros.
    """

    autodiff_jvp_nests = True  # its jvp has seen to that

    @staticmethod
    def forward(ruled: _RulesAndSpecs, *saved: Tensor) -> tuple[Tensor, ...]:
        del saved
        return tuple(spec.full(-0.0) for spec in ruled.specs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        del output
        ctx.ruled, *saved = inputs
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        # The level that recorded them may be gone, and is not to be taken for one that still watches.
        saved = [_torch.unwrapped_if_dead(tensor) for tensor in ctx.saved_tensors]
        return (None, *ctx.ruled.rules.pull(saved, cotangents, ctx.needs_input_grad[1:]))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        with _torch.ForwardModeAllowed():
            primals = [_torch.unpack_dual(tensor)[0] for tensor in ctx.saved_tensors]
            pushed = ctx.ruled.rules.push(primals, tangents)
            pairs = zip(pushed, ctx.ruled.specs, strict=True)
            return tuple(spec.full(0.0) if tangent is None else tangent for tangent, spec in pairs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], ruled: _RulesAndSpecs, *saved: Tensor) -> Any:
        rules = _Batched(ruled.rules, in_dims[1:], info.batch_size, info.randomness)
        specs = [one._replace(shape=(info.batch_size, *one.shape)) for one in ruled.specs]
        return _RuleFunction.apply(_RulesAndSpecs(rules, specs), *saved), (0,) * len(specs)


class _Batched(Rules):
    """The same operation on a batch: its rules under vmap. Outputs have their batch first."""

    def __init__(self, rules: Rules, dims: Sequence[int | None], size: int, randomness: Randomness) -> None:
        self._rules, self._dims, self._size, self._randomness = rules, dims, size, randomness

    def user_code(self) -> Iterable[Any]:
        return self._rules.user_code()

    def pull(
        self, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        dims = [None if cotangent is None else 0 for cotangent in cotangents]
        pulled = self._run(partial(self._rules.pull, wanted=wanted), saved, cotangents, dims)
        return [
            None if one is None else one.sum(0) if dim is None else one.movedim(0, dim)
            for one, dim in zip(pulled, self._dims, strict=True)
        ]

    def push(self, saved: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        dims = [None if t is None else dim for t, dim in zip(tangents, self._dims, strict=True)]
        return self._run(self._rules.push, saved, tangents, dims)

    def _run(
        self,
        rule: Callable[..., Sequence[Tensor | None]],
        saved: Sequence[Tensor],
        vectors: Sequence[Tensor | None],
        dims: Sequence[int | None],
    ) -> list[Tensor | None]:
        count = len(saved)

        def of_sample(leaves: list[Any]) -> list[Any]:
            return list(rule(leaves[:count], leaves[count:]))

        def leading(outputs: list[Any], _: list[bool]) -> list[int | None]:
            return [None if output is None else 0 for output in outputs]

        return batch.run(
            of_sample, [*saved, *vectors], [*self._dims, *dims], self._size, self._randomness, leading
        )
