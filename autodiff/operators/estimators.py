"""Traces, diagonals, determinants and norms of operators, estimated from products with random vectors.

Each function checks its options, draws, and gives an estimate with its standard error. Imports `probes`, `quadrature`
and the operators.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, assert_never, overload

import torch
from torch import Tensor

from autodiff import checks
from autodiff.operators import given
from autodiff.operators.leave_one_out import xdiag, xtrace
from autodiff.operators.operator import Operator
from autodiff.operators.probes import (
    Distribution,
    column_norms,
    computed_in,
    drawing,
    standard_error,
    unit,
)
from autodiff.operators.quadrature import log_samples
from autodiff.operators.trace_methods import (
    exact_logdet,
    exact_norm,
    hutch_plus_plus,
    hutchinson_diagonal,
    quadratic_forms,
)

if TYPE_CHECKING:
    from autodiff.operators.space import Space

TraceMethod: TypeAlias = Literal["hutchinson", "hutch++", "xtrace", "exact"]
DiagonalMethod: TypeAlias = Literal["hutchinson", "xdiag", "exact"]
NormMethod: TypeAlias = Literal["hutchinson", "exact"]
LogdetMethod: TypeAlias = Literal["quadrature", "exact"]

_TRACE: tuple[str, ...] = ("hutchinson", "hutch++", "xtrace", "exact")
_DIAGONAL: tuple[str, ...] = ("hutchinson", "xdiag", "exact")
# Below so many samples a method has nothing to compare.
_FEWEST = {"hutch++": 3, "xtrace": 4, "xdiag": 4}
# It finds a space by one of so many parts of them.
_PARTS = {"hutch++": 3, "xtrace": 2, "xdiag": 2}


class Estimate(NamedTuple):
    """An estimate and the standard error that its samples give, of the same structure.

    >>> import torch
    >>> from autodiff import operators
    >>> operators.trace(operators.diagonal(torch.tensor([1.0, 2.0])), "exact")
    Estimate(estimate=tensor(3.), standard_error=tensor(0.))
    """

    estimate: Any
    standard_error: Any


def trace(
    A: Operator,
    method: TraceMethod = "hutchinson",
    *,
    samples: int = 100,
    distribution: Distribution | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""Trace of a square operator, from products with random vectors or with the standard basis.

    .. math:: \operatorname{tr} A = \mathbb{E}\, z^{\mathsf H} A z, \qquad \mathbb{E}\, z z^{\mathsf H} = I

    - ``"hutchinson"``: the mean of :math:`z^{\mathsf H} A z`. Its error falls as one over the root of the samples.
    - ``"hutch++"``: a third of the products finds a space in which A is large, a third gives the trace on that space,
      and a third estimates the rest. Where the eigenvalues decay, it needs far fewer products.
    - ``"xtrace"``: half of the products find the space, half multiply it; each probe in turn is left out of the space,
      and estimates the rest. It is the most accurate one where the eigenvalues decay.
    - ``"exact"``: a product for each vector of the standard basis. So do the two before where their space would have
      all dimensions of the domain.

    The spaces take the memory of their vectors; what needs none is multiplied in batches of 64 MiB of probes.

    The estimate is differentiable in what the operator was made at. Probes are constants, as is the space that was
    found; the derivative is an unbiased estimate of the trace's. The standard error is a constant.

    >>> import torch
    >>> from autodiff import operators
    >>> A = operators.hessian(lambda x: (x**3).sum())(torch.tensor([1.0, 2.0]))
    >>> operators.trace(A, samples=4).estimate  # for a diagonal matrix each sample is exact
    tensor(18.)
    >>> operators.trace(A, "exact")
    Estimate(estimate=tensor(18.), standard_error=tensor(0.))

    Args:
        A: an operator from a space to itself.
        method: how the trace is estimated.
        samples: how many products with A to compute; the other methods round it down to what they can divide.
        distribution: the probes' numbers: ``"rademacher"``, signs (powers of i where A is complex); ``"gaussian"``,
            normal; or ``"sphere"``, a vector of norm :math:`\sqrt n`. None is ``"rademacher"``, and ``"sphere"`` for
            ``"xtrace"``, which takes no other.
        generator: where random numbers come from; None is torch's global generator of A's device. The same state gives
            the same estimate. Inside ``vmap`` all samples of the batch share the probes. A function in ``checkpoint``
            runs twice, and would draw others from a generator of outside: make one inside it.

    Returns:
        ``(estimate, standard_error)``: tensors of shape ``()``. The estimate is unbiased, in A's dtype. The standard
        error is the samples' standard deviation over the root of their number: NaN for one sample, and for few of them
        (below some 20) too small as often as Student's distribution says. The samples of ``"xtrace"`` are correlated:
        there the jackknife gives an error that is too large rather than too small, by up to 1.5 on flat spectra and 4
        where eigenvalues decay fast. Of ``"exact"`` it is zero.

    Raises:
        ShapeError: the operator does not map a space to itself.
        OptionError: ``method`` or ``distribution`` is unknown, or ``samples`` too few for the method.

    M. F. Hutchinson, "A stochastic estimator of the trace of the influence matrix", Communications in Statistics 18
    (1989). R. A. Meyer, C. Musco, C. Musco and D. P. Woodruff, "Hutch++: optimal stochastic trace estimation", SOSA
    (2021). E. N. Epperly, J. A. Tropp and R. J. Webber, "XTrace: making the most of every sample in stochastic trace
    estimation", SIAM J. Matrix Anal. Appl. 45 (2024).
    """
    name = "operators.trace"
    _check_options(name, A, method, _TRACE, samples, distribution)
    if method == "xtrace" and distribution not in (None, "sphere"):
        checks.raise_fixed_distribution(name, method, "sphere", distribution)
    if _is_exact(A, method, samples):
        total = A.domain.joined(A.domain.read(name, A.diagonal(), only_trees=True).leaves)
        return _scalar(total.to(computed_in(A.dtype)).sum(), None, A)
    probes = drawing(name, A, distribution or ("sphere" if method == "xtrace" else "rademacher"), generator)
    match method:
        case "hutchinson":
            forms = quadratic_forms(A.prepared(), probes, samples)
            return _scalar(forms.mean(), standard_error(forms), A)
        case "hutch++":
            return _scalar(*hutch_plus_plus(A.prepared(), probes, samples), A)
        case "xtrace":
            return _scalar(*xtrace(A.prepared(), probes, samples), A)
        case "exact":
            raise AssertionError("computed above")
        case _:
            assert_never(method)


