"""The loop over chunks: compute, measure, halve where memory runs out, find the samples that fail.

Provides `Engine`, whose pieces come in order and depend on nothing but the evaluator, the samples and the plan.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch

from autodiff._torch import StopRecomputation, says
from autodiff.core import memory
from autodiff.errors import AutodiffError, BudgetError, SampleError
from autodiff.samples.results import JacobianRows, Result, is_finite, template_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from autodiff.samples.evaluator import Evaluator
    from autodiff.samples.plan import Plan
    from autodiff.samples.report import Report
    from autodiff.transforms.vmap import Mapped
    from autodiff.types import OnError

R = TypeVar("R")


@dataclass
class SamplesPiece:
    """Results of whole samples, ``start`` to ``stop``; no result where the only one of them failed."""

    start: int
    stop: int
    result: Result | None


@dataclass
class RowsPiece:
    """Rows ``start`` to ``stop`` of one sample."""

    sample: int
    start: int
    stop: int
    rows: JacobianRows


Piece: TypeAlias = SamplesPiece | RowsPiece


class Engine:
    """Evaluates a function on batches of samples, chunk by chunk."""

    def __init__(
        self, evaluator: Evaluator, plan: Plan, on_error: OnError, report: Report, *, kept_results: int = 0
    ) -> None:
        self.plan = plan
        self._evaluator, self._on_error, self._report = evaluator, on_error, report
        # How many copies of a chunk's results the caller keeps while the next chunk is computed.
        self._kept_results = kept_results
        self._rows = 0  # of one sample's Jacobian, once that is known
        # The sample and the row that come next, counted over all batches.
        self.position = (0, 0)

    @property
    def state(self) -> dict[str, Any]:
        """The position, and what was learnt, in values that JSON has."""
        sample, row = self.position
        return {"sample": sample, "row": row, "rows": self._rows, "plan": self.plan.state}

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self.position = state["sample"], state["row"]
        self._rows, self.plan.state = state["rows"], state["plan"]

    def chunks(self, batch: Mapped, first: int) -> Iterator[list[Piece]]:
        """The pieces of a batch, whose first sample is number ``first``, from the position on.

        What is in one list was computed together.
        """
        plan = self.plan
        if self.position == (0, 0):
            plan.begin(self._evaluator.row_bytes(batch) if self._evaluator.splits else None)
        sample, row = self.position[0] - first, self.position[1]
        while sample < batch.size:
            if plan.rows is not None and self._evaluator.splits:
                # The number of rows is known from the first ones.
                count = plan.rows.take(self._rows - row) if self._rows else int(plan.rows.size)
                piece = self._attempt(partial(self._some_rows, batch, first, sample, row, count), count)
                if piece is None:
                    continue
                if isinstance(piece, RowsPiece):
                    self._rows, row = piece.rows.total, piece.stop
                if isinstance(piece, SamplesPiece) or row >= self._rows:
                    sample, row = sample + 1, 0
                    plan.sample_done(self._rows)
                pieces = [piece]
            else:
                count = plan.samples.take(batch.size - sample)
                several = self._attempt(partial(self._samples, batch, first, sample, sample + count), count)
                if several is None:
                    continue
                pieces = several
                sample += count
            self.position = first + sample, row
            yield pieces

    def _attempt(self, compute: Callable[[], R], count: int) -> R | None:
        """What ``compute`` gives; None where memory ran out and a smaller chunk is to be tried."""
        random = self._evaluator.random_state
        try:
            return compute()
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
            if not self.plan.shrink(count, self._rows if self._evaluator.splits else 1):
                raise BudgetError(
                    f"per_sample: memory ran out in a chunk of {count}, which cannot be made smaller ({error}). "
                    f"Give a smaller chunk_size, or ask for less of each sample."
                ) from error
        self._evaluator.random_state = random
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return None

    def _samples(self, batch: Mapped, first: int, start: int, stop: int) -> list[Piece]:
        sizes = self.plan.samples
        measured = sizes.measures(stop - start)
        with memory.Meter(sizes.device) if measured else nullcontext() as meter:
            pieces = self._bisected(batch, first, start, stop)
        template = next((template_of(piece.result) for piece in pieces if piece.result is not None), None)
        if meter is not None and template is not None:
            if self._evaluator.splits:
                self._rows = self._evaluator.rows_in(batch, template)
            kept = self._kept_results * (stop - start) * template.nbytes
            rows = self._rows if self._evaluator.splits else 1
            self.plan.learn_samples(stop - start, meter, kept, rows, template.nbytes)
            self._report.peak = max(self._report.peak, meter.peak)
        self._report.add_chunk(stop - start)
        return [*pieces]

    def _bisected(self, batch: Mapped, first: int, start: int, stop: int) -> list[SamplesPiece]:
        """The results; where the function fails, those of each half, down to the sample that fails."""
        try:
            result = self._evaluator.samples(batch, start, stop)
        except (AutodiffError, StopRecomputation):
            raise  # a wrong call, whatever the sample; a checkpoint around has seen what it needs
        except Exception as error:
            if memory.is_out_of_memory(error):
                raise
            if stop - start == 1:
                self._failed(first + start, f"{type(error).__name__}: {error}", error)
                return [SamplesPiece(first + start, first + stop, None)]
        else:
            return [SamplesPiece(first + start, first + stop, self._finite(result, first + start))]
        middle = (start + stop) // 2
        return [*self._bisected(batch, first, start, middle), *self._bisected(batch, first, middle, stop)]

    def _finite(self, result: Result, first: int) -> Result:
        bad = sorted({sample for leaf in result.tensors() for sample in leaf.infinite()})
        for sample in bad:
            self._failed(first + sample, "the result holds infinities or NaN")
        if not bad:
            return result
        tensors = iter([leaf.with_nan(bad, first) for leaf in result.tensors()])
        kept = set(map(id, result.tensors()))
        return Result(result.spec, [next(tensors) if id(leaf) in kept else leaf for leaf in result.leaves])

    def _some_rows(self, batch: Mapped, first: int, sample: int, start: int, count: int) -> Piece:
        rows = self.plan.rows
        assert rows is not None
        measured = rows.measures(count)
        try:
            with memory.Meter(rows.device) if measured else nullcontext() as meter:
                some = self._evaluator.rows(batch, sample, start, start + count)
        except (AutodiffError, StopRecomputation):
            raise
        except Exception as error:
            if memory.is_out_of_memory(error):
                raise
            self._failed(first + sample, f"{type(error).__name__}: {error}", error)
            return SamplesPiece(first + sample, first + sample + 1, None)
        stop = min(start + count, some.total)
        if meter is not None:
            self.plan.learn_rows(stop - start, meter)
            self._report.peak = max(self._report.peak, meter.peak)
        self._report.add_chunk(1, rows=stop - start)
        if not all(is_finite(piece) for _, _, piece in some.pieces):
            self._failed(first + sample, "the result holds infinities or NaN")
            return SamplesPiece(first + sample, first + sample + 1, None)
        return RowsPiece(first + sample, start, stop, some)

    def _failed(self, sample: int, why: str, error: Exception | None = None) -> None:
        if self._on_error == "raise":
            raise SampleError(
                f"per_sample: sample {sample}: {why.removesuffix('.')}. {_way_out(error)}", sample
            ) from error
        self._report.failed[sample] = why


def _way_out(error: Exception | None) -> str:
    if error is not None and says(error, "random numbers are forbidden"):
        return (
            "Expected a function that draws no random numbers. Call module.eval() to switch dropout off, or pass "
            "randomness='different' or 'same'."
        )
    expected = "finite results for every sample" if error is None else "a function that runs on every sample"
    return f"Expected {expected}. Inspect that sample, or pass on_error='nan' to fill in NaN and go on."
