"""A progress bar with samples per second and, where it is measured, memory; by tqdm."""

from __future__ import annotations

import contextlib
import importlib.util
from typing import TYPE_CHECKING, Any, Self

from autodiff.core import memory
from autodiff.errors import OptionError

if TYPE_CHECKING:
    from autodiff.samples.report import Report

# What tqdm raises where stderr is missing, closed or on a full disk: no bar is a reason to lose a run.
_UNSEEN = (AttributeError, OSError, ValueError)


class Progress:
    """A bar while ``with`` lasts, and after it with ``stay``; ``shown=False`` makes none."""

    def __init__(
        self, what: str, total: int | None, done: int, *, shown: bool, unit: str = "sample", stay: bool = True
    ) -> None:
        self._bar: Any = None
        if shown:
            from tqdm.auto import tqdm  # noqa: PLC0415  an extra

            with contextlib.suppress(*_UNSEEN):
                self._bar = tqdm(desc=what, total=total, initial=done, unit=unit, leave=stay)

    @staticmethod
    def check(name: str) -> None:
        """An error if tqdm is missing."""
        if importlib.util.find_spec("tqdm") is None:
            raise OptionError(
                f"{name}: progress=True needs tqdm, which is not installed. Install it: pip install "
                f"'autodiff[progress]', or leave progress out."
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            with contextlib.suppress(*_UNSEEN):
                self._bar.close()

    def advance(self, samples: int, report: Report | None = None) -> None:
        """Count samples that are done."""
        if self._bar is not None:
            with contextlib.suppress(*_UNSEEN):
                if report is not None:
                    self._bar.set_postfix_str(
                        f"chunk {report.largest}, peak {memory.format_bytes(report.peak)}", refresh=False
                    )
                self._bar.update(samples)
