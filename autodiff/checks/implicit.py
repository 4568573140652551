"""Checks of equations whose solutions are differentiated. Imports `_torch`, `trees` and `errors`."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from autodiff._torch import fully_unwrapped
from autodiff.core import trees
from autodiff.errors import (
    CaptureError,
    ConvergenceWarning,
    DtypeError,
    InPlaceError,
    LeafError,
    ShapeError,
    SingularError,
    StructureError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable


def raise_captured_inside(name: str, cause: BaseException | None = None) -> NoReturn:
    raise CaptureError(
        f"{name}: a function captures a tensor that is differentiated, and hands it to a transform of its own, where "
        f"it cannot be replaced. Expected an argument: pass the tensor to the function, or detach it where no "
        f"derivative in it is needed."
    ) from cause


def raise_unused_keyword(name: str, keyword: str, solver: str, func: str) -> NoReturn:
    raise CaptureError(
        f"{name}: {keyword} of {solver} is differentiated, but {func} has no parameter of that name, so that no "
        f"derivative follows. Give {func} the parameter, or detach the tensor."
    )


def raise_solver_wrote(name: str, solver: str) -> NoReturn:
    raise InPlaceError(
        f"{name}: {solver} wrote in place to an argument other than start: the answer is that of another argument. "
        f"Expected a solver that leaves its arguments as they are; write to a clone."
    )


def like_start(name: str, path: str, value: Any, space: Any, model: str) -> list[Any]:
    """The leaves of a tree that is like another one: in structure, and in the shape and dtype of each tensor."""
    leaves = trees.match(space.spec, value)
    if leaves is None:
        raise StructureError(
            f"{name}: expected {path} to be a tree like {model}, but "
            f"{trees.difference(trees.structure(value), path, space.spec, model)} Return the same structure."
        )
    for position, spec in zip(space.positions, space.leaves, strict=True):
        leaf = leaves[position]
        if isinstance(leaf, Tensor) and leaf.shape == spec.shape and leaf.dtype == spec.dtype:
            continue
        where, home = (trees.paths(space.spec, root)[position] for root in (path, model))
        if not isinstance(leaf, Tensor):
            raise LeafError(
                f"{name}: expected {where} to be a tensor like {home}, got {type(leaf).__name__}. Convert it, as in "
                f"torch.as_tensor(x, dtype={spec.dtype})."
            )
        kind = ShapeError if leaf.shape != spec.shape else DtypeError
        raise kind(
            f"{name}: expected {where} of shape {tuple(spec.shape)} and dtype {spec.dtype}, like {home}, got shape "
            f"{tuple(leaf.shape)} and dtype {leaf.dtype}. Reshape or convert it."
        )
    return leaves


def real_minimum(name: str, space: Any) -> None:
    if any(spec.dtype.is_complex for spec in space.leaves):
        raise DtypeError(
            f"{name}: expected real tensors in start, got {space.dtype}. Minimise over torch.view_as_real(x), and give "
            f"the objective torch.view_as_complex of it."
        )


def holds_at_answer(
    name: str, solver: str, what: str, norm: Tensor, scales: Iterable[Tensor], tolerance: float
) -> None:
    """The norm of what should be zero is a small part of the scales' sum; they are asked for one after the other."""
    total: Tensor | float = 0.0
    for scale in scales:
        total = total + scale
        if not fully_unwrapped(~(norm <= tolerance * total)).any():
            return
    warnings.warn(
        f"{name}: expected {solver} to return an answer at which {what} is zero, but its norm is "
        f"{float(fully_unwrapped(norm).max()):.2g} there, {float(fully_unwrapped(norm / total).max()):.2g} of what "
        f"it is made of. The derivative will be that of an exact answer. Iterate further, or pass check=False.",
        ConvergenceWarning,
        stacklevel=6,
    )


def raise_singular(name: str, what: str) -> NoReturn:
    raise SingularError(
        f"{name}: expected {what} to have an inverse at the answer, but it is singular: other answers lie next to "
        f"this one, and no derivative follows. Make the answer unique, as by adding 1e-3 * (x**2).sum() to an "
        f"objective, or pass solve= that picks a derivative."
    )
