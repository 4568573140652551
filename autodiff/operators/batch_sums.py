"""Sums over the batches of a data set, and their derivatives, with the graph of one batch at a time.

Works on flat lists of tensors; never sees a tree. Imports `batches` and the `checkpoint` transform.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from autodiff._torch import forward_level_active, functorch_active
from autodiff.core.call import Lift, refilled, spread
from autodiff.core.closures import CapturedTensors, ReplacedTensors
from autodiff.core.forward import push
from autodiff.core.reverse import rerecord
from autodiff.core.rules import Rules, attach, is_tracked
from autodiff.transforms.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from autodiff.operators.batches import Batch, DataSet

# The share of a batch in a sum, from the tensors that it depends on. None stands for zero, in every batch.
Term: TypeAlias = "Callable[[Batch, Sequence[Tensor]], Sequence[Tensor | None]]"


class BatchSum(Rules):
    """The sum of a term over the batches, a batch in a mean counting by its samples.

    The derivative of a sum is the sum of the derivatives of its terms: so at every order the data set is gone through
    again, and no graph outlives its batch.
    """

    def __init__(self, data: DataSet, term: Term, what: str) -> None:
        self.data, self.term, self._what = data, term, what

    def at(
        self,
        tensors: Sequence[Tensor],
        constant: Term | None = None,
        through: Callable[[], Generator[Batch]] | None = None,
    ) -> list[Tensor | None]:
        """The sum. ``constant`` computes a term at constants, where that is cheaper; ``through`` gives the batches."""
        total = None
        if not (self.data.captures and _anything_is_tracked()):
            total = self._at_constants(tensors, constant or self.term, through or self._through)
        return self._with_captured(tensors) if total is None else total

    def _at_constants(
        self, tensors: Sequence[Tensor], term: Term, through: Callable[[], Generator[Batch]]
    ) -> list[Tensor | None] | None:
        """The sum, computed at constants and tied to the tensors; None where other tensors are differentiated too."""
        tracked = any(map(is_tracked, tensors))
        total = _Total(mean=self.data.mean)
        constants = [tensor.detach() for tensor in tensors] if tracked else tensors
        with closing(through()) as batches:
            for batch in batches:
                with self.data.naming(batch.number):
                    values = term(batch, constants)
                if any(is_tracked(value) for value in values if value is not None):
                    return None
                total.add(batch, values)
                del batch, values
        return attach(self, total.reduced(), tensors) if tracked else total.reduced()

    def _with_captured(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """The sum where the function captures tensors that are differentiated: they are found, and count as given."""
        self.data.captures = True
        if forward_level_active() and not functorch_active():
            return self._checkpointed(tensors)  # which keeps nothing there
        count, found = len(tensors), CapturedTensors(constants := [tensor.detach() for tensor in tensors])
        with closing(self._through()) as batches:
            batch = next(batches)
            with self.data.naming(batch.number), found:
                self.term(batch, constants)

        def replaced(batch: Batch, given: Sequence[Tensor]) -> Sequence[Tensor | None]:
            with ReplacedTensors(found.tensors, given[count:]):
                return self.term(batch, given[:count])

        explicit = BatchSum(self.data, replaced, self._what)
        total = explicit._at_constants([*tensors, *found.shown], replaced, self._through)
        # Not all of them may be found, as those that an autograd Function captures; or each batch has its own.
        return self._checkpointed(tensors) if total is None else total

    def _checkpointed(self, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """The sum of checkpointed terms, whose batches live as long as it does."""
        total = _Total(mean=self.data.mean)
        with closing(self._through()) as batches:
            for batch in batches:
                with self.data.naming(batch.number):
                    total.add(batch, checkpoint(self.term)(batch, tensors))
        return total.reduced()

    def _through(self) -> Generator[Batch]:
        return self.data.through(self._what)

    def pull(
        self, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        count, given = len(saved), _given(cotangents)

        def pulled(batch: Batch, tensors: Sequence[Tensor]) -> list[Tensor | None]:
            tape, where = rerecord(lambda leaves: _present(self.term(batch, leaves)), tensors[:count], wanted)
            found = spread(tape.pull(spread(tensors[count:], given, len(cotangents))), where, count)
            pairs = zip(found, tensors, range(count), strict=False)
            return [torch.zeros_like(like) if one is None and i in where else one for one, like, i in pairs]

        vectors = _present(cotangents)
        return BatchSum(self.data, pulled, self._what).at([*saved, *vectors])

    def push(self, saved: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        count, given = len(saved), _given(tangents)

        def pushed(batch: Batch, tensors: Sequence[Tensor]) -> list[Tensor | None]:
            def func(primals: Sequence[Tensor], lift: Lift | None) -> tuple[list[Any], list[Any]]:
                return _present(self.term(batch, refilled(tensors[:count], given, primals, lift))), []

            result = push(func, [tensors[i] for i in given], tensors[count:])
            pairs = zip(result.tangents, result.outputs, strict=True)
            return [torch.zeros_like(like) if one is None else one for one, like in pairs]

        return BatchSum(self.data, pushed, self._what).at([*saved, *_present(tangents)])


def _anything_is_tracked() -> bool:
    """Whether anything may be tracked here."""
    return torch.is_grad_enabled() or functorch_active() or forward_level_active()


def _given(vectors: Sequence[Tensor | None]) -> list[int]:
    return [i for i, vector in enumerate(vectors) if vector is not None]


def _present(vectors: Sequence[Tensor | None]) -> list[Tensor]:
    return [vector for vector in vectors if vector is not None]


class _Total:
    """Terms added up. In a mean they count as the first batch does, until all samples are counted."""

    def __init__(self, *, mean: bool) -> None:
        self._mean = mean
        self._first, self._samples = 1, 0
        self._total: list[Tensor | None] = []

    def add(self, batch: Batch, values: Sequence[Tensor | None]) -> None:
        weight = 1.0
        if self._mean:
            assert batch.samples is not None
            if self._samples == 0:
                self._first = batch.samples
            self._samples += batch.samples
            weight = batch.samples / self._first
        if batch.number == 0:
            # A value may be a view, or a vector that was multiplied.
            self._total = [None if value is None else value.clone() for value in values]
            return
        pairs = zip(self._total, values, strict=True)
        self._total = [_added(total, value, weight) for total, value in pairs]

    def reduced(self) -> list[Tensor | None]:
        if not self._mean or self._first == self._samples:
            return self._total
        factor = self._first / self._samples
        return [None if total is None else total * factor for total in self._total]


def _added(total: Tensor | None, value: Tensor | None, weight: float) -> Tensor | None:
    if total is None or value is None:
        assert total is value, "a term is zero in every batch or in none"
        return None
    if functorch_active() or is_tracked(value) or is_tracked(total):
        return torch.add(total, value, alpha=weight)
    return total.add_(value, alpha=weight)
