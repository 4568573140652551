"""What a layer is: one transform with its options, for the library and for the reference.

Also what may stand between two layers: what an outer one needs of the function inside it, and aux.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from soak.containers import NOTE, Draw, Tree, active_leaves, mapped, numel, ravel, weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from soak.reference import Calculus, Func, Positions

NAMES = ("a", "b", "c")


@dataclass
class Stage:
    """What a layer is drawn for: the arguments as they are inside of it, and how many numbers come out."""

    draw: Draw
    args: tuple[Tree, ...]
    size: int
    outermost: bool
    random: bool

    def positions(self) -> Positions:
        """Which arguments to differentiate; each has a tensor."""
        if self.draw.chance(0.6):
            return self.draw.integer(0, len(self.args) - 1)
        return tuple(self.draw.some(range(len(self.args))))

    def argnums(self, positions: Positions) -> Any:
        """The positions in one of the ways of saying so."""
        if isinstance(positions, tuple):
            return tuple(self.argnums(position) for position in positions)
        return self.draw.pick([positions, positions, NAMES[positions], positions - len(self.args)])

    def randomness(self) -> str:
        return self.draw.pick(["same", "different"] if self.random else ["same", "different", "error"])

    def width(self, positions: Positions) -> int:
        many = (positions,) if isinstance(positions, int) else positions
        return sum(numel(self.args[i]) for i in many)


@dataclass
class Layer:
    """``lift`` is the library's transform, ``refer`` the reference's; both of functions of trees.

    ``rows`` says how many rows the reference pulls, ``size`` how many numbers the result has, ``modes``
    the modes of differentiation from the outer to the inner one, "r" or "f". ``keywords`` says whether
    arguments may come by keyword.
    """

    name: str
    lift: Callable[[Func], Func]
    refer: Callable[[Calculus, Func], Func]
    size: int
    rows: int = 1
    modes: str = ""
    args: tuple[Tree, ...] | None = None
    keywords: bool = True
    detaches: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def order(self) -> int:
        """How many derivatives are taken inside; some take the pullback of a pullback for one."""
        return len(self.modes) + (self.name in ("linearize", "jacobian", "functional.jvp"))


def positional(args: tuple[Tree, ...], kwargs: dict[str, Tree]) -> tuple[Tree, ...]:
    """All arguments by position; keywords name the last ones."""
    return (*args, *(kwargs[name] for name in NAMES[len(args) : len(args) + len(kwargs)]))


def alike(func: Func, body: Func) -> Func:
    """The body under the signature of ``func``, which argnums by name need."""
    return functools.wraps(func)(body)


def by_position(func: Func, body: Callable[[tuple[Tree, ...]], Tree]) -> Func:
    return alike(func, lambda *args, **kwargs: body(positional(args, kwargs)))


# What a layer needs of the function inside it.

PAIR = 2


def _size(vector: Tensor) -> Tensor:
    """Smooth and not linear, and no larger than the vector, so that nested derivatives stay in bounds."""
    return (1 + vector @ vector).sqrt()


def number(func: Func) -> Func:
    """One number, in which no number of the output is lost."""

    def summed(*args: Tree, **kwargs: Tree) -> Tensor:
        out = ravel(func(*args, **kwargs))
        return out @ weights(tuple(out.shape)) + _size(out)

    return alike(func, summed)


def pair(func: Func) -> Func:
    """A vector of two."""

    def mixed(*args: Tree, **kwargs: Tree) -> Tensor:
        out = ravel(func(*args, **kwargs))
        return torch.stack([out @ weights(tuple(out.shape)), _size(out)])

    return alike(func, mixed)


def tensors(func: Func) -> Func:
    """A tensor or a tuple of them, without other containers and without None."""

    def flat(*args: Tree, **kwargs: Tree) -> Tree:
        out = tuple(active_leaves(func(*args, **kwargs)))
        return out[0] if len(out) == 1 else out

    return alike(func, flat)


# aux.


def aux_of(output: Tree) -> Tree:
    return {"note": NOTE, "size": _size(ravel(output))}


def with_aux(func: Func) -> Func:
    def both(*args: Tree, **kwargs: Tree) -> tuple[Tree, Tree]:
        output = func(*args, **kwargs)
        return output, aux_of(output)

    return alike(func, both)


def without_notes(result: Tree) -> Tree:
    """The result with None for the strings of aux, which have to be what they were."""

    def silent(leaf: Any) -> Any:
        if not isinstance(leaf, str):
            return leaf
        assert leaf == NOTE
        return None

    return mapped(silent, result)
