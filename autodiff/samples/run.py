"""One run over all samples: from the source, through the engine, to a destination.

Provides `Run`, whose results are collected or streamed.
"""

from __future__ import annotations

import dataclasses
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from autodiff import _torch
from autodiff.checks.consistency import OutputConsistency
from autodiff.core import memory, trees
from autodiff.core.progress import Progress
from autodiff.core.specs import TensorSpec
from autodiff.errors import AutodiffError, BatchError, SampleError
from autodiff.samples.engine import Engine, RowsPiece, SamplesPiece
from autodiff.samples.evaluator import Evaluator, name_of
from autodiff.samples.files import FileSink
from autodiff.samples.fingerprint import fingerprint
from autodiff.samples.given import GivenSink
from autodiff.samples.plan import Plan
from autodiff.samples.report import Report
from autodiff.samples.results import Leaf, Plain, Result, empty, nan, template_of, with_tensors
from autodiff.samples.sinks import MemorySink
from autodiff.samples.sources import calls_of
from autodiff.transforms.vmap import vmap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from autodiff.samples.engine import Piece
    from autodiff.samples.results import Template
    from autodiff.samples.sinks import Sink
    from autodiff.transforms.vmap import Mapped
    from autodiff.types import ChunkSize, OnError, Randomness

    Reduce = Callable[[Any], Any]


@dataclass(frozen=True)
class Options:
    """The keywords of :func:`autodiff.per_sample`, checked; memory in bytes."""

    chunk_size: ChunkSize
    row_chunk_size: ChunkSize
    memory: int | None
    as_matrix: bool
    on_error: OnError
    randomness: Randomness
    progress: bool


@dataclass(frozen=True)
class Chunk:
    """Some samples' results: ``samples`` says which, ``result`` is a tree with these samples in front.

    >>> from autodiff import per_sample
    >>> for chunk in per_sample(torch.square, chunk_size=2).stream(torch.arange(3.0)):
    ...     print(chunk)
    Chunk(samples=slice(0, 2, None), result=tensor([0., 1.]))
    Chunk(samples=slice(2, 3, None), result=tensor([4.]))
    """

    samples: slice
    result: Any


