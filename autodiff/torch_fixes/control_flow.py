"""Control flow as Python, which every transform sees through.

torch.cond, while_loop, scan and map have a gradient and nothing else: tangents and second derivatives are zeros. Inside
transforms they are what their documentation says that they are: a branch, and loops. What newer versions of torch tell
the operators besides, such as which arguments are written to, is not needed here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autodiff import _torch
from autodiff.core import hooks, trees
from autodiff.core.tape import recorded_outside

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def cond(
    predicate: Any,
    if_true: Callable[..., Any],
    if_false: Callable[..., Any],
    operands: Sequence[Any] = (),
    **_: Any,
) -> Any:
    """As torch.cond; both branches, where the predicate differs from sample to sample."""
    if not _is_batched(predicate):
        return (if_true if _is_true(predicate) else if_false)(*operands)
    return _where(predicate, if_true(*operands), if_false(*operands))


def while_loop(
    condition: Callable[..., Any],
    body: Callable[..., Any],
    carried: Sequence[Any],
    captured: Sequence[Any] = (),
    **_: Any,
) -> tuple[Any, ...]:
    """As torch.while_loop; until the last sample is done, where their numbers of steps differ."""
    values = list(carried)
    while True:
        go_on = condition(*values, *captured)
        if not _is_true(go_on):
            return tuple(values)
        after = trees.leaves(body(*values, *captured))
        values = _where(go_on, after, values) if _is_batched(go_on) else after


def scan(
    combine: Callable[..., Any],
    init: Sequence[Any],
    xs: Sequence[Tensor],
    captured: Sequence[Any] = (),
    **_: Any,
) -> Any:
    """As torch's scan: what is carried at the end, and what each step gives, stacked."""
    carry, steps, count, spec = list(init), [], len(init), None
    for row in zip(*(x.unbind(0) for x in xs), strict=True):
        result = combine(*carry, *row, *captured)
        # A traced function gives a list of the carry and the rest; the user's own a pair of trees.
        flat, pair = trees.flatten(result)
        spec = pair if len(result) == 2 and len(trees.leaves(result[0])) == count else None
        carry = flat[:count]
        steps.append(flat[count:])
    stacked = [None if column[0] is None else torch.stack(column) for column in zip(*steps, strict=True)]
    return (*carry, *stacked) if spec is None else trees.unflatten(spec, [*carry, *stacked])


def map_(func: Callable[..., Any], xs: Sequence[Tensor], captured: Sequence[Any] = (), **_: Any) -> Any:
    """As torch's map: the function of each row, stacked."""
    rows = [func(*row, *captured) for row in zip(*(x.unbind(0) for x in xs), strict=True)]
    flat, specs = zip(*map(trees.flatten, rows), strict=True)
    stacked = [None if column[0] is None else torch.stack(column) for column in zip(*flat, strict=True)]
    return trees.unflatten(specs[0], stacked)


def _is_batched(predicate: Any) -> bool:
    return isinstance(predicate, Tensor) and bool(_torch.batch_levels([predicate]))


def _is_true(predicate: Any) -> bool:
    """Whether the predicate holds, for one sample at least."""
    return bool(_torch.fully_unwrapped(predicate).any() if isinstance(predicate, Tensor) else predicate)


def _where(predicate: Tensor, one: Any, other: Any) -> Any:
    """The leaves of the one tree where the predicate holds, and those of the other elsewhere."""
    (leaves, spec), others = trees.flatten(one), trees.leaves(other)
    chosen = [torch.where(predicate.squeeze(), a, b) for a, b in zip(leaves, others, strict=True)]
    return trees.unflatten(spec, chosen)


_OPERATORS = _torch.higher_order_operators
FORMULAS: dict[Any, Callable[..., Any]] = {
    operator: formula
    for name, formula in (("cond", cond), ("while_loop", while_loop), ("scan", scan), ("map_impl", map_))
    if (operator := _OPERATORS.get(name)) is not None
} | {
    # These are made of operations that have every derivative.
    operator: _torch.plain_kernel(operator)
    for name in ("associative_scan", "flex_attention")
    if (operator := _OPERATORS.get(name)) is not None
}


def _install() -> None:
    for operator in FORMULAS:
        _torch.intercept(operator, hooks.control_flow.get, lambda: recorded_outside(()))


_install()
