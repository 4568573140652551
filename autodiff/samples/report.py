"""What a run did: chunks, peak, time, and the samples that failed."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from autodiff.core import memory


@dataclass
class Report:
    """What one run of :func:`autodiff.per_sample` did; printed, it reads as a sentence.

    ``failed`` holds the reason for each sample that was filled with NaN, by its number. ``peak`` is the most
    bytes that a measured chunk took, 0 where the chunk sizes were given.

    >>> import torch
    >>> from autodiff import per_sample
    >>> squares = per_sample(torch.square, chunk_size=2)
    >>> _ = squares(torch.arange(5.0))
    >>> squares.report
    per_sample(square): 5 samples in 3 chunks of 1 to 2; ... s ...
    >>> squares.report.chunks, squares.report.failed
    (3, {})
    """

    what: str
    budget: int
    samples: int = 0
    chunks: int = 0
    smallest: int = 0
    largest: int = 0
    rows: int = 0
    peak: int = 0
    seconds: float = 0.0
    resumed_at: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    _started: float = field(default_factory=time.perf_counter, repr=False)

    def add_chunk(self, samples: int, rows: int = 0) -> None:
        """Count a chunk; one of ``rows`` of one sample where that is not 0."""
        self.chunks += 1
        self.smallest = min(self.smallest or samples, samples)
        self.largest = max(self.largest, samples)
        self.rows = max(self.rows, rows)

    def advance(self, samples: int) -> None:
        """Count samples that are done."""
        self.samples += samples
        self.seconds = time.perf_counter() - self._started

    def __repr__(self) -> str:
        if not self.chunks and self.resumed_at:
            return f"{self.what}: nothing was left to do, {self.resumed_at} samples were there"
        size = f"{self.smallest}" if self.smallest == self.largest else f"{self.smallest} to {self.largest}"
        rows = f", up to {self.rows} rows at a time" if self.rows else ""
        parts = [f"{self.samples} samples in {self.chunks} chunks of {size}{rows}"]
        if self.peak:
            parts.append(f"peak {memory.format_bytes(self.peak)} of {memory.format_bytes(self.budget)}")
        rate = f" ({self.samples / self.seconds:.0f} samples/s)" if self.seconds else ""
        parts.append(f"{self.seconds:.1f} s{rate}")
        if self.resumed_at:
            parts.append(f"resumed at sample {self.resumed_at}")
        if self.failed:
            shown = ", ".join(map(str, list(self.failed)[:10])) + (", ..." if len(self.failed) > 10 else "")
            parts.append(f"{len(self.failed)} failed: {shown}")
        return f"{self.what}: {'; '.join(parts)}"
