"""The points where `torch_fixes` connects to `core`. Every registry is empty until a fix registers in it.

Imports nothing from the package.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias

# Called with the operation, its arguments and its keywords, in place of the operation.
Override: TypeAlias = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

# An operation's override in forward mode, by the function that the user calls, or by that function's type.
forward_overrides: dict[Any, Override] = {}
forward_overrides_by_type: dict[type, Override] = {}
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
    # The pullback is transposed at a cotangent of ones, not of zeros.
    "transposed at ones",
]

# How a graph is pulled back that holds nodes whose names begin so, with the operation that they belong to.
pull_policies: dict[PullPolicy, dict[str, str]] = {
    "one cotangent at a time": {},
    "cotangents batched like outputs": {},
    "with a graph": {},
    "transposed at ones": {},
}

# Operations whose pullback carries tangents only where it makes a graph: if there are any, every pull in forward mode
# makes one.
needs_graph_in_forward_mode: dict[str, None] = {}

# What is entered around operations that are differentiated forward, or more than once. While torch.compile traces, it
# is made anew each time.
NOTHING = nullcontext()
higher_order: dict[Literal["attention", "compiled"], AbstractContextManager[Any]] = {}
higher_order_traced: dict[Literal["make"], Callable[[], AbstractContextManager[Any]]] = {}
# An operation's formula in every function that is differentiated while torch.compile traces.
traced_formulas: dict[Any, Callable[..., Any]] = {}

# Called when a registry has changed.
when_changed: list[Callable[[], None]] = []
