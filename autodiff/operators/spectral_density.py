"""The density of an operator's eigenvalues, from Lanczos iterations. Imports `quadrature` and the operators."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from autodiff import checks
from autodiff._torch import fully_unwrapped
from autodiff.core.rules import attach, is_tracked
from autodiff.operators.operator import Operator
from autodiff.operators.probes import drawing, standard_error
from autodiff.operators.quadrature import Undifferentiable, gauss_rules

if TYPE_CHECKING:
    from collections.abc import Iterable

    from autodiff.operators.quadrature import GaussRules

# The grid reaches so many widths beyond the spectrum: what lies outside is less than 1e-6 of the density.
_TAILS = 5
# Points of the grid, at least, and for each Lanczos step: a width then has some 8 of them, which integrate a
# Gaussian to rounding errors.
_POINTS = 1024
_POINTS_A_STEP = 10


class SpectralDensity(NamedTuple):
    r"""The density of a spectrum, with the quadrature rules that it was made of.

    ``grid``, ``density`` and ``standard_error`` are tensors ``[points]``, ``width`` is a tensor ``[]``. ``nodes`` and
    ``weights``, ``[probes, steps]``, are a quadrature rule for each probe: :math:`\sum_j w_j f(\theta_j)` estimates the
    mean of f over the eigenvalues.

    >>> import torch
    >>> from autodiff import operators
    >>> A = operators.diagonal(torch.tensor([1.0, 1.0, 1.0, 3.0]))
    >>> density = operators.spectral_density(A, probes=4)
    >>> mean, error = density.mean_of(lambda eigenvalue: eigenvalue)
    >>> mean
    tensor(1.5000)
    """

    grid: Tensor
    density: Tensor
    standard_error: Tensor
    width: Tensor
    nodes: Tensor
    weights: Tensor

    def mean_of(self, function: Any) -> tuple[Tensor, Tensor]:
        r"""The mean of a function over the eigenvalues, :math:`\operatorname{tr} f(A) / n`, and its standard error.

        The rule is exact for polynomials of a degree below twice the steps, for each probe.
        """
        means = (self.weights * function(self.nodes)).sum(1)
        return means.mean(), standard_error(means)

    def plot(self, ax: Any = None, **options: Any) -> Any:
        """Draw the density, with a band of two standard errors, and return Matplotlib's axes.

        Args:
            ax: the axes to draw in; None makes a new figure. Set its scale to ``"log"`` to see single eigenvalues
                beside a bulk.
            options: those of the line, such as ``color`` and ``label``.

        Raises:
            ImportError: Matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot as plt  # noqa: PLC0415  optional
        except ImportError as missing:
            raise ImportError(
                "SpectralDensity.plot: expected Matplotlib to be installed. Run pip install matplotlib."
            ) from missing
        if ax is None:
            ax = plt.subplots(layout="constrained")[1]
        grid, density, error = (
            one.detach().double().cpu().numpy() for one in (self.grid, self.density, self.standard_error)
        )
        (line,) = ax.plot(grid, density, **options)
        ax.fill_between(
            grid,
            (density - 2 * error).clip(0),
            density + 2 * error,
            color=line.get_color(),
            alpha=0.25,
            linewidth=0,
        )
        ax.set(xlabel="eigenvalue", ylabel="density")
        return ax


