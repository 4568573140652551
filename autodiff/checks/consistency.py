"""Whether samples that are computed one after the other give outputs that fit together.

Provides `OutputConsistency`: one structure, one shape of each tensor, and one value of anything else. Imports `trees`
and `batching`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from autodiff.checks import batching
from autodiff.core import trees

if TYPE_CHECKING:
    from autodiff.core.trees import Spec


class OutputConsistency:
    """The outputs of the first samples, with which those of all others must be consistent.

    ``tensors`` is the class of the leaves that have a shape and may differ in their values.

    >>> consistency = OutputConsistency("vmap")
    >>> for number in (1, 2):
    ...     _ = consistency.match([number], trees.LEAF, f"sample {number}")
    Traceback (most recent call last):
    autodiff.errors.BatchError: vmap: output is 2 for sample 2, but 1 for the samples before it. ...
    """

    __slots__ = ("_first", "_name", "_spec", "_tensors")

    def __init__(self, name: str, tensors: type[Any] = Tensor) -> None:
        self._name, self._tensors = name, tensors
        self._spec: Spec | None = None

    def match(self, leaves: list[Any], spec: Spec, where: str) -> tuple[list[Any], Spec]:
        """The leaves in the order of the first samples' structure, and that structure; ``where`` names the samples."""
        if self._spec is None:
            self._spec = spec
            # Only the shape of a tensor, which may be large, or belong to a level.
            self._first = [_Shape(leaf.shape) if self._varies(leaf) else leaf for leaf in leaves]
            return leaves, spec
        if spec is not self._spec and spec != self._spec:
            # Dicts agree whatever their order.
            ordered = trees.match(self._spec, trees.unflatten(spec, leaves))
            if ordered is None:
                batching.raise_structures_differ(self._name, where, spec, self._spec)
            leaves = ordered
        for position, (first, leaf) in enumerate(zip(self._first, leaves, strict=True)):
            came = _Shape(leaf.shape) if self._varies(leaf) else leaf
            if not is_same(came, first):
                path = trees.paths(self._spec, "output")[position]
                batching.raise_outputs_differ(self._name, path, where, came, first)
        return leaves, self._spec

    def _varies(self, leaf: Any) -> bool:
        return isinstance(leaf, self._tensors) or trees.hides_batches(leaf)


class _Shape(NamedTuple):
    """A tensor's shape, which is all that has to be consistent."""

    size: tuple[int, ...]

    def __repr__(self) -> str:
        return f"a tensor of shape {tuple(self.size)}"


def is_same(one: Any, other: Any) -> bool:
    """Whether two values are one object, or equal; NaN equals NaN.

    What cannot be compared is not the same.

    >>> is_same(float("nan"), float("nan")), is_same(object(), object()), is_same("text", "text")
    (True, False, True)
    """
    if one is other:
        return True
    try:
        # An array's == broadcasts.
        if getattr(one, "shape", None) != getattr(other, "shape", None):
            return False
        differs = (one != other) & ((one == one) | (other == other))  # noqa: PLR0124  NaN is not itself
        return not (differs.any() if hasattr(differs, "any") else differs)
    except Exception:  # noqa: BLE001  a class's own == may raise, or give no truth value, as a DataFrame's
        return False
