"""Finite differences, with which derivatives are compared.

Provides `Point`, a function with its finite differences along random directions, in float64, and
`same_random_numbers`, for all runs of a function. Never differentiates; imports `call`, `batch`, `checks` and `trees`.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cached_property
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from autodiff import checks
from autodiff._torch import MESSAGES
from autodiff.core import trees
from autodiff.core.call import Call, is_differentiable
from autodiff.core.randomness import random_state, remember_randomness, set_random_state
from autodiff.errors import DerivativeError, DtypeError, OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# The steps with the least error are about 7e-4 and 4e-2, the fifth roots of the units of rounding. Smaller ones still
# leave ten and five digits, and meet a kink a hundred times and five times less often.
_DEFAULTS = {torch.float64: (1e-9, 1e-6, 2.0**-17), torch.float32: (1e-5, 1e-3, 2.0**-7)}  # atol, rtol, eps
# Units in the last place that a function's own operations may lose, by a heuristic.
_UNITS_LOST = 8
# A step is proportional to its number, within bounds: log at 0.01 needs a small one, and so does sin at 1000.
_LEAST_MOVE, _LARGEST_MOVE = 0.01, 10.0

_CAPTURED = (
    "args are converted to float64, but what f captures is not. Capture module.double(), or pass its parameters in "
    "args. Check an f that has to compute in float32 as lambda x: f(x.float())."
)


class Options(NamedTuple):
    """The user's options, None where the dtype decides, and the generator of random directions."""

    name: str
    atol: float | None
    rtol: float | None
    eps: float | None
    generator: torch.Generator

    def random_like(self, model: Tensor) -> Tensor:
        """Normal random numbers, complex ones for a complex model."""
        return torch.randn(model.shape, dtype=double(model), generator=self.generator).to(model)


class FiniteDifference(NamedTuple):
    """An output's derivative along a direction, and a bound of its rounding error."""

    value: Tensor
    rounding: Tensor