def spectral_density(
    A: Operator,
    probes: int = 10,
    steps: int = 80,
    *,
    grid: int | Tensor | None = None,
    width: float | None = None,
    generator: torch.Generator | None = None,
    check: bool = True,
) -> SpectralDensity:
    r"""Density of the eigenvalues of a symmetric operator, by stochastic Lanczos quadrature.

    .. math:: \rho(t) = \frac1n \sum_{i=1}^n g_\sigma(t - \lambda_i)
        \approx \frac1p \sum_{k=1}^p \sum_j w_{kj}\, g_\sigma(t - \theta_{kj})

    :math:`g_\sigma` is the density of a normal distribution of standard deviation ``width``. From each random vector
    ``steps`` Lanczos iterations, whose basis is kept orthonormal in full, give a tridiagonal matrix: its eigenvalues
    :math:`\theta` and the squares of their eigenvectors' first numbers are nodes and weights. All probes are multiplied
    together; the bases take the memory of ``probes`` x ``steps`` vectors, or 1 GiB, in groups of probes. An iteration
    ends early where its space is closed under A: then its rule is exact.

    >>> import torch
    >>> from autodiff import operators
    >>> A = operators.from_matrix(torch.diag(torch.tensor([1.0, 2.0, 2.0, 4.0])))
    >>> found = operators.spectral_density(A, width=0.05)
    >>> torch.trapezoid(found.density, found.grid)
    tensor(1.0000)

    Args:
        A: a symmetric operator, Hermitian where it is complex.
        probes: how many random vectors to begin with: the standard error falls as one over the root of it.
        steps: how many products to compute with each of them.
        grid: the eigenvalues at which to give the density, ``[points]``, or how many of them to spread over the
            spectrum and five widths beyond; None takes 1024, or 10 for each step where that is more.
        width: the standard deviation of the Gaussian that stands for an eigenvalue. None is the spectrum's extent over
            ``steps``: a narrower one shows the nodes of the quadrature, not the eigenvalues.
        generator: where random signs come from; None is torch's global generator of A's device. The same state gives
            the same density. Inside ``vmap`` all samples of the batch share the probes.
        check: whether to see if A is symmetric for two vectors, where that is not known.

    Returns:
        A named tuple of ``grid``, ``density``, its ``standard_error``, ``width``, and the ``nodes`` and ``weights`` of
        the quadrature. The density integrates to one over a grid that is not given. The standard error is the standard
        deviation of the probes' densities over the root of their number, NaN for one probe; it does not hold what the
        quadrature rule gets wrong, which with the default width is some 1e-3 of the density or less. A derivative of
        the density is an error.

    Raises:
        ShapeError: the operator does not map a space to itself.
        SolverError: it is not symmetric.
        RuleError: the density is differentiated.
        OptionError: ``probes`` or ``steps`` is not positive, or the grid too coarse for the width.

    L. Lin, Y. Saad and C. Yang, "Approximating spectral densities of large matrices", SIAM Review 58 (2016).
    B. Ghorbani, S. Krishnan and Y. Xiao, "An investigation into neural net optimization via Hessian eigenvalue
    density", ICML (2019).
    """
    name = "operators.spectral_density"
    checks.operator(name, "A", A, Operator)
    checks.positive_int(name, "probes", probes, "It is how many random vectors there are.")
    checks.positive_int(name, "steps", steps, "It is how many products are computed with each probe.")
    if width is not None and not width > 0:
        checks.raise_width(name, width)
    if isinstance(grid, int):
        checks.positive_int(name, "grid", grid, "It is how many points there are; a tensor gives the points.")
    elif grid is not None and (not isinstance(grid, Tensor) or grid.dim() != 1):
        checks.raise_grid(name, grid)
    drawn = drawing(name, A, "rademacher", generator)
    nodes, weights = _rules(name, gauss_rules(name, A.prepared(), drawn, probes, steps, check))
    sigma = _width(nodes.detach(), steps) if width is None else torch.full_like(nodes[0, 0].detach(), width)
    if isinstance(grid, Tensor):
        points = grid.to(nodes)
    else:
        points = _points(nodes.detach(), sigma, grid or max(_POINTS, _POINTS_A_STEP * steps))
        spacing = points[1] - points[0] if points.shape[0] > 1 else points.new_tensor(torch.inf)
        if bool(fully_unwrapped(spacing > sigma).any()):
            checks.raise_coarse_grid(name, points.shape[0], float(fully_unwrapped(sigma).min()))
    # [probes, points]
    densities = torch.stack([_broadened(points, *rule, sigma) for rule in zip(nodes, weights, strict=True)])
    return SpectralDensity(points, densities.mean(0), standard_error(densities), sigma, nodes, weights)


def _rules(name: str, rules: Iterable[GaussRules]) -> tuple[Tensor, Tensor]:
    """Nodes and weights of all probes, whose derivative is an error where A is differentiated."""
    refused = Undifferentiable(
        name, "the density", "Compute it under torch.no_grad, or of a detached operator."
    )
    groups = []
    for group in rules:
        pair = [group.nodes, group.weights]
        groups.append(attach(refused, pair, [group.first]) if is_tracked(group.first) else pair)
    longest = max(nodes.shape[1] for nodes, _ in groups)
    padded = [_padded(nodes, weights, longest) for nodes, weights in groups]
    return torch.cat([nodes for nodes, _ in padded]), torch.cat([weights for _, weights in padded])


def _padded(nodes: Tensor, weights: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """With nodes of no weight, up to so many."""
    more = steps - nodes.shape[1]
    if not more:
        return nodes, weights
    zeros = torch.zeros_like(weights[:, :1]).expand(-1, more)
    return torch.cat([nodes, nodes[:, :1].expand(-1, more)], 1), torch.cat([weights, zeros], 1)


def _width(nodes: Tensor, steps: int) -> Tensor:
    """The extent of the spectrum over the steps.

    A rule of m nodes is exact for polynomials of degree 2 m - 1; the coefficients of a Gaussian of this width in
    Chebyshev polynomials over the extent have fallen to exp(-8) there.
    """
    extent, largest = nodes.amax() - nodes.amin(), nodes.abs().amax()
    # Of a multiple of the identity, what rounding leaves of the extent says nothing.
    extent = torch.where(extent > 100 * torch.finfo(nodes.dtype).eps * largest, extent, largest)
    return torch.where(extent > 0, extent, 1) / steps


def _points(nodes: Tensor, width: Tensor, count: int) -> Tensor:
    """So many points over the spectrum and its tails."""
    low, high = nodes.amin() - _TAILS * width, nodes.amax() + _TAILS * width
    return low + (high - low) * torch.linspace(0, 1, count, dtype=nodes.dtype, device=nodes.device)


def _broadened(points: Tensor, nodes: Tensor, weights: Tensor, width: Tensor) -> Tensor:
    """The density of one probe.

    # points: [points], nodes, weights: [steps] -> [points]
    """
    bells = torch.exp(-0.5 * ((points[:, None] - nodes) / width) ** 2)
    density: Tensor = bells @ weights / (width * (2 * torch.pi) ** 0.5)
    return density
