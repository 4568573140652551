"""Linear equations with operators: `solve`, which chooses an iteration and is differentiated implicitly."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from autodiff import checks
from autodiff._torch import functorch_active, traced_inline_only
from autodiff.core import trees
from autodiff.core.progress import Progress
from autodiff.operators.linear_solver import ITERATIONS, Found, LinearSolver, Method, constant
from autodiff.operators.operator import Operator
from autodiff.operators.refinement import Reason, Tolerance
from autodiff.operators.space import Leaves, Space

_NAME = "operators.solve"


class SolveInfo(NamedTuple):
    """How :func:`solve` came to its solution.

    Tensors have the shape ``()`` where b is one vector, and ``[k]`` where it is a matrix ``[n, k]``.

    >>> import torch
    >>> from autodiff import operators
    >>> A = operators.diagonal(torch.tensor([1.0, 2.0]))
    >>> x, info = operators.solve(A, torch.tensor([3.0, 4.0]), "cg", info=True)
    >>> info.reason, info.iterations
    ('converged', tensor(2))
    """

    #: The method that was taken.
    method: str
    #: How many steps each right-hand side took.
    iterations: Tensor
    #: The norm of b - A x, as a part of that of b.
    residual_norm: Tensor
    #: Which right-hand sides are solved as exactly as was asked for.
    converged: Tensor
    #: ``"converged"``, ``"maxiter"``, or ``"stagnated"`` where more steps would not have helped.
    reason: Reason
    #: The norms of the residuals before each step, ``[steps]`` or ``[steps, k]``, as the iteration knows them.
    history: Tensor


@overload
def solve(
    A: Operator,
    b: Any,
    method: Method | Literal["auto"] = "auto",
    *,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    x0: Any = None,
    preconditioner: Operator | None = None,
    restart: int = 20,
    info: Literal[True],
    progress: bool = False,
    check: bool = True,
) -> tuple[Any, SolveInfo]: ...
@overload
def solve(
    A: Operator,
    b: Any,
    method: Method | Literal["auto"] = "auto",
    *,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    x0: Any = None,
    preconditioner: Operator | None = None,
    restart: int = 20,
    info: bool = False,
    progress: bool = False,
    check: bool = True,
) -> Any: ...
@traced_inline_only
def solve(
    A: Operator,
    b: Any,
    method: Method | Literal["auto"] = "auto",
    *,
    rtol: float = 1e-5,
    atol: float = 0.0,
    maxiter: int | None = None,
    x0: Any = None,
    preconditioner: Operator | None = None,
    restart: int = 20,
    info: bool = False,
    progress: bool = False,
    check: bool = True,
) -> Any:
    r"""Solution of a linear equation with an operator, of several at once, or of least squares.

    .. math:: A x = b \qquad \text{or, by LSMR,} \qquad \min_x \lVert A x - b \rVert

    A step multiplies by A once for all right-hand sides together; LSMR multiplies by its conjugate transpose too.
    One more product at the end makes sure that the residual is as small as reported. The solution is differentiated in
    b and in the tensors that A was made of by the implicit function theorem, at any order and in both modes: a
    derivative is a solution too, to the same tolerance. By LSMR that holds for operators of full rank.

    ``method="auto"`` takes ``"cg"`` for an operator that is known to be positive, ``"minres"`` for one that is known
    to be symmetric, ``"gmres"`` for others that are square, and ``"lsmr"`` for the rest.

    >>> import torch
    >>> from autodiff import operators
    >>> A = operators.hessian(lambda x: (x**3).sum())(torch.tensor([1.0, 2.0]))
    >>> operators.solve(A, torch.tensor([6.0, 6.0]))
    tensor([1.0000, 0.5000])

    Args:
        A: an operator in single or double precision.
        b: a tree like ``A.codomain``, a tensor ``[m]``, or ``[m, k]`` for k right-hand sides.
        method: ``"cg"`` (conjugate gradients, for positive definite operators), ``"minres"`` (for symmetric ones),
            ``"gmres"`` (restarted, for square ones), ``"lsmr"`` (least squares, and of all solutions the one of least
            norm, or the nearest to ``x0``), or ``"auto"``.
        rtol: the norm of the residual may be so large, as a part of that of b. LSMR also stops where
            :math:`\lVert A^{\mathsf H} r \rVert \le \text{rtol} \lVert A \rVert \lVert r \rVert`.
        atol: or so large.
        maxiter: how many steps at most; None takes 10 for each unknown.
        x0: where to begin, in b's form; None for zero.
        preconditioner: an operator that comes near to A's inverse, such as :func:`jacobi`, :func:`block_jacobi` or
            :func:`nystrom`; positive for ``"cg"`` and ``"minres"``. For ``"lsmr"`` it maps A's domain to itself, and
            A times it is better conditioned than A. It is taken for a constant.
        restart: after how many steps GMRES begins anew: it keeps as many vectors for each right-hand side.
        info: whether to return how the solution was found, too.
        progress: show a bar with steps and the largest residual (needs tqdm).
        check: whether to multiply two vectors, to see that an operator is symmetric that is not known to be, for
            ``"cg"`` and ``"minres"``.

    Returns:
        The solution, of b's form on A's domain, or ``(solution, info)`` with a :class:`SolveInfo`.

    Raises:
        SolverError: the operator is not symmetric or positive where it has to be, or numbers are not finite.
        StructureError, ShapeError, DtypeError, LeafError: b, x0 or the preconditioner do not fit A.
        OptionError: an option has a value that is not allowed.

    Warns:
        ConvergenceWarning: the residual is larger than was asked for.
    """
    checks.untraced_iteration(_NAME)
    taken = _checked(A, method, rtol, atol, maxiter, preconditioner, restart, progress)
    form, leaves, count = A.codomain.read(_NAME, b, "b")
    B = A.codomain.joined_columns(leaves, count) if form == "matrix" else A.codomain.joined(leaves)[:, None]
    start = None if x0 is None else _start(A, x0, count)
    if functorch_active():
        # What a product has in common is recorded inside the transforms that are active, and not kept outside of them.
        A = trees.unflatten(*reversed(trees.flatten(A)))
    A = A.prepared()
    M = None if preconditioner is None else constant(preconditioner)
    solver = LinearSolver(_NAME, taken, Tolerance(rtol, atol), maxiter, M, restart, progress, check)
    X = solver.solution(A, B.to(A.dtype), start)
    solver.warn(solver.found[0], "", stacklevel=2)
    solution = _written(A.domain, form, X, count)
    return (solution, _info(solver.found[0], form)) if info else solution


def _checked(
    A: Operator,
    method: Method | Literal["auto"],
    rtol: float,
    atol: float,
    maxiter: int | None,
    preconditioner: Operator | None,
    restart: int,
    progress: bool,
) -> Method:
    """The method that is taken, where the options are allowed."""
    checks.operator(_NAME, "A", A, Operator)
    checks.choice(_NAME, "method", method, ("auto", *ITERATIONS))
    checks.tolerance(_NAME, "rtol", rtol)
    checks.tolerance(_NAME, "atol", atol)
    if maxiter is not None:
        checks.positive_int(_NAME, "maxiter", maxiter, "None takes 10 for each unknown.")
    checks.positive_int(_NAME, "restart", restart, "It is the number of vectors that GMRES keeps.")
    if progress:
        Progress.check(_NAME)
    checks.solver_dtypes(_NAME, [spec.dtype for spec in (*A.domain.leaves, *A.codomain.leaves)])
    rows, columns = A.shape
    taken: Method
    if method == "auto":
        square: Method = "cg" if A.positive else "minres" if A.symmetric else "gmres"
        taken = square if rows == columns else "lsmr"
    else:
        taken = method
    if taken != "lsmr":
        checks.square_system(_NAME, taken, A.name, A.shape)
    if preconditioner is not None:
        checks.operator(_NAME, "preconditioner", preconditioner, Operator)
        source, where = (A.domain, "A.domain") if taken == "lsmr" else (A.codomain, "A.codomain")
        checks.same_space(_NAME, "preconditioner.domain", preconditioner.domain, where, source)
        checks.same_space(_NAME, "preconditioner.codomain", preconditioner.codomain, "A.domain", A.domain)
    return taken


def _start(A: Operator, x0: Any, count: int) -> Tensor:
    _, leaves, starts = A.domain.read(_NAME, x0, "x0")
    checks.number_of_starts(_NAME, starts, count)
    columns = A.domain.joined(leaves)[:, None] if starts == 1 else A.domain.joined_columns(leaves, starts)
    return columns.detach().to(A.dtype)


def _written(space: Space, form: Any, X: Tensor, count: int) -> Any:
    leaves: Leaves = space.split_columns(X) if form == "matrix" else space.split(X[:, 0])
    return space.write(form, leaves, count)


def _info(found: Found, form: str) -> SolveInfo:
    _, residuals, converged, reason = found.outcome
    steps = found.steps
    counts = torch.zeros_like(residuals, dtype=torch.int64)
    counts = counts if steps.counts is None else steps.counts + counts
    history = torch.stack(steps.history) if steps.history else residuals.new_zeros(0, len(residuals))
    tensors = [counts, residuals, converged, history]
    if form != "matrix":
        tensors = [tensor[..., 0] for tensor in tensors]
    counts, residuals, converged, history = tensors
    return SolveInfo(steps.method, counts, residuals, converged, reason, history)
