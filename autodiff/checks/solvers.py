"""Checks of solvers of linear equations, and what they raise. Imports `_torch` and `errors`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch

from autodiff._torch import compiling, stop_tracing
from autodiff.errors import ArgnumsError, DtypeError, LeafError, OptionError, ShapeError, SolverError

if TYPE_CHECKING:
    from collections.abc import Sequence


def untraced_iteration(name: str) -> None:
    if compiling():
        stop_tracing(
            f"{name}: torch.compile traces the call. Expected a call outside of what is compiled: how many steps are "
            f"taken depends on the numbers, which no tracer can follow. Compile with fullgraph=False, which runs it "
            f"uncompiled."
        )


def tolerance(name: str, option: str, value: object) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf"):
        return
    raise OptionError(
        f"{name}: expected {option} to be a number of at least 0, got {value!r}. rtol=1e-5 asks for a residual of "
        f"1e-5 times the norm of b."
    )


def operator(name: str, argument: str, value: object, kind: type[Any]) -> None:
    if not isinstance(value, kind):
        raise LeafError(
            f"{name}: expected {argument} to be an operator, got {type(value).__name__}. Make one: "
            f"operators.from_matrix(M) of a matrix, operators.from_matvec(f, like) of a function that multiplies."
        )


def solver_dtypes(name: str, dtypes: Sequence[torch.dtype]) -> None:
    """None of them in half precision."""
    for dtype in dtypes:
        if dtype in (torch.float16, torch.bfloat16):
            raise DtypeError(
                f"{name}: expected an operator in single or double precision, got {dtype}, in which no product is "
                f"exact enough for an iteration. Make the operator at float32 tensors."
            )


def square_system(name: str, method: str, operator: str, shape: tuple[int, int]) -> None:
    if shape[0] != shape[1]:
        raise ShapeError(
            f"{name}: expected a square operator for method={method!r}, got {operator} of shape {list(shape)}. Take "
            f"method='lsmr', which solves least squares."
        )


def number_of_starts(name: str, starts: int, count: int) -> None:
    if starts != count:
        raise ShapeError(
            f"{name}: expected as many vectors in x0 as in b, got {starts} and {count}. Give x0 a column for each "
            f"right-hand side."
        )


def raise_not_symmetric_for(name: str, method: str, operator: str) -> NoReturn:
    raise SolverError(
        f"{name}: expected a symmetric operator for method={method!r}, but <v, A u> is not <A v, u> for two vectors "
        f"and {operator}. Take method='gmres', or pass check=False if rounding alone makes the difference."
    )


def raise_indefinite(name: str, step: int) -> NoReturn:
    raise SolverError(
        f"{name}: expected a positive definite operator for method='cg', but p'Ap is negative for the direction p of "
        f"step {step}. Take method='minres', for symmetric operators that are not positive, or add damping: A + 0.1."
    )


def raise_preconditioner_not_positive(name: str, method: str, step: int) -> NoReturn:
    raise SolverError(
        f"{name}: expected a positive definite preconditioner for method={method!r}, but r'Mr is negative for the "
        f"residual r after step {step}. Precondition by an operator that is positive, or take method='gmres'."
    )


def raise_not_finite(name: str, method: str, step: int) -> NoReturn:
    raise SolverError(
        f"{name}: expected finite numbers, but {method} has NaN or infinities after step {step}. Check the operator: "
        f"A @ v for a vector v, and the preconditioner likewise."
    )


def raise_right_side_not_finite(name: str) -> NoReturn:
    raise SolverError(
        f"{name}: expected finite numbers, but b, or A @ x0, holds NaN or infinities. Check where they come from."
    )


def raise_no_inverse(name: str, what: str) -> NoReturn:
    raise SolverError(
        f"{name}: expected {what} that has an inverse, got zeros, NaN or infinities in it, or a singular matrix. Pass "
        f"damping, and solve with A + damping."
    )


def raise_not_positive_for(name: str, operator: str) -> NoReturn:
    raise SolverError(
        f"{name}: expected a positive semidefinite operator, but u'Au is negative for a vector u and {operator}. Take "
        f"jacobi or block_jacobi, or a Gauss-Newton matrix in place of a Hessian."
    )


def rank(name: str, value: object, size: int) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= size:
        return
    raise OptionError(
        f"{name}: expected rank to be an int from 1 to {size}, the number of unknowns, got {value!r}."
    )


def positive_number(name: str, option: str, value: object) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf"):
        return
    raise OptionError(
        f"{name}: expected {option} to be a number above 0, got {value!r}. It is what is added to A's diagonal."
    )


def disjoint_blocks(name: str, groups: Sequence[Sequence[int]], paths: Sequence[str]) -> None:
    taken: set[int] = set()
    for group in groups:
        if twice := taken.intersection(group):
            raise ArgnumsError(
                f"{name}: expected blocks without common leaves, got two that match {paths[min(twice)]!r}. Name each "
                f"leaf in one block."
            )
        taken |= set(group)
