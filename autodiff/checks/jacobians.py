"""Checks of Jacobians, and of the vectors and matrices that stand for trees. Imports `errors` alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from torch import Tensor

from autodiff.errors import ShapeError, StructureError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autodiff.core.trees import Spec


def shape(name: str, path: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tensor.shape != expected:
        raise ShapeError(
            f"{name}: {path} has shape {tuple(tensor.shape)}, but {expected} is expected: {meaning}. "
            f"Reshape it, or pass the tree that it belongs to."
        )


def jacobian_block(name: str, path: str, value: object, in_shape: Sequence[int]) -> None:
    """A block of a Jacobian ends in its input's shape."""
    if isinstance(value, Tensor) and tuple(value.shape[value.dim() - len(in_shape) :]) == tuple(in_shape):
        return
    came = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
    raise ShapeError(
        f"{name}: {path} has {came}, but a block that ends in the input's shape {tuple(in_shape)} is "
        f"expected. Pass the inputs that the Jacobian was taken of, and wrap the call in vmap for a batch."
    )


def raise_jacobian_of_other_inputs(name: str, came: Spec, expected: Spec) -> NoReturn:
    raise StructureError(
        f"{name}: jacobian has structure {came}, which holds no tree like the inputs, {expected}. Pass "
        f"the inputs that the Jacobian was taken of: a tuple of them for a tuple of argnums."
    )