class Run:
    """One run over all samples.

    While a chunk is computed, ``kept_results`` copies of its results are in memory as well, and where rows of one
    sample are computed, ``whole_results`` results of whole samples.
    """

    def __init__(
        self,
        func: Callable[..., Any],
        in_dims: Any,
        options: Options,
        learnt: dict[Any, list[Any]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        kept_results: int,
        whole_results: int,
    ) -> None:
        if not _torch.is_eager():
            raise AutodiffError(
                "per_sample: it was called inside another transform. Expected a call outside of all transforms, since "
                "it measures the memory of chunks. Use vmap(func, chunk_size='auto') inside transforms."
            )
        self._func, self._in_dims, self._options, self._learnt = func, in_dims, options, learnt
        self._evaluator = Evaluator(func, in_dims, options.randomness, as_matrix=options.as_matrix)
        self._source = calls_of(in_dims, args, kwargs)
        batch = self._next_batch()
        if batch is None:
            raise BatchError(
                "per_sample: the iterable of batches is empty. Give at least one batch of samples."
            )
        self._first = batch
        self._total = batch.size if self._source.one else None
        self._in_memory = kept_results, whole_results
        # A sample that did not fail in the run that is resumed, and its batch.
        self._model: tuple[Mapped, int] | None = None
        self._early: list[int] = []  # samples that failed before there was a template
        self._assembling: MemorySink | None = None
        self._consistency = OutputConsistency("per_sample", Leaf)
        self._dtypes: list[torch.dtype] | None = None
        device = memory.device_of(batch.leaves)
        self._budget = options.memory or int(memory.SHARE * memory.free_bytes(device))
        self.report = Report(f"per_sample({name_of(func)})", self._budget)
        plan = Plan(
            options.chunk_size, options.row_chunk_size, self._budget, device, whole_results=whole_results
        )
        self._engine = Engine(self._evaluator, plan, options.on_error, self.report, kept_results=kept_results)

    # Results.

    def collect(self, out: Any, reduce: Reduce | None) -> Any:
        """All results, reduced sample by sample where ``reduce`` is given, at their destination."""
        if isinstance(out, str | bytes | os.PathLike):
            return self._to_files(FileSink(out, self._header(reduce), self._total), reduce)
        sink: Sink
        if out is None:
            sink = MemorySink(self._source.expected or self._total or 0, self._engine.plan)
        else:
            sink = GivenSink(out, self._total, self._first.leaves)
        with self._sizes_kept():
            for pieces in self._pieces():
                self._put(sink, self._reduced(pieces, reduce))
        self._open(sink, reduce)
        return sink.tree()

    def stream(self) -> Iterator[Chunk]:
        """Whole samples, chunk by chunk."""
        early: list[int] = []  # samples that failed before there was a template
        template: Template | None = None
        with self._sizes_kept():
            for pieces in self._pieces():
                for piece in self._whole(pieces):
                    if piece.result is not None:
                        template = template_of(piece.result)
                    elif template is None:
                        early.append(piece.start)
                        continue
                    for sample in early:
                        yield Chunk(slice(sample, sample + 1), _nan_tree(template, sample))
                    early.clear()
                    tree = _nan_tree(template, piece.start) if piece.result is None else piece.result.tree()
                    piece.result = None
                    yield Chunk(slice(piece.start, piece.stop), tree)
                    del tree
        if early:
            self._all_failed()

    def _to_files(self, sink: FileSink, reduce: Reduce | None) -> Any:
        engine, report = self._engine, self.report
        try:
            if sink.resumed is not None:
                engine.state = sink.resumed
                report.failed.update(sink.failed)
                report.resumed_at = engine.position[0]
                self._evaluator.random_state = _tensors_of(sink.resumed["random"])
            for pieces in self._pieces(sink):
                self._put(sink, self._reduced(pieces, reduce))
                # A sample that is reduced is done when all its rows are there, one that failed when it is filled.
                if sink.template is not None and (reduce is None or engine.position[1] == 0):
                    sink.commit(self._state(), report.failed)
            self._open(sink, reduce)
            if not sink.complete:
                sink.commit(self._state(), report.failed, complete=True)
            return sink.tree()
        finally:
            sink.close()

    # From the source to pieces.

    def _next_batch(self) -> Mapped | None:
        call = next(self._source.calls, None)
        return None if call is None else self._evaluator.batch(*call)

    def _pieces(self, sink: FileSink | None = None) -> Iterator[list[Piece]]:
        """What the engine computes, from its position on; ``sink`` is shown every batch of the source."""
        engine, first, index = self._engine, 0, 0
        batch: Mapped | None = self._first
        expected = self._total if self._source.one else self._source.expected
        with Progress(
            self.report.what, expected, engine.position[0], unit="sample", shown=self._options.progress
        ) as progress:
            while batch is not None:
                if sink is not None:
                    sink.begin_batch(index, fingerprint(batch.arguments(mapped=True)))
                done = engine.position[0]
                if self._model is None:
                    known = range(min(batch.size, done - first))
                    finite = next((at for at in known if first + at not in self.report.failed), None)
                    self._model = None if finite is None else (batch, finite)
                if done < first + batch.size:
                    for pieces in engine.chunks(batch, first):
                        self.report.advance(engine.position[0] - done)
                        progress.advance(engine.position[0] - done, self._note())
                        done = engine.position[0]
                        yield pieces
                first, index = first + batch.size, index + 1
                batch = self._next_batch()
        if sink is not None:
            sink.end_batches(index)

    def _note(self) -> str:
        return f"chunk {self.report.largest}, peak {memory.format_bytes(self.report.peak)}"

    def _whole(self, pieces: Iterable[Piece]) -> Iterator[SamplesPiece]:
        """Pieces of whole samples: rows are put together."""
        for piece in pieces:
            if isinstance(piece, SamplesPiece):
                self._assembling = None
                yield piece
                continue
            if self._assembling is None:
                self._assembling = MemorySink(1)
                self._assembling.open(piece.rows.template)
            self._assembling.put_rows(0, piece.rows)
            if piece.stop == piece.rows.total:
                result = _result_of(self._assembling.tree())
                self._assembling = None
                yield SamplesPiece(piece.sample, piece.sample + 1, result)

    def _reduced(self, pieces: list[Piece], reduce: Reduce | None) -> Iterable[Piece]:
        if reduce is None:
            yield from pieces
            return
        # Functions such as torch.lobpcg start from random vectors.
        batched = vmap(reduce, randomness="different", fallback="loop")
        for piece in self._whole(pieces):
            if piece.result is not None:
                reduced = _torch.under_guard(_without_grad, batched, piece.result.tree())
                piece = SamplesPiece(piece.start, piece.stop, _result_of(reduced))  # noqa: PLW2901
            yield piece

    # From pieces to a sink.

    def _put(self, sink: Sink, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            if isinstance(piece, RowsPiece):
                self._check_dtypes(piece.rows.template, f"sample {piece.sample}")
                if sink.template is None:
                    self._open_with(sink, piece.rows.template)
                sink.put_rows(piece.sample, piece.rows)
            elif piece.result is not None:
                piece.result = self._consistent(piece.result, piece)
                if sink.template is None:
                    self._open_with(sink, template_of(piece.result))
                sink.put(piece.start, piece.stop, piece.result)
            elif sink.template is None:
                self._early.append(piece.start)
            else:
                sink.put_nan(piece.start)

    def _consistent(self, result: Result, piece: SamplesPiece) -> Result:
        """The result of some samples, if it is consistent with those before."""
        count = piece.stop - piece.start
        where = f"samples {piece.start} to {piece.stop - 1}" if count > 1 else f"sample {piece.start}"
        leaves, spec = self._consistency.match(result.leaves, result.spec, where)
        consistent = Result(spec, leaves)
        self._check_dtypes(consistent, where)
        return consistent

    def _check_dtypes(self, result: Result | Template, where: str) -> None:
        dtypes = [
            leaf.spec.dtype if isinstance(leaf, Leaf) else leaf.dtype
            for leaf in result.leaves
            if isinstance(leaf, Leaf | TensorSpec)
        ]
        if self._dtypes is None:
            self._dtypes = dtypes
        if dtypes == self._dtypes:
            return
        places = (template_of(result) if isinstance(result, Result) else result).places()
        pairs = zip(places, dtypes, self._dtypes, strict=True)
        place, came, before = next(triple for triple in pairs if triple[1] != triple[2])
        raise BatchError(
            f"per_sample: {place} is {came} for {where}, but {before} for the samples before. Expected one dtype for "
            f"all samples. Give all batches one dtype, or convert the result, as in result.float()."
        )

    def _open(self, sink: Sink, reduce: Reduce | None) -> None:
        """Open a sink for which no sample was, or had to be, computed."""
        if sink.template is not None:
            return
        if self._model is None and self.report.failed:
            self._all_failed()
        # Where there is no sample, one of zeros gives the template.
        batch, finite = self._model or (self._first.with_zero_sample(), 0)
        if self._evaluator.splits and reduce is None:
            # One row is enough for it; a whole sample may be too large.
            self._open_with(sink, self._evaluator.rows(batch, finite, 0, 1).template)
            return
        pieces: list[Piece] = [SamplesPiece(0, 0, self._evaluator.samples(batch, finite, finite + 1))]
        (piece,) = self._reduced(pieces, reduce)
        assert isinstance(piece, SamplesPiece)
        assert piece.result is not None
        self._open_with(sink, template_of(piece.result))

    def _open_with(self, sink: Sink, template: Template) -> None:
        sink.open(template)
        for sample in self._early:
            sink.put_nan(sample)
        self._early.clear()

    def _all_failed(self) -> NoReturn:
        first, why = next(iter(self.report.failed.items()))
        raise SampleError(
            f"per_sample: all {len(self.report.failed)} samples failed, the first with: {why}. Expected a result for "
            f"at least one, which gives the shapes of the others. Run func on one sample.",
            first,
        )

    # What is remembered, in this object and in files.

    @contextmanager
    def _sizes_kept(self) -> Iterator[None]:
        """Begin with the chunk sizes learnt in an earlier run on such samples, and keep those of this one."""
        kind, plan = (self._in_memory, *self._first.memory_signature()), self._engine.plan
        if kind in self._learnt:
            plan.continue_from(self._learnt[kind])
        yield
        self._learnt.clear()
        self._learnt[kind] = plan.state

    def _state(self) -> dict[str, Any]:
        random = self._evaluator.random_state
        texts = random and {device: bytes(state.tolist()).hex() for device, state in random.items()}
        return {**self._engine.state, "random": texts}

    def _header(self, reduce: Reduce | None) -> dict[str, str]:
        """What identifies this run, apart from the samples."""
        options = dataclasses.asdict(self._options) | {"in_dims": self._in_dims, "progress": None}
        return {
            "code or captured values": fingerprint(self._func, "func", outline=True),
            "reduction": fingerprint(reduce, "reduce"),
            "shared arguments": fingerprint(self._first.arguments(mapped=False), "arguments"),
            "options": fingerprint(options),
            "settings of torch": fingerprint(_settings()),
        }


def _settings() -> list[Any]:
    """What decides on dtypes and precision, besides arguments."""
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return [torch.get_default_dtype(), torch.get_float32_matmul_precision(), *autocast]


def _without_grad(func: Callable[[Any], Any], tree: Any) -> Any:
    with torch.no_grad():
        return func(tree)


def _tensors_of(texts: dict[str, str] | None) -> dict[str, Tensor] | None:
    if texts is None:
        return None
    return {name: torch.tensor([*bytes.fromhex(text)], dtype=torch.uint8) for name, text in texts.items()}


def _result_of(tree: Any) -> Result:
    """A tree of tensors with samples in front, as a result."""
    leaves, spec = trees.flatten(tree)
    return Result(spec, [Plain(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves])


def _nan_tree(template: Template, sample: int) -> Any:
    return with_tensors(template, [empty(spec, 1).copy_(nan(spec, sample)) for spec in template.tensors()])