def _check_options(
    name: str,
    A: Operator,
    method: str,
    methods: tuple[str, ...],
    samples: int,
    distribution: str | None = None,
) -> None:
    checks.operator(name, "A", A, Operator)
    checks.choice(name, "method", method, methods)
    checks.choice(name, "distribution", distribution, (None, "rademacher", "gaussian", "sphere"))
    checks.positive_int(name, "samples", samples, "It is how many products are computed.")
    checks.enough_samples(name, method, samples, _FEWEST.get(method, 1))
    if name != "operators.frobenius_norm":
        checks.square_operator(name, A.name, A.domain, A.codomain)


def _is_exact(A: Operator, method: str, samples: int) -> bool:
    """Whether a product for each vector of the basis is computed, as also where the space is to be the whole one."""
    return method == "exact" or samples // _PARTS.get(method, samples + 1) >= A.domain.size


def _scalar(estimate: Tensor, error: Tensor | None, A: Operator) -> Estimate:
    """A number in the operator's dtype; no error where it is exact."""
    real = A.dtype.to_real()
    error = torch.zeros_like(estimate.detach().abs()) if error is None else error
    return Estimate(estimate.to(A.dtype if estimate.is_complex() else real), error.to(real))


@overload
def diagonal(
    A: Operator,
    method: DiagonalMethod = ...,
    *,
    samples: int = ...,
    generator: torch.Generator | None = ...,
) -> Estimate: ...
@overload
def diagonal(A: Any) -> Operator: ...
def diagonal(
    A: Any,
    method: DiagonalMethod = "hutchinson",
    *,
    samples: int = 100,
    generator: torch.Generator | None = None,
) -> Any:
    r"""Diagonal of a square operator, estimated; or, as in numpy.diag, the diagonal operator of a tree.

    .. math:: \operatorname{diag} A = \mathbb{E}\, \bar z \circ A z, \qquad \mathbb{E}\, z z^{\mathsf H} = I

    - ``"hutchinson"``: the mean of :math:`\bar z \circ A z`. The variance of entry i is the sum of the squares of the
      other entries of its row over the samples.
    - ``"xdiag"``: half of the products find a space in which A is large, half multiply it by the conjugate transpose
      of A; each probe in turn is left out of the space, and estimates the rest. It is more accurate where the
      singular values decay, and takes the memory of all probes.
    - ``"exact"``: a product for each vector of the standard basis, as ``A.diagonal()``.

    Probes are random signs, and powers of i where A is complex. The estimate is differentiable in what the operator
    was made at, with probes and space as constants; the standard error is a constant.

    >>> import torch
    >>> from autodiff import operators
    >>> operators.diagonal(torch.tensor([1.0, 2.0])).to_matrix()
    tensor([[1., 0.],
            [0., 2.]])
    >>> A = operators.hessian(lambda x: (x**3).sum())(torch.tensor([1.0, 2.0]))
    >>> operators.diagonal(A, samples=4).estimate  # for a diagonal matrix each sample is exact
    tensor([ 6., 12.])

    Args:
        A: an operator from a space to itself; or a tree with at least one floating or complex tensor, whose numbers
            are to multiply a vector's one by one. The other arguments are for an operator.
        method: how the diagonal is estimated.
        samples: how many products to compute, with A and its conjugate transpose together.
        generator: where random numbers come from; None is torch's global generator of A's device. The same state gives
            the same estimate. Inside ``vmap`` all samples of the batch share the probes.

    Returns:
        Of an operator ``(estimate, standard_error)``, two trees like its domain. The estimate is unbiased; the standard
        errors are those of single entries, as in :func:`trace`: NaN for one sample, by the jackknife for ``"xdiag"``,
        zero for ``"exact"``. Of a tree the diagonal operator.

    Raises:
        ShapeError: the operator does not map a space to itself.
        OptionError: ``method`` is unknown, ``samples`` too few for the method, or options are given with a tree.
        LeafError: the tree holds no floating or complex tensor.

    C. Bekas, E. Kokiopoulou and Y. Saad, "An estimator for the diagonal of a matrix", Applied Numerical Mathematics 57
    (2007). E. N. Epperly, J. A. Tropp and R. J. Webber, as in :func:`trace`.
    """
    name = "operators.diagonal"
    if not isinstance(A, Operator):
        if method != "hutchinson" or samples != 100 or generator is not None:
            checks.raise_options_of_operator(name, A)
        return given.diagonal(A)
    _check_options(name, A, method, _DIAGONAL, samples)
    space = A.domain
    if _is_exact(A, method, samples):
        estimate = A.diagonal()
        return Estimate(estimate, _tree(torch.zeros(space.size, device=space.device), space, real=True))
    probes = drawing(name, A, "rademacher", generator)
    mean, error = (hutchinson_diagonal if method == "hutchinson" else xdiag)(A.prepared(), probes, samples)
    return Estimate(_tree(mean, space), _tree(error, space, real=True))


