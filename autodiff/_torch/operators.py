"""torch's higher-order operators, which call functions: control flow, scans, flexible attention.

Provides `intercept`, which puts a formula in the place of one. Imports `compiled`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._C import DispatchKey, _functorch

from autodiff._torch.compiled import is_uncompiled

if TYPE_CHECKING:
    from collections.abc import Callable

_AUTOGRAD, _PLAIN = DispatchKey.Autograd, DispatchKey.CompositeExplicitAutograd
_TRANSFORMS = _functorch.TransformType
# By the names under which torch.ops.higher_order has them.
higher_order_operators: dict[str, Any] = {
    name: operator
    for name in ("cond", "while_loop", "scan", "map_impl", "associative_scan", "flex_attention")
    if (operator := getattr(torch.ops.higher_order, name, None)) is not None
}


def plain_kernel(operator: Any) -> Callable[..., Any]:
    """What the operator does where nothing is differentiated."""
    return operator.py_kernels[_PLAIN]  # type: ignore[no-any-return]


def intercept(
    operator: Any, find: Callable[[Any], Callable[..., Any] | None], is_recorded: Callable[[], bool]
) -> None:
    """Have ``find(operator)`` run in place of the operator inside transforms, unless it is None.

    That is where compiled functions run uncompiled, or where ``is_recorded`` says that a tape records and nothing
    traces.
    """

    def by_formula() -> Callable[..., Any] | None:
        recorded = is_uncompiled() or (is_recorded() and torch._C._len_torch_dispatch_stack() == 0)
        return find(operator) if recorded else None

    def eagerly(*args: Any, **kwargs: Any) -> Any:
        return (by_formula() or original)(*args, **kwargs)

    def on_level(kernel: Callable[..., Any] | None) -> Callable[..., Any]:
        def run(interpreter: Any, *args: Any, **kwargs: Any) -> Any:
            if (formula := by_formula()) is not None:
                return formula(*args, **kwargs)
            if kernel is None:
                raise NotImplementedError(f"{operator} inside torch.func's {interpreter.key()} has no rule")
            return kernel(interpreter, *args, **kwargs)

        return run

    original = operator.py_kernels[_AUTOGRAD]
    operator.py_kernels[_AUTOGRAD] = eagerly
    for key in (_TRANSFORMS.Grad, _TRANSFORMS.Jvp, _TRANSFORMS.Vmap):
        operator.functorch_table[key] = on_level(operator.functorch_table.get(key))
    operator._dispatch_cache.clear()
