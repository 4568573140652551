"""Checks of what computes eigenvalues and singular values, and what it raises. Imports `_torch`, `errors` and `options`."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NoReturn

from autodiff._torch import compiling, stop_tracing
from autodiff.checks.options import positive_int
from autodiff.errors import ConvergenceWarning, DegeneracyError, LeafError, OptionError, RuleError

if TYPE_CHECKING:
    from collections.abc import Sequence


def operator(name: str, argument: str, value: object, kind: type) -> None:
    """An operator, and not a matrix or a function."""
    if not isinstance(value, kind):
        raise LeafError(
            f"{name}: expected {argument} to be an operator, got {type(value).__name__}. Make one: "
            f"operators.from_matrix(M) of a matrix, operators.from_matvec(f, like) of a function that multiplies."
        )


def untraced_iteration(name: str) -> None:
    if compiling():
        stop_tracing(
            f"{name}: torch.compile traces the call. Expected a call outside of what is compiled: how many steps are "
            f"taken depends on the numbers, which no tracer can follow. Compile with fullgraph=False, which runs it "
            f"uncompiled."
        )


def eigenvalue_count(name: str, k: int, size: int) -> None:
    if k > size:
        raise OptionError(
            f"{name}: k={k} eigenvalues are asked for, where the Hessian has {size}: one for each number of the "
            f"differentiated leaves. Pass a smaller k, or differentiate more leaves by argnums or wrt."
        )


def pair_count(name: str, k: int, shape: Sequence[int], what: str) -> None:
    """At most as many eigenvalues or singular values as there are."""
    if k > min(shape):
        raise OptionError(
            f"{name}: k={k} {what} are asked for, where an operator of shape {list(shape)} has {min(shape)}. Pass a "
            f"smaller k."
        )


def iteration_options(name: str, *, tol: object, **counts: object) -> None:
    """A tolerance, and numbers of vectors and steps; None stands for a default."""
    if tol is not None and not (isinstance(tol, int | float) and not isinstance(tol, bool) and tol >= 0):
        raise OptionError(
            f"{name}: expected tol to be None or a number of at least 0, got {tol!r}. tol=0 iterates until nothing but "
            f"rounding errors are left."
        )
    for option, count in counts.items():
        if count is not None:
            positive_int(name, option, count, "None takes the default.")


def raise_not_hermitian(name: str, operator: str) -> NoReturn:
    raise RuleError(
        f"{name}: expected an operator that equals its conjugate transpose, but <v, A u> is not <A v, u> for two vectors "
        f"and {operator}. Take operators.svds(A), or eigsh of (A + A.H) / 2; check=False leaves the comparison out."
    )


def raise_products_not_finite(name: str, operator: str) -> NoReturn:
    raise RuleError(
        f"{name}: expected finite products, but {operator} times a vector holds NaN or infinities. Look at A @ v for a "
        f"vector v, and at what the operator was made at."
    )


def warn_not_converged(name: str, what: str, after: str, way_out: str) -> None:
    """A warning with figures."""
    message = f"{name}: {what} not converged after {after}. {way_out}"
    warnings.warn(message, ConvergenceWarning, stacklevel=4)


def raise_degenerate(name: str, came: str) -> NoReturn:
    raise DegeneracyError(
        f"{name}: expected simple eigenvalues, since their vectors or second derivatives are differentiated, but {came}. "
        f"A vector of a repeated eigenvalue is no function of the operator. Differentiate what depends on all of the "
        f"vectors alike, such as the sum of the eigenvalues."
    )
