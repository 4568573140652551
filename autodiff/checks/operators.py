"""Checks of operators: their spaces, and what is combined with them. Imports `errors` alone."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from autodiff.errors import (
    ArgnumsError,
    DtypeError,
    OptionError,
    OutputError,
    RuleError,
    ShapeError,
    StructureError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def same_space(name: str, path: str, space: Any, model_path: str, model: Any) -> None:
    """Two spaces of operators are the same: in structure, shapes, dtypes and devices."""
    if space == model:
        return
    if space.spec != model.spec or space.positions != model.positions:
        raise StructureError(
            f"{name}: expected {path} and {model_path} to be the same space, got {space} and {model}, which have "
            f"other structures. Make both operators at trees of one structure."
        )
    pairs = zip(space.paths, space.leaves, model.leaves, strict=True)
    where, one, other = next(pair for pair in pairs if pair[1] != pair[2])
    kind = ShapeError if one.shape != other.shape else DtypeError
    raise kind(
        f"{name}: expected {path} and {model_path} to be the same space, got {_described(one)} and "
        f"{_described(other)} at {where or 'their only leaf'}. Make both operators at tensors of one shape, dtype and "
        f"device."
    )


def _described(spec: Any) -> str:
    return f"shape {tuple(spec.shape)}, {spec.dtype} on {spec.device}"


def square_operator(name: str, operator: str, domain: Any, codomain: Any) -> None:
    """An operator maps a space to itself."""
    if domain != codomain:
        raise ShapeError(
            f"{name}: expected an operator from a space to itself, got {operator} from {domain} to {codomain}. Take "
            f"A.H @ A or A @ A.H, or the block of it that is meant."
        )


def real_or_complex(name: str, path: str, specs: Iterable[Any]) -> None:
    """Tensors are all real or all complex: a complex number has no place in a real leaf."""
    dtypes = {spec.dtype for spec in specs}
    if len({dtype.is_complex for dtype in dtypes}) > 1:
        raise DtypeError(
            f"{name}: expected {path} of real tensors alone, or of complex ones, got "
            f"{sorted(map(str, dtypes))}. Convert the real ones to complex, or pass trees."
        )


def raise_not_a_matrix(name: str, path: str, came: str) -> NoReturn:
    raise ShapeError(
        f"{name}: expected {path} to be a floating or complex tensor of shape [m, n], got {came}. Reshape it, "
        f"or convert it by torch.as_tensor(...).float()."
    )


def block_patterns(name: str, patterns: Any) -> tuple[Any, Any]:
    """The patterns of ``A[rows, columns]``."""
    if not isinstance(patterns, tuple) or len(patterns) != 2:
        raise ArgnumsError(
            f"A[rows, columns]: expected two patterns for {name}, of the leaves in its rows and in its columns, got "
            f"{patterns!r}. Write A['layer.*', 'layer.*']; each may be a tuple of patterns."
        )
    return patterns


def shown_function(func: Callable[..., Any]) -> str:
    """A function's name, for the repr of an operator."""
    while isinstance(func, partial):
        func = func.func
    return getattr(func, "__name__", type(func).__name__)


def complex_leaves(name: str, operator: str, specs: Iterable[Any]) -> None:
    """A complex number times an operator takes complex vectors."""
    real = next((spec.dtype for spec in specs if not spec.dtype.is_complex), None)
    if real is not None:
        raise DtypeError(
            f"{name}: expected a real number, since {operator} has leaves of dtype {real}, got a complex one. Make the "
            f"operator at complex tensors, with holomorphic=True."
        )


def raise_not_linear(name: str, function: str) -> NoReturn:
    raise RuleError(
        f"{name}: expected a linear function, but {function}(u - 2 v) is not {function}(u) - 2 {function}(v) for two "
        f"vectors, or {function}(0) is not 0. Leave out constants and nonlinear operations, or pass check=False if "
        f"rounding alone makes the difference."
    )


def raise_not_symmetric(name: str, function: str) -> NoReturn:
    raise RuleError(
        f"{name}: expected a symmetric operator, as promised, but <v, {function}(u)> is not <{function}(v), u> for two "
        f"vectors. Drop symmetric=True and positive=True, or mend the function; check=False leaves the comparison out."
    )


def raise_not_adjoint(name: str, function: str) -> NoReturn:
    raise RuleError(
        f"{name}: expected rmatvec to multiply by the conjugate transpose of {function}, but <v, matvec(u)> is not "
        f"<rmatvec(v), u> for two vectors. Mend it, or leave it out to have it found; check=False leaves the "
        f"comparison out."
    )


def raise_not_positive(name: str, function: str) -> NoReturn:
    raise RuleError(
        f"{name}: expected a positive semidefinite operator, as promised, but <v, {function}(v)> is negative for a "
        f"vector. Pass symmetric=True instead of positive=True."
    )


def model_and_target(name: str, args: tuple[Any, ...]) -> None:
    """The arguments of a model, and the target of its loss."""
    if len(args) < 2:
        raise ArgnumsError(
            f"{name}: expected the model's arguments and then the target of the loss, got {len(args)} positional "
            f"arguments. Pass the target last: {name}(model, loss)(params, inputs, target)."
        )


def raise_not_convex(name: str, loss: str) -> NoReturn:
    raise RuleError(
        f"{name}: expected a loss that is convex in the model's output, as promised, but the second derivative of "
        f"{loss} is negative along a vector. Drop convex=True."
    )


def raise_unknown_likelihood(name: str, loss: str) -> NoReturn:
    raise OptionError(
        f"{name}: expected a loss whose targets have a known distribution: cross_entropy, mse_loss or "
        f"binary_cross_entropy_with_logits of torch.nn.functional, a partial of one with keywords, or its "
        f"module, without weights; got {loss}. Pass that function itself, pass samples=n and sample=, which draws "
        f"targets, or take operators.gauss_newton."
    )


def raise_samples_missing(name: str) -> NoReturn:
    raise OptionError(
        f"{name}: expected samples, the number of targets to draw, with sample=, got samples=None. Pass "
        f"samples=1 or more."
    )


def raise_not_over_samples(name: str, loss: str) -> NoReturn:
    raise OutputError(
        f"{name}: expected a loss that is a mean or a sum over the first dimension of the output and the target, got "
        f"{loss}, which is neither. Write it so, with one loss for each sample, or take operators.empirical_fisher."
    )


def losses_of_samples(name: str, losses: Any) -> None:
    """One loss for each sample."""
    if not isinstance(losses, Tensor) or losses.dim() != 1 or losses.is_complex():
        came = (
            f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"type {type(losses).__name__}"
        )
        raise OutputError(
            f"{name}: expected a function that returns one real tensor of shape () for a sample, so [N] for all, got "
            f"{came}. Write the loss of one sample."
        )


def raise_no_gradient(name: str, operator: str) -> NoReturn:
    raise RuleError(
        f"{name}: expected a symmetric Hessian, but <v, A u> is not <A v, u> for two vectors and the {operator}: its "
        f"gradient comes from a backward or a hook that is not the derivative of the function. Mend that, or form the "
        f"matrix by autodiff.hessian, row by row."
    )
