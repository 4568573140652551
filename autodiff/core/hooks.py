"""The points where `torch_fixes` connects to `core`. Every registry is empty until a fix registers in it.

Imports nothing from the package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

from torch import Tensor

# Called with the operation, its arguments and its keywords, in place of the operation.
Override: TypeAlias = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

# An operation's override in forward mode, by the function that the user calls, or by that function's type.
forward_overrides: dict[Any, Override] = {}
forward_overrides_by_type: dict[type, Override] = {}
# What runs instead of an operation that torch composes of others, by its overload, where one of its arguments is
# batched; called with the arguments. torch.func's vmap comes by here too.
batch_overrides: dict[Any, Callable[..., Any]] = {}
# What runs an operation instead where torch raises a NotImplementedError in forward mode; None where it cannot help.
missing_forward_rule: dict[Literal["override"], Callable[..., Override | None]] = {}
# What runs inside transforms in place of a higher-order operator of torch's, which calls functions.
control_flow: dict[Any, Callable[..., Any]] = {}
# Operations whose derivative in forward mode is not that in reverse mode, though neither is wrong.
differ_by_mode: dict[Any, None] = {}
# An operation's override beneath all transforms, where memory is measured.
dispatch_overrides: dict[Any, Override] = {}

PullPolicy: TypeAlias = Literal[
    # Cotangents are pulled back one by one, not in a batch.
    "one cotangent at a time",
    # Cotangents carry every batch that their outputs carry.
    "cotangents batched like outputs",
    # A pull makes a graph though nothing tracks its result.
    "with a graph",
]

# How a graph is pulled back that holds nodes whose names begin so, with the operation that they belong to.
pull_policies: dict[PullPolicy, dict[str, str]] = {
    "one cotangent at a time": {},
    "cotangents batched like outputs": {},
    "with a graph": {},
}

# How a node of this name is pulled back where that makes a graph: from the node and its cotangents to a cotangent for
# each of its inputs, or to None where the node's own are right.
NodePullback: TypeAlias = Callable[[Any, Sequence[Tensor | None]], Sequence[Tensor | None] | None]
node_pullbacks: dict[str, NodePullback] = {}

# How the pullback of a node of this name is transposed where all that it has saved is constant: from the node that
# torch made of the pullback to the constants that the transpose needs and the transpose itself, or to None where that
# of torch is to be used. The transpose gets the constants, and a vector or None for each of the node's inputs; it
# gives one for each of the node's outputs.
Transpose: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor | None]], Sequence[Tensor | None]]
NodeTranspose: TypeAlias = Callable[[Any], tuple[Sequence[Tensor], Transpose] | None]
node_transposes: dict[str, NodeTranspose] = {}

# Operations whose pullback carries tangents only where it makes a graph: if there are any, every pull in forward mode
# makes one.
needs_graph_in_forward_mode: dict[str, None] = {}

# What runs operations that are differentiated forward, or more than once, by the names of fixes: called with a function
# and its arguments. While torch.compile traces, it is a context, which is made anew each time.
higher_order: dict[str, Callable[..., Any]] = {}
higher_order_traced: dict[Literal["make"], Callable[[], AbstractContextManager[Any]]] = {}
# An operation's formula in every function that is differentiated while torch.compile traces.
traced_formulas: dict[Any, Callable[..., Any]] = {}


def around_higher_order(func: Callable[..., Any], *args: Any) -> Any:
    """``func(*args)`` inside all that is registered in `higher_order`."""
    inside = (*higher_order.values(), func)  # each calls the next
    return inside[0](*inside[1:], *args)


# Called when a registry has changed.
when_changed: list[Callable[[], None]] = []
