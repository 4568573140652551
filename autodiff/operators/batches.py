"""A data set that is gone through for every product: tensors in pieces, a DataLoader, or any other re-iterable.

Provides `DataSet`. Imports `core` and `checks`.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from autodiff import checks
from autodiff.core import randomness, trees
from autodiff.core.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from contextlib import AbstractContextManager

_END = object()


class Batch(NamedTuple):
    """A batch: its place in the data set, the arguments that it holds, and of how many samples, None where unknown."""

    number: int
    args: tuple[Any, ...]
    samples: int | None


class DataSet:
    """Batches that are the same each time that they are gone through.

    ``size`` is that of the batches which tensors are cut into, None where ``source`` is an iterable of batches.
    ``length`` are the numbers of batches and samples, as soon as they were counted. Random numbers are drawn from the
    same state on in every pass, and afterwards the generators are where they were.
    """

    def __init__(self, name: str, source: Any, size: int | None, *, mean: bool, progress: bool) -> None:
        self.name, self.source, self.size, self.mean, self._progress = name, source, size, mean, progress
        self.length: tuple[int, int | None] | None = None
        self.state = randomness.random_state(_generators(source))
        # Whether random numbers are drawn on the way; and whether the function captures tensors that are
        # differentiated. The one is supposed, the other is not, until a pass has shown it.
        self.draws, self.captures = True, False

    def batches(self) -> Generator[Batch]:
        """Go through the data set once."""
        number, samples = 0, 0
        arguments = self._arguments()
        while True:
            with self.naming(number):
                args = next(arguments, None)
                if args is None:
                    break
                leaves = trees.leaves(args)
                count = checks.samples_of_batch(self.name, number, leaves, needed=self.mean)
            yield Batch(number, args, count)
            # Not kept while the next one is loaded.
            del args, leaves
            number, samples = number + 1, samples + (count or 0)
        if number == 0:
            checks.raise_no_batches(self.name)
        length = number, samples or None
        if self.length is None:
            self.length = length
        checks.same_length(self.name, self.length, length)

    def through(self, what: str) -> Generator[Batch]:
        """The same, with a bar, and with the same random numbers each time."""
        total = None if self.length is None else self.length[1]
        bar = Progress(what, total, 0, unit="sample", shown=self._progress, stay=False)
        with self.repeated_random_numbers(), bar:
            for batch in self.batches():
                yield batch
                bar.advance(batch.samples or 1, f"batch {batch.number + 1}")

    def repeated_random_numbers(self) -> AbstractContextManager[None]:
        """Draw what was drawn each time before."""
        return randomness.random_numbers_from(self.state) if self.draws else nullcontext()

    @contextmanager
    def naming(self, number: int) -> Iterator[None]:
        """Errors inside say in which batch they came."""
        try:
            yield
        except Exception as error:
            error.add_note(f"{self.name}: in batch {number}, counted from 0.")
            raise

    def _arguments(self) -> Iterator[tuple[Any, ...]]:
        if self.size is None:
            return map(_as_arguments, self.source)
        return (self.piece(start, start + self.size) for start in range(0, self.total(), self.size))

    def total(self) -> int:
        """The number of samples in tensors."""
        return checks.tensors_to_cut(self.name, trees.leaves(self.source))

    def piece(self, start: int, stop: int) -> tuple[Any, ...]:
        """The arguments that some samples of tensors make."""
        return _as_arguments(narrowed(self.source, slice(start, stop)))

    def tensors(self) -> list[Tensor]:
        """The tensors that are cut into batches, if they are."""
        return (
            []
            if self.size is None
            else [leaf for leaf in trees.leaves(self.source) if isinstance(leaf, Tensor)]
        )


def narrowed(tree: Any, samples: slice) -> Any:
    """Some samples of a tree of tensors."""
    leaves, spec = trees.flatten(tree)
    return trees.unflatten(spec, [leaf[samples] if isinstance(leaf, Tensor) else leaf for leaf in leaves])


def _as_arguments(batch: Any) -> tuple[Any, ...]:
    return tuple(batch) if isinstance(batch, tuple | list) else (batch,)


def _generators(source: Any) -> list[torch.Generator]:
    """The generators that a DataLoader draws from beside the default ones."""
    holders = [source, *(getattr(source, name, None) for name in ("sampler", "batch_sampler"))]
    holders.append(getattr(holders[-1], "sampler", None))
    found = [getattr(one, "generator", None) for one in holders]
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())
