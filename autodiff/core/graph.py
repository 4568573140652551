"""Floor 1: what the graph that a function left tells of it.

Works on the tensors that a graph ends in, those that are no tensors left aside. Imports only `_torch`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from autodiff import _torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# cdist with three or more rows; masked_select and its double backward with a mask larger than the input.
_WRONG_IN_BATCHES = frozenset({"CdistBackward0", "MaskedSelectBackward0", "MaskedScatterBackward0"})
# The second derivatives of layer_norm, and of batch_norm and instance_norm.
_WRITE_IN_PLACE = frozenset(
    {
        "NativeLayerNormBackwardBackward0",
        "NativeBatchNormBackwardBackward0",
        "CudnnBatchNormBackwardBackward0",
        "MiopenBatchNormBackwardBackward0",
    }
)


def walk(ends: Iterable[Any]) -> tuple[list[Any], set[Any]]:
    """The nodes where the graph that the tensors end stops, and all of its nodes."""
    stack: list[Any] = [e.grad_fn for e in ends if isinstance(e, Tensor) and e.grad_fn is not None]
    # None stands for an input that needs no gradient. 0.14 us for each node: every gradient walks its graph.
    seen: set[Any] = {None, *stack}
    stops: list[Any] = []
    while stack:
        node = stack.pop()
        following = node.next_functions
        if not following:
            stops.append(node)
        for one, _ in following:
            if one not in seen:
                seen.add(one)
                stack.append(one)
    seen.discard(None)
    return stops, seen


def first_constant(ends: Sequence[Tensor]) -> int | None:
    """The first end that no operation connects to anything watched, None where there is none."""
    return next((i for i, end in enumerate(ends) if not end.requires_grad), None)


def has_custom_gradient(ends: Sequence[Any]) -> bool:
    """Whether an ``autograd.Function`` stands in the graph: its gradient may be no gradient at all."""
    return any(isinstance(node, BackwardCFunction) for node in walk(ends)[1])


def kinds(nodes: Iterable[Any]) -> set[str]:
    """The names of the nodes."""
    return {kind.__name__ for kind in set(map(type, nodes))}


def has_linalg(kinds: Iterable[str]) -> bool:
    """Whether an operation of torch.linalg is among the nodes."""
    return any(kind.startswith("Linalg") for kind in kinds)


def writes_over_cotangents(kinds: Iterable[str]) -> bool:
    """Whether the pullback of one of the nodes writes in place to what it makes of its cotangent."""
    return not _WRITE_IN_PLACE.isdisjoint(kinds)


def takes_logarithm(kinds: Iterable[str]) -> bool:
    """Whether the pullback of one of the nodes takes the logarithm of its cotangent."""
    return "LogcumsumexpBackward0" in kinds


def is_wrong_in_batches(kinds: Iterable[str]) -> bool:
    """Whether one of the nodes has a batching rule that is silently wrong in torch."""
    return not _WRONG_IN_BATCHES.isdisjoint(kinds)


def bytes_of_a_pull(ends: Sequence[Any]) -> tuple[int, int]:
    """The bytes of all the cotangents that a pull makes, and of the largest of them."""
    sizes = [size for node in walk(ends)[1] for size in _torch.cotangent_sizes(node)]
    return sum(sizes), max(sizes, default=0)
