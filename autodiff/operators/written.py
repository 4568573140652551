"""Whether the arguments of an operator are still what it was made at. Imports `_torch`, `checks` and `core`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from autodiff import checks
from autodiff._torch import compiling, fully_unwrapped
from autodiff.core import trees
from autodiff.core.rules import inplace_counts


class Arguments:
    """The tensors of a call, and how often each was written in place when this was made."""

    def __init__(self, *arguments: Any) -> None:
        self._tensors: list[Tensor] = []
        self._counts: list[int] = []
        if not compiling():
            leaves = trees.leaves(arguments)
            self._tensors = [fully_unwrapped(leaf) for leaf in leaves if isinstance(leaf, Tensor)]
            self._counts = inplace_counts(self._tensors)

    def refuse_written(self, name: str) -> None:
        """Refuse to go on where one was written since: a product would be at the old values, or at some of each.

        Raises:
            InPlaceError: one was.
        """
        if not compiling():
            checks.unwritten_arguments(name, self._counts, inplace_counts(self._tensors))
