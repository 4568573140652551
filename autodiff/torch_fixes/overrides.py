"""Overrides of operations, of which the rows of the table are put together."""

from __future__ import annotations

from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import is_tensor_like

from autodiff import _torch
from autodiff.core import hooks, trees
from autodiff.core.forward import ForwardMode
from autodiff.torch_fixes.by_pullback import by_pullback, by_pullback_of_same_draw
from autodiff.torch_fixes.formulas import upcast

if TYPE_CHECKING:
    from collections.abc import Callable

    from autodiff.core.hooks import Override

# The two types of operators that are called through torch.ops.
OVERLOAD, PACKET = type(torch.ops.aten.sin.default), type(torch.ops.aten.sin)
_PLAIN = torch.Tensor, torch.nn.Parameter
_BUILTIN_NAMESPACES = ("aten", "prims", "prim", "higher_order")


def forward_overrides(override: Override, *operations: Any) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """The entries of a fix that overrides operations in forward mode."""
    return hooks.forward_overrides, dict.fromkeys(operations, override)


def batch_overrides(formulas: dict[Any, Callable[..., Any]]) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """The entries of a fix that overrides operations where an argument is batched, by their overloads."""
    for operation in formulas:
        _torch.inside_levels(operation, partial(_override_in_batch, operation))
    return hooks.batch_overrides, formulas


def _override_in_batch(operation: Any, args: tuple[Any, ...]) -> Callable[..., Any] | None:
    formula = hooks.batch_overrides.get(operation)
    if formula is None:
        return None
    tensors = [leaf for leaf in trees.leaves(args) if isinstance(leaf, torch.Tensor)]
    return formula if _torch.batch_levels(tensors) else None


def by_formula(formula: Callable[..., Any], in_float32: tuple[str, ...] = ()) -> Override:
    """The formula in place of the operation.

    On the named devices autocast has the operation compute in float32 where it is given less.
    """

    def overridden(_: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        device = args[0].device.type if args and isinstance(args[0], torch.Tensor) else ""
        if device not in in_float32 or not torch.is_autocast_enabled(device):
            return formula(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return formula(
                *map(_in_float32, args), **{key: _in_float32(leaf) for key, leaf in kwargs.items()}
            )

    return overridden


def _in_float32(leaf: Any) -> Any:
    return upcast(leaf) if isinstance(leaf, torch.Tensor) else leaf


def inside_transforms(override: Override) -> Override:
    """The override where another transform is active, or a captured tensor requires grad.

    Elsewhere eager forward mode is right, and faster.
    """

    def overridden(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        is_nested = _torch.functorch_active() or (torch.is_grad_enabled() and any(map(_requires_grad, args)))
        return override(func, args, kwargs) if is_nested else func(*args, **kwargs)

    return overridden


def formula_inside(
    formula: Callable[..., Any], *operations: Any, in_float32: tuple[str, ...] = ()
) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """The entries of a fix that takes a formula in place of operations, inside other transforms."""
    return forward_overrides(inside_transforms(by_formula(formula, in_float32)), *operations)


def _requires_grad(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad


def in_place(override: Override, out_of_place: Callable[..., Any]) -> Override:
    """The override of an operation that writes in place, by that of the one that does not."""
    return lambda _, args, kwargs: args[0].copy_(override(out_of_place, args, kwargs))


def body_in_forward_mode(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A function that torch has in Python, with every operation in it sent to its override.

    Such a function asks whether a torch function mode is active, and hands itself over to that as a whole: what it
    calls is not seen. Here it runs without the question.
    """
    if any(is_tensor_like(one) and type(one) not in _PLAIN for one in (*args, *kwargs.values())):
        return func(*args, **kwargs)  # the class of an argument may answer
    asks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    names = func.__globals__ | dict.fromkeys(asks, _no)
    body = FunctionType(func.__code__, names, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    with ForwardMode():
        return body(*args, **kwargs)


def _no(*_: object) -> bool:
    return False


by_pullback_inside = inside_transforms(by_pullback)


def products_by_pullback(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A reduction, by its pullback where it is a product."""
    is_product = "prod" in (*args[4:], kwargs.get("reduce"))
    return by_pullback(func, args, kwargs) if is_product else func(*args, **kwargs)


def chunked_by_pullback(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A loss, by its pullback where it is computed in chunks."""
    is_chunked = kwargs.get("options") is not None
    return by_pullback(func, args, kwargs) if is_chunked else func(*args, **kwargs)


def custom_by_pullback(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator, by its pullback where torch.library made it."""
    namespace = func.namespace if isinstance(func, OVERLOAD) else str(func).split(".", maxsplit=1)[0]
    if namespace in _BUILTIN_NAMESPACES:
        return func(*args, **kwargs)
    return by_pullback_of_same_draw(func, args, kwargs)


def where_rule_is_missing(func: Callable[..., Any], error: NotImplementedError) -> Override | None:
    """The pullback, where torch says that a forward rule is missing."""
    writes = str(getattr(func, "__name__", "")).endswith("_")
    return by_pullback_of_same_draw if _torch.says(error, "no forward rule") and not writes else None


def zeros_with_memory(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation, whose result is zeros with memory where its argument is zeros without."""
    return torch.zeros_like(args[0]) if _torch.is_zero_tensor(args[0]) else func(*args, **kwargs)
