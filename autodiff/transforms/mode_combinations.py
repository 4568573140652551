"""Floor 2: the order of two modes in a second derivative, and the others where an operation lacks a rule.

Hands on `first_that_has_rules`. Builds on `core` alone.
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Literal, TypeVar

from autodiff.core.batch import remember_randomness
from autodiff.errors import MissingRuleError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

R = TypeVar("R")

# The first is the default: it takes the least time and memory.
ORDERS: tuple[tuple[Literal["reverse", "forward"], Literal["reverse", "forward"]], ...] = (
    ("reverse", "reverse"),
    ("forward", "reverse"),
    ("reverse", "forward"),
)

# By these words torch says that an operation lacks a derivative.
_MISSING = (
    "is not implemented",
    "does not support it",
    "marked with @once_differentiable",
    "setup_context",
    "You must implement",
)


def first_that_has_rules(
    name: str, first: Callable[[], R], others: Callable[[], Sequence[Callable[[], R]]]
) -> R:
    """What the first of the computations gives for which no operation lacks a rule.

    Random numbers are drawn anew from the same state, so that it is the same function, and ends as after one.
    """
    rewind = remember_randomness()
    failed: list[RuntimeError] = []
    try:
        try:
            return first()
        except RuntimeError as error:
            if not _may_be_missing_rule(error):
                raise
            failed.append(_without_graphs(error))
        for other in others():
            rewind()
            try:
                return other()
            except RuntimeError as error:
                if not _may_be_missing_rule(error):
                    raise
                failed.append(_without_graphs(error))
        if not any(map(_is_missing_rule, failed)):
            # Not torch's words in any order: the function's own error.
            raise failed[0]
        raise _none_has_rules(name, failed) from failed[0]
    finally:
        # An error, its traceback, this frame and its list hold one another.
        failed.clear()


def _without_graphs(error: RuntimeError) -> RuntimeError:
    """The error, whose traceback no longer holds what the frames computed: the next order needs the memory."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        one = one.__cause__ or one.__context__
    return error


def _may_be_missing_rule(error: RuntimeError) -> bool:
    """An autograd Function without a second derivative may say so by a bare NotImplementedError."""
    return isinstance(error, NotImplementedError) or _is_missing_rule(error)


def _is_missing_rule(error: RuntimeError) -> bool:
    return any(words in str(error) for words in _MISSING)


def _none_has_rules(name: str, failed: Sequence[RuntimeError]) -> MissingRuleError:
    tried = "; ".join(
        f"{outer} over {inner}: {str(error).splitlines()[0]}"
        for (outer, inner), error in zip(ORDERS, failed, strict=False)
    )
    return MissingRuleError(
        f"{name}: torch has no second derivative of an operation of this function. Expected rules for one of three "
        f"orders, but each lacks one: {tried}. Write the operation in terms of others, or give it a rule by "
        f"autodiff.custom_jvp or autodiff.custom_vjp."
    )
