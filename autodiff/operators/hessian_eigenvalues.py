"""The outermost eigenvalues of a Hessian, by block Lanczos iterations of a number that is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autodiff import checks
from autodiff._torch import compiling
from autodiff.core.call import wraps
from autodiff.operators.derivatives import HessianOperator, Options
from autodiff.operators.eigenpairs import Eigenpairs
from autodiff.operators.eigsh import Problem
from autodiff.operators.lanczos import Dimensions, Until
from autodiff.types import Argnums, P, Which, Wrt

# The Krylov space of k eigenvalues has so many blocks, of so many vectors more than k. Measured on spectra
# of 400 and 2000 numbers and on Hessians of MLPs with 533 and 2890 parameters, as fractions of the norm:
# eigenvalues that stand apart come out to 1e-9 after 20 blocks (1e-3 after 10), those at the edge of a
# continuous spectrum to 4e-3 (30 blocks: 1e-3, 40: 3e-4). Spare vectors let clusters of k converge.
_BLOCKS = 20
_SPARE = 2
# The matrix is dense where it is at most so much larger than the Krylov space: many rows in one batch take less
# time than few of them in many. A heuristic: per-sample eigenvalues of MLPs take the same time at a factor of 3.
_WORTH_FORMING = 2


def hessian_eigenvalues(
    func: Callable[P, Any],
    k: int,
    argnums: Argnums = 0,
    *,
    which: Which = "LA",
    has_aux: bool = False,
    wrt: Wrt = None,
    iterations: int | None = None,
) -> Callable[P, Any]:
    r"""The ``k`` outermost eigenvalues of the Hessian of a scalar function.

    .. math:: \nabla^2 f(x)\, v_i = \lambda_i v_i, \qquad \lambda_1 \ge \lambda_2 \ge \cdots

    The Hessian is seen as one matrix over all P numbers of the differentiated leaves. A large one is only
    multiplied by blocks of k + 2 vectors, and its eigenvalues are those of its restriction to the Krylov
    space of these blocks (G. H. Golub and R. Underwood, "The block Lanczos method for computing
    eigenvalues", 1977), whose basis is kept orthonormal in full. A matrix of at most twice the size of that
    space, with 20 iterations one of P up to 40 (k + 2), is dense, and the result exact.

    The result lies inside the spectrum: none of it is larger than the largest eigenvalue, or smaller than the smallest.
    With 20 iterations, eigenvalues that stand apart from the others, such as the largest of a network's
    loss, have errors of 1e-9 of the Hessian's norm or less (some 1e-6 in float32), whatever their multiplicity,
    and those at the edge of a dense spectrum some 1e-3; 40 iterations gain one digit to several. Every
    call starts from the same vectors, and no random state is used.

    Derivatives of the eigenvalues are right where these are simple and have converged, with half of their digits. First
    ones take no product more than there are eigenvalues, second ones solve equations with
    :math:`\nabla^2 f - \lambda_i`; a call that torch.compile traces has first ones alone, unless the matrix is dense.

    >>> import torch
    >>> hessian_eigenvalues(lambda x: (x**3).sum(), 2)(torch.tensor([1.0, -3.0, 2.0]))
    tensor([12.,  6.])

    Args:
        func: a function of trees that returns one real tensor of shape ``()``.
        k: how many eigenvalues, from 1 to P.
        argnums: which arguments to differentiate: a position, a parameter name, or a tuple of them.
        which: ``"LA"`` for the largest, descending; ``"SA"`` for the smallest, ascending; ``"LM"`` for the
            largest in magnitude, descending in it; ``"BE"`` for half from each end, ascending. These are
            SciPy's names.
        has_aux: whether ``func`` returns ``(value, aux)``.
        wrt: which leaves to differentiate: a pattern of places (``"last.*"``, ``"*bias"``), or a tuple of patterns.
        iterations: how many blocks the Krylov space has at most; None takes 20. It takes the memory of
            iterations x (k + 2) vectors.

    Returns:
        A function of ``func``'s arguments that returns a tensor of shape ``[k]`` and the differentiated
        leaves' common dtype. With ``has_aux`` it returns ``(eigenvalues, aux)``.

    Raises:
        OptionError: ``k`` is no int from 1 to P, ``which`` is unknown, or ``iterations`` is not positive.
        OutputError: the output is not one real scalar tensor.
        DtypeError: a differentiated leaf is complex.
        ArgnumsError, LeafError: ``argnums`` or ``wrt`` does not fit the call, or selects nothing to differentiate.
        DegeneracyError: a second derivative is asked for of an eigenvalue that is repeated.
        SolverError: the products are not finite.
    """
    name = "hessian_eigenvalues"
    checks.positive_int(name, "k", k, "Ask for at least one eigenvalue.")
    checks.choice(name, "which", which, ("LA", "SA", "LM", "BE"))
    if iterations is not None:
        checks.positive_int(name, "iterations", iterations, f"None takes {_BLOCKS}.")
    options = Options(func, argnums, has_aux, False, wrt, caller=name)

    @wraps(func)
    def eigenvalues(*args: Any, **kwargs: Any) -> Any:
        A = HessianOperator(options, args, kwargs).prepared()
        checks.eigenvalue_count(name, k, A.domain.size)
        values = _outermost(Problem(name, A, k, which), k + _SPARE, iterations or _BLOCKS)
        return (values, A.aux) if has_aux else values

    return eigenvalues


def _outermost(problem: Problem, width: int, steps: int) -> Tensor:
    A = problem.A
    dimensions = Dimensions(width, width * steps, 0)
    if A.domain.size <= _WORTH_FORMING * dimensions.basis:
        values = torch.linalg.eigvalsh(A.to_matrix().to(problem.dtype))
        return problem.picked(values).to(A.dtype)
    # Elsewhere than in a trace the iterations end when nothing but rounding is left.
    until = Until(steps, None if compiling() else 0.0, problem.until(None, None).floor)
    ritz = problem.solved(problem.start(width), dimensions, until)
    values = Eigenpairs(problem.name, A, ritz.values, ritz.vectors).values if problem.tracked else ritz.values
    return values.to(A.dtype)
