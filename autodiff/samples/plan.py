"""How much is computed at once: samples, or rows of one sample where one alone is too large.

Provides `Plan`, whose decisions depend on sizes alone, so that a resumed run continues as it would have.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from autodiff.core import memory
from autodiff.core.chunks import Sizes
from autodiff.errors import BudgetWarning

if TYPE_CHECKING:
    import torch

    from autodiff.core.memory import Meter
    from autodiff.types import ChunkSize


class Plan:
    """The sizes of the chunks to come, on two axes.

    ``samples`` says how many samples are next. Where ``rows`` is not None, samples are computed one by
    one, and it says how many of a sample's rows are next. While these are computed, ``whole_results`` results of whole
    samples are in memory: the one that the rows belong to, and one that the caller may keep.
    """

    def __init__(
        self,
        chunk_size: ChunkSize,
        row_chunk_size: ChunkSize,
        budget: int,
        device: torch.device,
        *,
        whole_results: int = 0,
    ) -> None:
        self.budget, self._device, self._whole_results = budget, device, whole_results
        self.samples = Sizes(chunk_size, budget, device=device)
        self.rows: Sizes | None = None
        self._may_split = row_chunk_size is not None
        if isinstance(row_chunk_size, int):
            self.rows = Sizes(row_chunk_size)
        self._warned = self._restored = self._too_large = False

    def begin(self, row: tuple[int, int] | None) -> None:
        """Before the first chunk: begin with rows where a whole sample may be too much.

        ``row`` is what one row takes, and how many there are.
        """
        if self._restored or row is None:
            return
        if self.samples.adapts and self._may_split and self.rows is None:
            size, count = row
            if size * count > self.samples.aim / 4:
                self._split(int(self.samples.aim / (16 * size)), size * count)

    def reserve(self, size: int) -> None:
        """Less is left for chunks: the results stay in memory."""
        for sizes in filter(None, (self.samples, self.rows)):
            sizes.reserve(size)

    def learn_samples(self, count: int, meter: Meter, kept: int, rows: int, whole: int) -> None:
        """A chunk of whole samples was measured; ``kept`` is the size of the results that the caller keeps meanwhile.

        One sample's result has ``rows`` rows and takes ``whole`` bytes.
        """
        peak = meter.peak + kept
        self._warn(peak, smallest=count == 1 and not (rows > 1 and self._may_split))
        if count == 1 and rows > 1 and self._may_split and peak > self.samples.aim:
            self._too_large = True
            self._split(int(rows * self.samples.aim / peak), whole)
            return
        self.samples.learn(count, peak, meter.produced, meter.operations)

    def learn_rows(self, count: int, meter: Meter) -> None:
        """A chunk of rows was measured."""
        assert self.rows is not None
        self._warn(meter.peak, smallest=count == 1)
        self.rows.learn(count, meter.peak, meter.produced, meter.operations)

    def sample_done(self, rows: int) -> None:
        """All rows of a sample are there: go on with whole samples if they fit."""
        if self.rows is not None and self.rows.adapts and self.rows.size >= rows and not self._too_large:
            self.rows = None

    def shrink(self, count: int, rows: int) -> bool:
        """Memory ran out: whether there is a smaller chunk to try. ``rows`` is 0 where it is not known yet."""
        if self.rows is not None:
            return self.rows.shrink(count)
        if self.samples.shrink(count):
            return True
        if not self.samples.adapts or rows == 1 or not self._may_split:
            return False
        self._split(rows // 2, 0)
        return True

    def _split(self, first: int, whole: int) -> None:
        # What whole results leave of the budget, but at least a quarter, with which rows cost little more.
        budget = max(self.samples.budget - self._whole_results * whole, self.samples.budget // 4)
        self.rows = Sizes("auto", budget, device=self._device, first=max(1, first))

    def _warn(self, peak: int, *, smallest: bool) -> None:
        if smallest and peak > self.budget and not self._warned:
            self._warned = True
            warnings.warn(
                f"per_sample: the smallest piece of work takes {memory.format_bytes(peak)}, more than the "
                f"{memory.format_bytes(self.budget)} that memory allows. The run continues piece by piece.",
                BudgetWarning,
                stacklevel=2,
            )

    def continue_from(self, state: list[Any]) -> None:
        """Begin with the sizes that another run learnt, within this run's own budget."""
        self.state = state
        self.samples.budget = self.budget
        if self.rows is not None:
            # Already reduced by the whole results, and not learnt again: it only shrinks.
            self.rows.budget, self.rows.learning = self.budget, False

    @property
    def state(self) -> list[Any]:
        """All that was learnt, in values that JSON has."""
        rows = None if self.rows is None else [self.rows.adapts, *self.rows.state]
        return [self.samples.state, rows, self._too_large]

    @state.setter
    def state(self, state: list[Any]) -> None:
        self.samples.state, rows, self._too_large = state
        self._restored = True
        self.rows = None
        if rows is not None:
            self.rows = Sizes("auto" if rows[0] else int(rows[1]), self.budget, device=self._device)
            self.rows.state = rows[1:]
