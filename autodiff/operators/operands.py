"""What operators are combined with: numbers, which are Python's or tensors of shape ``()``, and vectors.

Imports `_torch` alone.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from autodiff._torch import tells_order_of_matmul

# For a tensor t and an operator A, the tracer calls A @ t and A - t by what Tensor has for t on the right.
_TRACED = {
    "__rmatmul__": "__matmul__",
    "matmul": "__rmatmul__",
    "add": "__add__",
    "mul": "__mul__",
    "sub": "__rsub__",
    "__rsub__": "__sub__",
    "__rdiv__": "__truediv__",
}


def traced_method(name: str) -> str | None:
    """The method of an operator for what torch's tracer calls a function of a tensor and the operator."""
    return None if name == "matmul" and not tells_order_of_matmul() else _TRACED.get(name)


def is_scalar(value: object) -> bool:
    """Whether a value is a number."""
    if isinstance(value, Tensor):
        return value.dim() == 0
    return isinstance(value, int | float | complex) and not isinstance(value, bool)


def is_complex(value: Any) -> bool:
    """Whether a number is complex."""
    return value.is_complex() if isinstance(value, Tensor) else isinstance(value, complex)


def is_at_least_zero(value: Any) -> bool:
    """Whether a factor is known to be: of a tensor it is not, since that may be on a device or inside a transform."""
    return isinstance(value, int | float) and value >= 0
