"""Checks of primals, tangents and cotangents against one another. Imports `trees`, `leaves` and `errors`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from autodiff.checks.leaves import PASSIVE_TYPES, raise_not_a_tensor
from autodiff.core import trees
from autodiff.errors import DtypeError, LeafError, ShapeError, StructureError

if TYPE_CHECKING:
    import torch

    from autodiff.core.specs import TensorSpec
    from autodiff.core.trees import Spec


def tuple_of_primals(name: str, primals: object) -> None:
    if not isinstance(primals, tuple):
        raise StructureError(
            f"{name}: Expected primals to be a tuple, got {type(primals).__name__}. E.g. it should be "
            f"valid to call f(*primals). Write (x,) for one primal x."
        )


def matching_structure(name: str, kind: str, spec: Spec, tree: Any, reference: str) -> list[Any]:
    """The leaves of ``tree`` in the order of ``spec``; an error where the structures differ."""
    leaves = trees.match(spec, tree)
    if leaves is not None:
        return leaves
    came = trees.structure(tree)
    expected = {  # as torch.func says it there
        "jvp": f"{kind} to have the same python structure as {reference}",
        "linearize": f"{kind} to have the same argspec as the {reference}",
    }.get(name, f"pytree structure of {kind} to be the same as pytree structure of {reference}")
    raise StructureError(
        f"{name}: Expected {expected}, but {trees.difference(came, kind, spec, reference)} Give one of the {kind} for "
        f"each leaf of {reference}. {kind}: {came}, {reference}: {spec}"
    )


def matching_leaf(name: str, kind: str, path: str, value: object, model_path: str, model: Tensor) -> None:
    """A tangent or cotangent is a tensor of its leaf's shape and dtype."""
    rule = f"A {kind} must match its {'output' if kind == 'cotangent' else 'primal'} leaf for leaf."
    if not isinstance(value, Tensor):
        if isinstance(value, PASSIVE_TYPES):
            raise LeafError(
                f"{name}: {path} is of type {type(value).__name__}, but {model_path} is a tensor of shape "
                f"{tuple(model.shape)}. {rule} Write torch.zeros_like({model_path}) for zero."
            )
        raise_not_a_tensor(name, path, value)
    if value.shape != model.shape:
        opening = "Mismatch in shape: " if kind == "cotangent" else _flattened(name, "shape")
        raise ShapeError(
            f"{name}: {opening}{path} has shape {tuple(value.shape)}, but {model_path} has shape "
            f"{tuple(model.shape)}. {rule}"
        )
    # The engine converts a real cotangent to its output's real dtype, and programs rely on it. A tangent is not
    # converted by torch: a float64 tangent of a float32 primal gives float64 results.
    if value.dtype != model.dtype and not (
        kind == "cotangent" and value.is_floating_point() and model.is_floating_point()
    ):
        opening = "" if kind == "cotangent" else _flattened(name, "dtype")
        raise DtypeError(
            f"{name}: {opening}{path} has dtype {value.dtype}, but {model_path} has dtype {model.dtype}. {rule} "
            f"Convert it, as in {path}.to({model_path}.dtype)."
        )


def _flattened(name: str, what: str) -> str:
    """How torch.func.linearize begins; the other transforms name the leaf at once."""
    return f"a tangent in flattened pytree doesn't match the {what}: " if name == "linearize" else ""


def flat_vectors(name: str, path: str, value: Tensor, size: int, dtype: torch.dtype, spec: Spec) -> None:
    """One vector ``[size]``, or the columns of a matrix ``[size, k]``, in the dtype of an operator's space."""
    if value.dim() not in (1, 2) or value.shape[0] != size:
        trees_too = "" if spec.is_leaf() else f", or a tree like the operator's domain, {spec}"
        raise ShapeError(
            f"{name}: expected a vector of shape [{size}] or a matrix of shape [{size}, k]{trees_too}, got {path} of "
            f"shape {tuple(value.shape)}. Give one number for each number of the domain."
        )
    if value.dtype != dtype:
        raise DtypeError(
            f"{name}: expected {path} of dtype {dtype}, that of the operator's domain, got {value.dtype}. Convert it, "
            f"as in {path}.to({dtype})."
        )


def matching_vector(name: str, path: str, value: object, model_path: str, model: TensorSpec) -> None:
    """One leaf of a vector is a tensor of the shape and dtype that its place in an operator's domain has."""
    rule = "A vector must match the operator's domain leaf for leaf."
    if not isinstance(value, Tensor):
        if isinstance(value, PASSIVE_TYPES):
            raise LeafError(
                f"{name}: {path} is of type {type(value).__name__}, but {model_path} is a tensor of shape "
                f"{tuple(model.shape)}. {rule} Write zeros of that shape for zero."
            )
        raise_not_a_tensor(name, path, value)
    if value.shape != model.shape:
        raise ShapeError(
            f"{name}: {path} has shape {tuple(value.shape)}, but {model_path} has shape {tuple(model.shape)}. {rule}"
        )
    if value.dtype != model.dtype:
        raise DtypeError(
            f"{name}: {path} has dtype {value.dtype}, but {model_path} has dtype {model.dtype}. {rule} Convert it, as "
            f"in {path}.to({model.dtype})."
        )
