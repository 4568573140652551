"""Checks of what computes eigenvalues and singular values, and what it raises. Imports `errors` and `options`."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NoReturn

from autodiff.checks.options import positive_int
from autodiff.errors import ConvergenceWarning, DegeneracyError, OptionError, SolverError

if TYPE_CHECKING:
    from collections.abc import Sequence


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
    raise SolverError(
        f"{name}: expected an operator that equals its conjugate transpose, but <v, A u> is not <A v, u> for two "
        f"vectors and {operator}. Take operators.svds(A), or eigsh of (A + A.H) / 2; check=False leaves the comparison "
        f"out."
    )


def raise_products_not_finite(name: str, operator: str) -> NoReturn:
    raise SolverError(
        f"{name}: expected finite products, but {operator} times a vector holds NaN or infinities. Look at A @ v for a "
        f"vector v, and at what the operator was made at."
    )


def warn_not_converged(name: str, what: str, after: str, way_out: str) -> None:
    """A warning with figures."""
    message = f"{name}: {what} not converged after {after}. {way_out}"
    warnings.warn(message, ConvergenceWarning, stacklevel=4)


def raise_degenerate(name: str, came: str) -> NoReturn:
    raise DegeneracyError(
        f"{name}: expected simple eigenvalues, since their vectors or second derivatives are differentiated, but "
        f"{came}. A vector of a repeated eigenvalue is not a function of the operator. Differentiate what depends on "
        f"all of the vectors alike, such as the sum of the eigenvalues."
    )
