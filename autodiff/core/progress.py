"""A progress bar, by tqdm, which never stops the work that it shows. Imports `errors` alone."""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any, Self

from autodiff.errors import OptionError

# What tqdm raises where stderr is missing, closed or on a full disk: no bar is a reason to lose a run.
_UNSEEN = (AttributeError, OSError, ValueError)


class Progress:
    """A bar while ``with`` lasts, and after it with ``stay``; ``shown=False`` makes none."""

    def __init__(
        self, what: str, total: int | None, done: int, *, unit: str, shown: bool, stay: bool = True
    ) -> None:
        self._bar: Any = None
        if shown:
            from tqdm.auto import tqdm  # noqa: PLC0415  an extra

            with contextlib.suppress(*_UNSEEN):
                self._bar = tqdm(desc=what, total=total, initial=done, unit=unit, leave=stay)

    @staticmethod
    def check(name: str) -> None:
        """An error if tqdm is missing; ``name`` is the public name that the user called."""
        if importlib.util.find_spec("tqdm") is None:
            raise OptionError(
                f"{name}: progress=True needs tqdm, which is not installed. Install it: pip install "
                "'autodiff[progress]', or leave progress out."
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            with contextlib.suppress(*_UNSEEN):
                self._bar.close()

    @property
    def shown(self) -> bool:
        """Whether there is a bar, for which a note is worth making."""
        return self._bar is not None

    def advance(self, count: int, note: str) -> None:
        """Count so many more that are done, and show a note beside the bar."""
        if self._bar is not None:
            with contextlib.suppress(*_UNSEEN):
                self._bar.set_postfix_str(note, refresh=False)
                self._bar.update(count)
