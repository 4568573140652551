"""What is computed when it is first asked for, and how long it may be kept. Imports `_torch` alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from autodiff._torch import compiling, functorch_active

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class lazy(Generic[T]):  # noqa: N801  used as property is
    """functools.cached_property without the lock of Python 3.11, which torch.compile cannot trace.

    Two threads that ask at the same time compute it both; the last one is kept. While torch.compile traces it is
    computed each time: what it computes cannot leave the trace, and what was computed outside, such as the structure of
    a tree, cannot be traced.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        # Another name than the attribute's, so that it is asked each time.
        self._compute, self._name, self.__doc__ = compute, f"_{compute.__name__} kept", compute.__doc__

    @overload
    def __get__(self, instance: None, owner: Any) -> lazy[T]: ...
    @overload
    def __get__(self, instance: object, owner: Any) -> T: ...
    def __get__(self, instance: Any, owner: Any) -> Any:
        if instance is None:
            return self
        if compiling():
            return self._compute(instance)
        kept = instance.__dict__
        if self._name not in kept:
            kept[self._name] = self._compute(instance)
        return kept[self._name]


def kept_outside_transforms(instance: Any, name: str, compute: Callable[[], T]) -> T:
    """What `keeping` was given, or what was computed once where no transform is active, or is computed now.

    What is recorded inside a transform must not outlive it, and the object may come from outside.
    """
    key = _key(name)
    kept: T | None = instance.__dict__.get(key)
    if kept is None:
        kept = compute()
        if not (compiling() or functorch_active()):
            instance.__dict__[key] = kept
    return kept


def keeping(instance: T, name: str, value: Any) -> T:
    """The object, or a copy of it, that keeps a value inside the transforms that are active."""
    key = _key(name)
    if instance.__dict__.get(key) is value:
        return instance
    copied: T = object.__new__(type(instance))
    copied.__dict__.update(instance.__dict__)
    copied.__dict__[key] = value
    return copied


def _key(name: str) -> str:
    """What torch's tracer records serves the trace alone, and what is recorded outside of it cannot be traced."""
    return f"{name} traced" if compiling() else name
