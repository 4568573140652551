"""What a row of the benchmark is: one problem, and how each library solves it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

import autodiff
from benchmarks import before

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

AUTODIFF, TORCH_FUNC, FUNCTIONAL, BY_HAND = "autodiff", "torch.func", "autograd.functional", "by hand"
BEFORE = "before"  # autodiff as it was at another commit; where a place has it
COMPILED, TORCH_FUNC_COMPILED, JAX = "autodiff compiled", "torch.func compiled", "JAX jitted"
EAGER = (AUTODIFF, TORCH_FUNC, FUNCTIONAL, BY_HAND)
COLUMNS = (*EAGER, COMPILED, TORCH_FUNC_COMPILED, JAX)
COMPILED_FROM = {COMPILED: AUTODIFF, TORCH_FUNC_COMPILED: TORCH_FUNC}


class Side(NamedTuple):
    """How one library solves it: ``func(*args)``."""

    func: Callable[..., Any]
    args: tuple[Any, ...]

    def run(self) -> Any:
        return self.func(*self.args)


class OfJax(NamedTuple):
    """The same for JAX, which runs elsewhere: a transform and a function of jax_side.py, by name."""

    transform: str
    function: str
    args: tuple[Any, ...]


Sides: TypeAlias = "dict[str, Side | OfJax]"


@dataclass(frozen=True)
class Place:
    """The precision and the device of a problem. The numbers are the same everywhere.

    ``before`` is the folder of the package as it was, where it is measured as well.
    """

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    before: str = ""

    def numbers(self, *shape: int, seed: int = 0) -> Tensor:
        drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        return drawn.to(self.device, self.dtype)

    def put(self, make: Callable[[], nn.Module]) -> nn.Module:
        """A module with the same parameters everywhere, which are constants."""
        torch.manual_seed(0)
        return make().to(self.device, self.dtype).requires_grad_(requires_grad=False)


@dataclass(frozen=True)
class Row:
    """One problem. ``sides`` sets it up at a place: a side for each column that can solve it.

    The results of all sides are the same tensors, one after the other. ``short`` rows are in the short
    set. ``compiles`` names the columns that torch.compile takes.
    """

    name: str
    number: int
    sides: Callable[[Place], Sides]
    short: bool = False
    compiles: tuple[str, ...] = (AUTODIFF, TORCH_FUNC)


def of_autodiff(place: Place, of: Callable[[Any], Callable[..., Any]], *args: Any) -> dict[str, Side | OfJax]:
    """A composition of autodiff's names; from the package as it was too, where the place has it."""
    libraries = {AUTODIFF: autodiff} | ({BEFORE: before.library(place.before)} if place.before else {})
    return {column: Side(of(library), args) for column, library in libraries.items()}


def transformed(place: Place, of: Callable[[Any], Callable[..., Any]], *args: Any) -> dict[str, Side | OfJax]:
    """The same composition of the same names, from autodiff and from torch.func."""
    return {**of_autodiff(place, of, *args), TORCH_FUNC: Side(of(torch.func), args)}
