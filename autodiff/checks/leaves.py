"""Checks of the leaves that are differentiated: tensors, and their dtypes. Imports `trees` and `errors`."""

from __future__ import annotations

from types import GeneratorType
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn

from autodiff.core import trees
from autodiff.errors import DtypeError, LeafError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autodiff.core.trees import Spec

PASSIVE_TYPES = (bool, int, float, complex, str, bytes, type(None))


def raise_no_differentiable_leaf(name: str, spec: Spec, leaves: Sequence[Any], root: str) -> NoReturn:
    """Name the leaf that came in place of a floating or complex tensor."""
    opening = f"{name}: {root} has no leaf to differentiate. Expected"
    wanted = "at least one Tensor of floating-point or complex dtype"
    if not leaves:
        raise LeafError(
            f"{opening} {wanted}, got an empty {spec.type.__name__ if spec.type else 'tree'}. "
            f"Pass a tensor, or pick another argument with argnums."
        )
    where = trees.paths(spec, root)
    for path, leaf in zip(where, leaves, strict=True):
        if not isinstance(leaf, Tensor) and not isinstance(leaf, PASSIVE_TYPES):
            raise_not_a_tensor(name, path, leaf)
    path, leaf = where[0], leaves[0]
    if isinstance(leaf, Tensor):
        raise LeafError(
            f"{opening} {wanted}, got {path} of dtype {leaf.dtype}: only Tensors of floating point and complex dtype "
            f"can require gradients. Convert it, as in {path}.float(), or pick another argument with argnums."
        )
    raise LeafError(
        f"{opening} it to only contain Tensors where it is differentiated, got {path} of type {type(leaf).__name__}. "
        f"Write torch.tensor({leaf!r}) for a number."
    )


def raise_not_a_tensor(name: str, path: str, leaf: object) -> NoReturn:
    cls = type(leaf).__qualname__
    opening = f"{name}: {path} is of class {cls}, where a tensor is needed: leaves must be Tensors"
    if isinstance(leaf, nn.Module):
        raise LeafError(
            f"{opening}. Differentiate dict(module.named_parameters()), and call the module with "
            f"them by autodiff.functional_call."
        )
    if isinstance(leaf, GeneratorType):
        raise LeafError(f"{opening}. Make a dict or a list of what it generates.")
    if hasattr(leaf, "__array_interface__"):
        raise LeafError(f"{opening}. Write torch.from_numpy({path}).")
    raise LeafError(
        f"{opening}, in containers that are registered. Register it once: autodiff.pytree.register_dataclass({cls}), "
        f"or autodiff.pytree.register({cls}, flatten, unflatten) if it is not a dataclass."
    )


def holomorphic_dtypes(name: str, tensors: Sequence[Tensor], holomorphic: bool | None, kind: str) -> None:
    """Real everywhere by default, complex everywhere with ``holomorphic=True``, anything with None."""
    if holomorphic is None:
        return
    for position, tensor in enumerate(tensors):
        if holomorphic and not tensor.is_complex():
            raise DtypeError(
                f"{name}: holomorphic=True expects all {kind} to be complex, got {tensor.dtype} at "
                f"flattened {kind[:-1]} idx: {position}. Convert it to complex, or drop holomorphic."
            )
        if not holomorphic and tensor.is_complex():
            raise DtypeError(
                f"{name}: Expected all {kind} to be real but received complex tensor at flattened {kind[:-1]} idx: "
                f"{position}. For a holomorphic function pass holomorphic=True; otherwise use torch.view_as_real of it."
            )


def real_tensors(name: str, tensors: Sequence[Tensor], path: Callable[[int], str]) -> None:
    for position, tensor in enumerate(tensors):
        if tensor.is_complex():
            raise DtypeError(
                f"{name}: expected real tensors wherever it differentiates, got {path(position)} of dtype "
                f"{tensor.dtype}. Pass torch.view_as_real of it, or leave it out by argnums or wrt."
            )
