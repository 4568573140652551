"""Checks of what is estimated by random vectors, named as `checks` says. Imports `_torch`, `trees` and `errors`."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

from autodiff._torch import compiling, stop_tracing
from autodiff.core import trees
from autodiff.errors import OptionError, RuleError, ShapeError, SolverError


def enough_samples(name: str, method: str, samples: int, fewest: int) -> None:
    if samples < fewest:
        raise OptionError(
            f"{name}: method={method!r} expected at least {fewest} samples, which it divides between finding a space "
            f"and estimating the rest, got {samples}. Pass more, or method='hutchinson'."
        )


def untraced_drawing(name: str) -> None:
    if compiling():
        stop_tracing(
            f"{name}: torch.compile traces the call. Expected a call outside of what is compiled: it draws random "
            f"vectors outside of all transforms, and its iterations end by numbers, which no tracer follows. Compile "
            f"with fullgraph=False, which runs it uncompiled, or compile the function that the operator is made of."
        )


def some_number(name: str, operator_name: str, space: Any) -> None:
    if not space.size:
        raise ShapeError(
            f"{name}: expected an operator with eigenvalues, got {operator_name} on {space}. Make it at tensors "
            f"that hold numbers."
        )


def raise_fixed_distribution(name: str, method: str, fixed: str, distribution: object) -> NoReturn:
    raise OptionError(
        f"{name}: method={method!r} draws its probes from distribution={fixed!r}, got "
        f"distribution={distribution!r}. Leave it out, or pass another method."
    )


def raise_options_of_operator(name: str, tree: object) -> NoReturn:
    came = "a tensor" if isinstance(tree, Tensor) else f"a tree, {trees.structure(tree)}"
    raise OptionError(
        f"{name}: method, samples and generator are for the diagonal of an operator, got them with {came}, of which "
        f"the diagonal operator is made. Leave them out, or pass an operator, such as operators.from_matrix(M)."
    )


def raise_needs_symmetric(name: str, operator_name: str) -> NoReturn:
    raise SolverError(
        f"{name}: expected a symmetric operator (Hermitian where it is complex), but for {operator_name} <v, A u> is "
        f"not <A v, u> for two vectors. Take A.H @ A, or (A + A.H) / 2; check=False leaves the comparison out."
    )


def raise_not_positive_definite(name: str, operator_name: str, eigenvalue: float | None) -> NoReturn:
    found = (
        "it has no Cholesky factors"
        if eigenvalue is None
        else f"it has an eigenvalue of at most {eigenvalue:.3g}"
    )
    raise SolverError(
        f"{name}: expected a symmetric positive definite operator, got {operator_name}: {found}. Add a multiple of the "
        f"identity, as in A + 0.1, or take another function of its spectrum, from operators.spectral_density."
    )


def raise_undifferentiable(name: str, what: str, way_out: str) -> NoReturn:
    raise RuleError(
        f"{name}: expected {what} not to be differentiated, but a derivative of it is asked for. {way_out}"
    )


def raise_width(name: str, width: object) -> NoReturn:
    raise OptionError(
        f"{name}: width is a positive number, got {width!r}. None takes the extent of the spectrum over the steps."
    )


def raise_grid(name: str, grid: object) -> NoReturn:
    came = f"a tensor of shape {tuple(grid.shape)}" if isinstance(grid, Tensor) else repr(grid)
    raise OptionError(
        f"{name}: grid is a number of points or a tensor [points] of eigenvalues, got {came}. None takes 1024 "
        f"points or more."
    )


def raise_coarse_grid(name: str, points: int, width: float) -> NoReturn:
    raise OptionError(
        f"{name}: expected the points of the grid to be closer than the width, got {points} points for a width of "
        f"{width:.3g}, between which eigenvalues would disappear. Pass a larger number as grid, or a larger width."
    )
