"""Trees of every kind of container, taken apart and put together without the library under test."""

from __future__ import annotations

import random
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from autodiff.pytree import register_dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Tree = Any
Shape = tuple[int, ...]

Point = namedtuple("Point", ["p", "q"])

DTYPE = torch.float64
NOTE = "a string in aux"
PASSIVE = [None, 2, "sin", "tanh", torch.tensor([1, 0])]
SHAPES: list[Shape] = [(), (1,), (2,), (2,), (3,), (4,), (1, 2), (2, 2), (0,), (2, 0)]


@register_dataclass
@dataclass
class Pair:
    first: Any
    second: Any


class Draw:
    """Everything random about one composition, from one name."""

    def __init__(self, name: str) -> None:
        self._random = random.Random(name)
        self.pick = self._random.choice
        self.integer = self._random.randint
        self._torch = torch.Generator().manual_seed(self._random.getrandbits(60))

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def weighted(self, weights: dict[Any, float]) -> Any:
        return self._random.choices(list(weights), list(weights.values()))[0]

    def some(self, population: Sequence[Any]) -> list[Any]:
        """At least one of them, in any order."""
        return self._random.sample(population, self.integer(1, len(population)))

    def normal(self, shape: Shape) -> Tensor:
        return 0.7 * torch.randn(shape, dtype=DTYPE, generator=self._torch)


# Apart and together.


def children(tree: Tree) -> list[Any] | None:
    """What stands directly inside, None for a leaf."""
    if isinstance(tree, dict):
        return list(tree.values())
    if isinstance(tree, list | tuple):
        return list(tree)
    return [tree.first, tree.second] if isinstance(tree, Pair) else None


def rebuilt(tree: Tree, inside: Sequence[Any]) -> Tree:
    """The same container around something else."""
    if isinstance(tree, dict):
        return type(tree)(zip(tree, inside, strict=True))
    return type(tree)(*inside) if isinstance(tree, Pair | Point) else type(tree)(inside)


def mapped(func: Callable[[Any], Any], tree: Tree) -> Tree:
    """The tree with ``func`` of every leaf."""
    inside = children(tree)
    return func(tree) if inside is None else rebuilt(tree, [mapped(func, child) for child in inside])


def leaves(tree: Tree) -> list[Any]:
    inside = children(tree)
    return [tree] if inside is None else [leaf for child in inside for leaf in leaves(child)]


def active(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def active_leaves(tree: Tree) -> list[Tensor]:
    return [leaf for leaf in leaves(tree) if active(leaf)]


def numel(tree: Tree) -> int:
    return sum(leaf.numel() for leaf in active_leaves(tree))


def filled(tree: Tree, values: Sequence[Any], *, keep: bool = False) -> Tree:
    """The tree with other values at its active leaves, and None at the others unless ``keep``."""
    rest = iter(values)
    return mapped(lambda leaf: next(rest) if active(leaf) else leaf if keep else None, tree)


def ravel(tree: Tree) -> Tensor:
    """All numbers of the active leaves."""
    return torch.cat([torch.zeros(0, dtype=DTYPE), *(leaf.reshape(-1) for leaf in active_leaves(tree))])


def unravel(vector: Tensor, tree: Tree) -> list[Tensor]:
    """Leaves for `filled`, of the shapes that the tree has, from the last dimension of a tensor."""
    like = active_leaves(tree)
    parts = vector.split([leaf.numel() for leaf in like], -1)
    pairs = zip(parts, like, strict=True)
    return [part.reshape((*vector.shape[:-1], *leaf.shape)) for part, leaf in pairs]


def weights(shape: Shape) -> Tensor:
    """Numbers without pattern, made without a random generator."""
    count = torch.Size(shape).numel()
    return torch.cos(1.7 * torch.arange(1, count + 1, dtype=DTYPE)).reshape(shape)


def weights_like(tree: Tree) -> Tree:
    return filled(tree, [weights(tuple(leaf.shape)) for leaf in active_leaves(tree)])


# Random ones.


def container(draw: Draw, inside: list[Any]) -> Tree:
    """A random container around them."""
    if len(inside) == 2 and draw.chance(0.5):
        return draw.pick([Point, Pair])(*inside)
    keys = ["z", "a", "m", "b"][: len(inside)]
    kind = draw.pick([dict, OrderedDict, list, tuple])
    return kind(zip(keys, inside, strict=True)) if issubclass(kind, dict) else kind(inside)


def argument(draw: Draw) -> Tree:
    """A tensor, or a tree of a few, with passive leaves and containers among them."""
    if draw.chance(0.4):
        return draw.normal(draw.pick(SHAPES[:8]))
    inside: list[Any] = [draw.normal(draw.pick(SHAPES[:6]))]
    for _ in range(draw.weighted({0: 3, 1: 4, 2: 1})):
        part: Any = draw.normal(draw.pick(SHAPES)) if draw.chance(0.5) else draw.pick(PASSIVE)
        inside.append(container(draw, [part]) if draw.chance(0.2) else part)
    return container(draw, inside)


# Compared.


def distance(actual: Tree, expected: Tree, path: str = "result") -> float:
    """The largest error relative to the largest number; an AssertionError if anything else differs."""
    inside, wanted = children(actual), children(expected)
    if wanted is None:
        return _distance_of_leaves(actual, expected, path)
    assert type(actual) is type(expected), f"{path}: {type(actual)} instead of {type(expected)}"
    assert inside is not None
    assert len(inside) == len(wanted), f"{path}: {inside} instead of {wanted}"
    if isinstance(expected, dict):
        assert list(actual) == list(expected), f"{path}: keys {list(actual)} instead of {list(expected)}"
    pairs = enumerate(zip(inside, wanted, strict=True))
    return max((distance(one, other, f"{path}[{i}]") for i, (one, other) in pairs), default=0.0)


def _distance_of_leaves(actual: Any, expected: Any, path: str) -> float:
    if not isinstance(expected, Tensor):
        assert actual == expected, f"{path}: {actual!r} instead of {expected!r}"
        return 0.0
    assert isinstance(actual, Tensor), f"{path}: {actual!r} instead of a tensor"
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), (
        f"{path}: {actual.dtype}{tuple(actual.shape)} instead of {expected.dtype}{tuple(expected.shape)}"
    )
    if not expected.numel():
        return 0.0
    actual, expected = actual.detach(), expected.detach()
    error = ((actual - expected).abs().max() / (1 + expected.abs().max())).item()
    assert error == error, f"{path}: {actual} instead of {expected}"  # noqa: PLR0124  not a number
    return error