def _tree(vector: Tensor, space: Space, *, real: bool = False) -> Any:
    """The tree of a vector ``[n]``; of ``real`` numbers where those of the space may be complex."""
    if not real:
        return space.tree(space.split(vector))
    parts = zip(vector.split(space.sizes), space.leaves, strict=True)
    return space.tree([part.reshape(spec.shape).to(spec.dtype.to_real()) for part, spec in parts])


def logdet(
    A: Operator,
    method: LogdetMethod = "quadrature",
    *,
    samples: int = 30,
    steps: int = 40,
    generator: torch.Generator | None = None,
    check: bool = True,
) -> Estimate:
    r"""Logarithm of the determinant of a symmetric positive definite operator.

    .. math:: \log\det A = \operatorname{tr} \log A = \mathbb{E}\, z^{\mathsf H} \log(A)\, z

    ``"quadrature"`` computes :math:`z^{\mathsf H} \log(A)\, z` for random signs z by Lanczos iterations, whose
    tridiagonal matrix gives a Gauss quadrature rule; ``"exact"`` forms the matrix, and factorises it.

    The derivative of the quadrature is that of the trace, :math:`\mathbb{E}\, (A^{-1} z)^{\mathsf H}\, dA\, z`, for the
    same probes. It takes :math:`A^{-1} z` from the same iterations; derivatives of higher order solve with A, by
    conjugate gradients.

    >>> import torch
    >>> from autodiff import operators
    >>> A = operators.hessian(lambda x: (x**3).sum() / 6)(torch.tensor([1.0, 2.0]))
    >>> operators.logdet(A).estimate, operators.logdet(A, "exact").estimate  # log 2
    (tensor(0.6931), tensor(0.6931))

    Args:
        A: a symmetric positive definite operator.
        method: how the determinant is computed.
        samples: how many probes to draw; all of them go through the iterations together.
        steps: how many products with each of them to compute.
        generator: where random numbers come from; None is torch's global generator of A's device. The same state gives
            the same estimate. Inside ``vmap`` all samples of the batch share the probes.
        check: whether to see if A is symmetric for two vectors, where that is not known.

    Returns:
        ``(estimate, standard_error)``: real tensors of shape ``()``. The standard error is that of :func:`trace`, and
        does not hold the error of the quadrature, which makes the estimate too large. That falls about as
        :math:`\exp(-4\, \mathrm{steps} / \sqrt\kappa)` for a condition number :math:`\kappa`: compare with more steps.

    Raises:
        ShapeError: the operator does not map a space to itself.
        SolverError: it is not symmetric, or not positive definite: an eigenvalue that was found is zero or negative.
        OptionError: ``method`` is unknown, or ``samples`` or ``steps`` is not positive.

    S. Ubaru, J. Chen and Y. Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", SIAM J. Matrix Anal.
    Appl. 38 (2017). The derivative: K. Dong and others, "Scalable log determinants for Gaussian process kernel
    learning", NeurIPS (2017).
    """
    name = "operators.logdet"
    _check_options(name, A, method, ("quadrature", "exact"), samples)
    checks.positive_int(name, "steps", steps, "It is how many products are computed with each probe.")
    if method == "exact":
        return _scalar(exact_logdet(name, A, check), None, A)
    values = log_samples(name, A, drawing(name, A, "rademacher", generator), samples, steps, check)
    return _scalar(values.mean(), standard_error(values), A)


