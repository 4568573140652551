"""Questions to the graph that a function recorded."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from torch import Tensor

from autodiff import _torch
from autodiff.core import hooks

if TYPE_CHECKING:
    from collections.abc import Iterable

    from autodiff.core.hooks import PullPolicy


def walk(outputs: Iterable[Any], inputs: Iterable[Any] = ()) -> tuple[list[Any], set[Any]]:
    """The nodes in which the graph behind the outputs begins, and all of its nodes.

    It begins at the inputs: what they were made of is not visited, however long that is.
    """
    begins = {one.grad_fn for one in inputs}
    stack: list[Any] = [o.grad_fn for o in outputs if isinstance(o, Tensor) and o.grad_fn is not None]
    # None stands for an input that needs no gradient. 0.15 us for each node: every gradient walks its graph.
    seen: set[Any] = {None, *stack}
    leaf_nodes: list[Any] = []
    while stack:
        node = stack.pop()
        parents = () if node in begins else node.next_functions
        if not parents:
            leaf_nodes.append(node)
        for parent, _ in parents:
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)
    seen.discard(None)
    return leaf_nodes, seen


def policies_of(nodes: Iterable[Any]) -> dict[PullPolicy, set[str]]:
    """How a graph with these nodes is to be pulled back, with the operations that ask for it."""
    found: dict[PullPolicy, set[str]] = {}
    for cls in set(map(type, nodes)):
        for policy, operation in _policies_of(cls.__name__):
            found.setdefault(policy, set()).add(operation)
    return found


@functools.cache  # bounded by the number of torch's operations and of the user's Functions
def _policies_of(name: str) -> list[tuple[PullPolicy, str]]:
    registry = hooks.pull_policies.items()
    return [(policy, entry[b]) for policy, entry in registry for b in entry if name.startswith(b)]


hooks.when_changed.append(_policies_of.cache_clear)


def bytes_of_a_pull(nodes: Iterable[Any]) -> tuple[int, int]:
    """The bytes of all the cotangents that a pull through the nodes makes, and of the largest of them."""
    sizes = [size for node in nodes for size in _torch.cotangent_sizes(node)]
    return sum(sizes), max(sizes, default=0)