class Point:
    """A function where it is differentiated, with a random direction for each input.

    ``roots`` name its arguments, ``outputs`` its outputs, and ``named`` itself. ``dtype`` is the least precise one in
    which it is known to compute.
    """

    def __init__(
        self,
        options: Options,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        roots: Sequence[str],
        outputs: Sequence[str] | None = None,
        has_aux: bool = False,
        named: str = "f",
        order: int = 1,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.options, self.func, self.args, self.roots = options, func, args, roots
        self.has_aux, self.named, self.order = has_aux, named, order
        self.call = Call(options.name, func, args, {}, tuple(range(len(args))) or None, has_aux)
        self.primals = self.call.primals
        with naming(options.name, named):
            self.values = self.call.evaluate([primal.clone() for primal in self.primals])[0]
        self.inputs = [path for arg, root in zip(args, roots, strict=True) for path in _paths(arg, root)]
        self.outputs = outputs or [self.call.path_of_output(j) for j in range(len(self.values))]
        checks.tensor_outputs(options.name, self.values, lambda j: self.outputs[j])
        self.dtype = _least_precise(self, dtype)
        chosen = zip(options[1:4], _DEFAULTS[self.dtype], strict=True)
        self.atol, self.rtol, self.eps = (usual if given is None else given for given, usual in chosen)
        self.directions = [
            options.random_like(primal) * primal.abs().clamp(_LEAST_MOVE, _LARGEST_MOVE)
            for primal in self.primals
        ]

    def next(
        self, transform: str, product: Callable[..., Any], seeds: tuple[Any, ...], outputs: list[str]
    ) -> Point:
        """A product of this function as a function of these arguments, and of tangents or cotangents."""
        kind = "tangents" if transform == "jvp" else "cotangents"
        roots = [*self.roots, *(f"{kind}{self.order}[{i}]" for i in range(len(seeds)))]
        args, named = (*self.args, *seeds), f"{transform} of {self.named}"
        return Point(
            self.options, product, args, roots, outputs, named=named, order=self.order + 1, dtype=self.dtype
        )

    def finite_difference(self, perturbed: Sequence[int], output: int) -> FiniteDifference:
        """Of one output, along the directions of the inputs ``perturbed``."""
        picked = [self._differences[i][output] for i in perturbed]
        value = torch.stack([difference.value for difference in picked]).sum(0)
        return FiniteDifference(value, torch.stack([difference.rounding for difference in picked]).sum(0))

    @cached_property
    def _differences(self) -> list[list[FiniteDifference]]:
        # [each input, each output], an output's shape
        return [self._along(position) for position in range(len(self.primals))]

    def _along(self, position: int) -> list[FiniteDifference]:
        def at(steps: int) -> list[Tensor]:
            leaves = [primal.clone() for primal in self.primals]
            leaves[position] += steps * self.eps * self.directions[position]
            return [value.detach().to(double(value)) for value in self.call.evaluate(leaves)[0]]

        differences = []
        for right, left, far_right, far_left in zip(at(1), at(-1), at(2), at(-2), strict=True):
            value = (8 * (right - left) - (far_right - far_left)) / (12 * self.eps)
            largest = torch.stack([right.abs(), left.abs(), far_right.abs(), far_left.abs()]).amax(0)
            # Each of the four values may have an error of these units, and (8 + 8 + 1 + 1) / 12 of them add up.
            unit = 1.5 * _UNITS_LOST * torch.finfo(self.dtype).eps / self.eps
            differences.append(FiniteDifference(value, unit * largest))
        return differences


def point_at(
    name: str,
    f: Callable[..., Any],
    args: Any,
    has_aux: bool,
    tolerances: tuple[float | None, float | None, float | None],
    seed: int,
) -> Point:
    """The user's function at its arguments, in double precision; ``tolerances`` are atol, rtol and eps."""
    for option, value, least in zip(("atol", "rtol", "eps"), tolerances, (0.0, 0.0, 2.0**-52), strict=True):
        if value is not None and not least <= value < inf:
            raise OptionError(
                f"{name}: {option} is a finite number from {least:.2g} on, got {value!r}. Leave it out for a value "
                f"that suits the dtype in which f computes."
            )
    args = tuple(args) if isinstance(args, list) else args
    checks.tuple_of_primals(name, args)
    options = Options(name, *tolerances, torch.Generator().manual_seed(seed))
    return Point(options, f, in_double(args), [f"args[{i}]" for i in range(len(args))], has_aux=has_aux)


def double(tensor: Tensor) -> torch.dtype:
    """The most precise dtype, real or complex as the tensor is."""
    return torch.complex128 if tensor.is_complex() else torch.float64


def in_double(tree: Any) -> Any:
    """A copy of the tree, cut from any graph, with its floating and complex leaves in double precision."""
    return _with_tensors(
        tree,
        lambda leaf: leaf.detach().to(double(leaf) if is_differentiable(leaf) else leaf.dtype, copy=True),
    )


def copied(tree: Any) -> Any:
    """A copy of the tree, for a function that may write to it."""
    return _with_tensors(tree, torch.clone)


def _with_tensors(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    leaves, spec = trees.flatten(tree)
    return trees.unflatten(spec, [change(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves])


def _paths(tree: Any, root: str) -> list[str]:
    """The places of the leaves that are differentiated."""
    leaves, spec = trees.flatten(tree)
    return [p for p, leaf in zip(trees.paths(spec, root), leaves, strict=True) if is_differentiable(leaf)]


def _least_precise(point: Point, dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or that of an output if it is less precise; an error where there is nothing to compare."""
    for path, value in zip(point.outputs, point.values, strict=True):
        real = value.dtype.to_real()
        if real not in _DEFAULTS:
            raise DtypeError(
                f"{point.options.name}: {path} is expected in float64 or float32, got {value.dtype}, which is not "
                f"precise enough for finite differences. Let f compute in a wider dtype."
            )
        finite = value.isfinite()
        if not finite.all():
            raise DerivativeError(
                f"{point.options.name}: {path} is expected to be finite, got {value[~finite][0].item()} in it, by "
                f"{point.named}. Check at other args, where it is defined.",
                order=point.order - 1,
                output=path,
            )
        dtype = real if torch.finfo(real).eps > torch.finfo(dtype).eps else dtype
    return dtype


@contextmanager
def naming(name: str, named: str) -> Iterator[None]:
    """Name what was run in an error of torch's."""
    try:
        yield
    except RuntimeError as error:
        checks.advise(name, error, MESSAGES["dtypes are mixed"], _CAPTURED)
        checks.advise(name, error, [""], f"raised while {named} ran.")
        raise


@contextmanager
def same_random_numbers() -> Iterator[Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """Give functions the same random numbers in every run; afterwards torch's state is that after one run."""
    rewind = remember_randomness()
    after: list[dict[str, Tensor]] = []

    def again(func: Callable[..., Any]) -> Callable[..., Any]:
        def rerun(*args: Any, **kwargs: Any) -> Any:
            rewind()
            result = func(*args, **kwargs)
            if not after:
                after.append(random_state())
            return result

        return rerun

    try:
        yield again
    finally:
        for state in after:
            set_random_state(state)
