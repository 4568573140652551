"""Questions to the graph that a function recorded."""

from __future__ import annotations

import functools
import threading
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from autodiff import _torch
from autodiff.core import hooks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from autodiff.core.hooks import NodePullback, PullPolicy

Entry = TypeVar("Entry")


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


def backward_with(replaced: Iterable[tuple[Any, NodePullback]], *arguments: Any) -> list[Tensor | None]:
    """The engine, which gets what some nodes give from other functions."""
    with hooked((node, partial(_replacing, node, pullback)) for node, pullback in replaced):
        return _torch.backward(*arguments)


class _Thread(threading.local):
    """How many hooks of this package's own the thread has registered."""

    own_hooks = 0


_thread = _Thread()


def hooks_of_others() -> int:
    """Grows where a hook is registered that is not this package's own."""
    return _torch.HookHandle.next_id - _thread.own_hooks


@contextmanager
def hooked(pairs: Iterable[tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
    """With hooks on nodes, each of which is called with what the node gives, and with what it was given."""
    with ExitStack() as stack:
        for node, hook in pairs:
            stack.callback(node.register_hook(hook).remove)
            _thread.own_hooks += 1
        yield


def _replacing(
    node: Any, pullback: NodePullback, own: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...] | None:
    pulled = pullback(node, cotangents)
    if pulled is None:
        return None
    # The engine wants nothing for an input that needs no cotangent.
    return tuple(None if was is None else one for was, one in zip(own, pulled, strict=True))


def registered(registry: dict[str, Entry], nodes: Iterable[Any]) -> list[tuple[Any, Entry]]:
    """The nodes whose names are in the registry, and what is there."""
    # First a look at the types: every pull that makes a graph asks.
    found = {cls for cls in set(map(type, nodes)) if cls.__name__ in registry}
    return [(node, registry[type(node).__name__]) for node in nodes if type(node) in found] if found else []


@functools.lru_cache(4096)  # the names of torch's operations and of the user's Functions
def _policies_of(name: str) -> list[tuple[PullPolicy, str]]:
    registry = hooks.pull_policies.items()
    return [(policy, entry[b]) for policy, entry in registry for b in entry if name.startswith(b)]


hooks.when_changed.append(_policies_of.cache_clear)


# Nodes that are linear in all that comes in, and those that are linear in each of two factors.
_LINEAR = frozenset(
    {
        *("Add", "Sub", "Neg", "Sum", "Mean", "Trace", "Cumsum", "FftR2C", "FftC2C", "FftC2R"),
        *("Expand", "View", "UnsafeView", "ReshapeAlias", "Alias", "Clone", "ToCopy", "Squeeze", "Unsqueeze"),
        *("T", "Transpose", "Permute", "Flip", "Roll", "Repeat", "Cat", "Stack", "Split", "SplitWithSizes"),
        *("Unbind", "Select", "Slice", "Diagonal", "DiagEmbed"),
        *("Conj", "Real", "Imag", "ViewAsReal", "ViewAsComplex"),
    }
)
_LINEAR_IN_EACH = frozenset({"Mul", "Mm", "Mv", "Dot", "Bmm", "Ger", "Linear", "Convolution"})
_LARGEST_PROOF = 64


def shows_linear(outputs: Sequence[Any], inputs: Sequence[Tensor]) -> bool:
    """Whether the nodes between inputs and outputs say that these are linear: False says nothing.

    It looks at 64 nodes at the most, and at none of the branches that Python took.
    """
    ids = {id(tensor) for tensor in inputs}
    # Whether a node depends on the inputs; None: not in a linear way.
    known: dict[Any, bool | None] = {None: False}

    def depends(node: Any) -> bool | None:
        if node in known:
            return known[node]
        if len(known) > _LARGEST_PROOF:
            return None
        known[node] = None
        if (variable := getattr(node, "variable", None)) is not None:
            found: bool | None = id(variable) in ids
        else:
            ways = [depends(parent) for parent, _ in node.next_functions]
            kind = type(node).__name__.partition("Backward")[0]
            if None in ways:
                found = None
            elif not any(ways):
                found = False
            elif (kind in _LINEAR and all(ways)) or (
                (kind in _LINEAR_IN_EACH and ways.count(True) == 1)
                or (kind == "Div" and ways == [True, False])
            ):
                found = True
            else:
                found = None
        known[node] = found
        return found

    return all(depends(output.grad_fn) for output in outputs)


def functions(nodes: Iterable[Any]) -> list[Any]:
    """The nodes of autograd Functions among these."""
    return [node for node in nodes if isinstance(node, BackwardCFunction)]


def bytes_of_a_pull(nodes: Iterable[Any]) -> tuple[int, int]:
    """The bytes of all the cotangents that a pull through the nodes makes, and of the largest of them."""
    sizes = [size for node in nodes for size in _torch.cotangent_sizes(node)]
    return sum(sizes), max(sizes, default=0)
