"""Row 8: trees of many leaves, whose overhead alone is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks import by_hand
from benchmarks.rows.row import BY_HAND, JAX, OfJax, Row, Side, transformed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from benchmarks.rows.row import Place, Sides


def tree_of(leaves: list[Tensor]) -> dict[str, Any]:
    """A dict of dicts of ten leaves each."""
    return {
        f"block {first}": {f"leaf {at}": leaf for at, leaf in enumerate(leaves[first : first + 10])}
        for first in range(0, len(leaves), 10)
    }


def _sum(leaves: Iterable[Tensor]) -> Tensor:
    return sum((leaf.sin() * leaf).sum() for leaf in leaves)  # type: ignore[return-value]


def of_tree(tree: dict[str, Any]) -> Tensor:
    return _sum(leaf for block in tree.values() for leaf in block.values())


def of_count(place: Place, count: int) -> Sides:
    leaves = [place.numbers(4, seed=at) for at in range(count)]
    return {
        **transformed(place, lambda library: library.grad(of_tree), tree_of(leaves)),
        BY_HAND: Side(by_hand.gradients, (_sum, leaves)),
        JAX: OfJax("grad", "sum_of_leaves", (leaves,)),
    }


ROWS = [
    Row(
        f"gradient in a tree of {count} leaves" if count > 1 else "gradient in a tree of 1 leaf",
        8,
        lambda place, count=count: of_count(place, count),
        short=count != 100,
        # torch.compile unrolls the leaves.
        compiles=() if count == 1000 else ("autodiff", "torch.func"),
    )
    for count in (1, 100, 1000)
]