def frobenius_norm(
    A: Operator,
    method: NormMethod = "hutchinson",
    *,
    samples: int = 100,
    distribution: Distribution | None = None,
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""Frobenius norm of an operator: the root of the sum of the squares of its entries.

    .. math:: \|A\|_F^2 = \mathbb{E}\, \|A z\|^2, \qquad \mathbb{E}\, z z^{\mathsf H} = I

    >>> import torch
    >>> from autodiff import operators
    >>> A = operators.diagonal(torch.tensor([3.0, 4.0]))
    >>> operators.frobenius_norm(A, samples=4).estimate  # for a diagonal matrix each sample is exact
    tensor(5.)

    Args:
        A: an operator, which need not be square.
        method: ``"hutchinson"``, the root of the mean of :math:`\|A z\|^2`, or ``"exact"``, from products with the
            standard basis. For others, take the root of :func:`trace` of ``A.H @ A``.
        samples: how many products with A to compute.
        distribution: the probes' numbers, as in :func:`trace`; None is ``"rademacher"``.
        generator: where random numbers come from; None is torch's global generator of A's device. The same state gives
            the same estimate. Inside ``vmap`` all samples of the batch share the probes.

    Returns:
        ``(estimate, standard_error)``: real tensors of shape ``()``. The square is unbiased; the norm is too small, by
        about half of (standard error)^2 / norm. The standard error is that of the square over twice the norm. The
        estimate is differentiable, the standard error a constant.

    Raises:
        OptionError: ``method`` or ``distribution`` is unknown, or ``samples`` is not positive.
    """
    name = "operators.frobenius_norm"
    _check_options(name, A, method, ("hutchinson", "exact"), samples, distribution)
    dtype = computed_in(A.dtype)
    if method == "exact":
        return _scalar(exact_norm(A.prepared(), dtype), None, A)
    probes = drawing(name, A, distribution or "rademacher", generator)
    A = A.prepared()
    # Of norms the norm: at zero its derivative is zero, that of a root of squares NaN.
    each = torch.cat([column_norms(A.matmat(Z).to(dtype)) for Z in probes.batches(samples)])
    scale = unit(each)
    norm = torch.linalg.vector_norm(each / scale) / samples**0.5
    of_square = standard_error((each / scale) ** 2)
    error = torch.where(norm.detach() > 0, of_square / (2 * norm.detach()), of_square)
    return _scalar(norm * scale, error * scale, A)
