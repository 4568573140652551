"""What a fix is: a row of the table, which registers in the hooks of `core` and can be switched off."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.torch_version import TorchVersion

from autodiff import _torch
from autodiff.core import hooks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class Fix(NamedTuple):
    """One row.

    ``operations`` and ``symptom`` say where torch errs, ``remedy`` what is done instead. ``tests`` name rows of
    tests/support/table, which fail without the fix. torch versions from ``needed_since`` to before ``fixed_in`` need
    it. ``hooks`` are pairs of a registry of `autodiff.core.hooks` and its new entries.
    """

    name: str
    operations: str
    symptom: str
    remedy: str
    tests: tuple[str, ...]
    hooks: tuple[tuple[dict[Any, Any], Mapping[Any, Any]], ...]
    needed_since: str = "2.11"
    fixed_in: str | None = None
    issue: str | None = None

    def tests_here(self) -> set[str]:
        """The tests that fail without it on the installed torch: ``"name <2.15"`` is one up to a version."""
        named = set()
        for test in self.tests:
            name, _, bound = test.partition(" ")
            older = _torch.version < TorchVersion(bound.lstrip("<>="))
            if not bound or older == bound.startswith("<"):
                named.add(name)
        return named

    @property
    def is_needed(self) -> bool:
        """Whether the installed torch needs it."""
        return TorchVersion(self.needed_since) <= _torch.version and (
            self.fixed_in is None or TorchVersion(self.fixed_in) > _torch.version
        )

    def install(self) -> None:
        """Register in the hooks."""
        for registry, entries in self.hooks:
            registry.update(entries)
        _tell()

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Without this fix, for tests: not for several threads at once."""
        before = [dict(registry) for registry, _ in self.hooks]
        for registry, entries in self.hooks:
            for key in entries:
                del registry[key]
        _tell()
        try:
            yield
        finally:
            for (registry, _), entries in zip(self.hooks, before, strict=True):
                registry.clear()
                registry.update(entries)
            _tell()


def _tell() -> None:
    for forget in hooks.when_changed:
        forget()
