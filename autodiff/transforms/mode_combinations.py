"""Combinations of two modes in a second derivative: the first for which no operation lacks a rule."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

from autodiff._torch import compiling, says
from autodiff.core.randomness import remember_randomness
from autodiff.errors import MissingRuleError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

R = TypeVar("R")

Mode: TypeAlias = Literal["reverse", "forward"]

# The outer mode and the inner one. The first is the default: it takes the least time and memory.
COMBINATIONS: tuple[tuple[Mode, Mode], ...] = (
    ("reverse", "reverse"),
    ("forward", "reverse"),
    ("reverse", "forward"),
)


# Those by which some rows of a Hessian are computed without the others.
BY_ROWS = COMBINATIONS[::2]


def first_supported(
    name: str, compute: Callable[[Mode, Mode], R], combinations: Sequence[tuple[Mode, Mode]] = COMBINATIONS
) -> R:
    """What ``compute`` gives for the first of the combinations for which no operation lacks a rule.

    Each attempt starts from the same state of the random number generators, and the last one leaves it as one run does.
    """
    if compiling():
        return compute(*combinations[0])
    rewind = remember_randomness()
    failed: list[RuntimeError] = []
    try:
        for combination in combinations:
            if failed:
                rewind()
            try:
                return compute(*combination)
            except RuntimeError as error:
                if not _may_be_missing_rule(error):
                    raise
                failed.append(_without_graphs(error))
        if not any(says(error, "no rule") for error in failed):
            # None of the errors is torch's about a missing rule: it is the function's own.
            raise failed[0]
        raise _none_has_rules(name, combinations, failed) from failed[0]
    finally:
        # An error, its traceback, this frame and its list form a reference cycle.
        failed.clear()


def _without_graphs(error: RuntimeError) -> RuntimeError:
    """The error, whose traceback no longer holds what the frames computed: the next combination needs the memory."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        one = one.__cause__ or one.__context__
    return error


def _may_be_missing_rule(error: RuntimeError) -> bool:
    """An autograd Function without a second derivative may say so by a bare NotImplementedError."""
    return isinstance(error, NotImplementedError) or says(error, "no rule")


def _none_has_rules(
    name: str, combinations: Sequence[tuple[Mode, Mode]], failed: Sequence[RuntimeError]
) -> MissingRuleError:
    tried = "; ".join(
        f"{outer} over {inner}: {str(error).splitlines()[0]}"
        for (outer, inner), error in zip(combinations, failed, strict=False)
    )
    return MissingRuleError(
        f"{name}: torch has no second derivative of an operation of this function. Expected rules for one of "
        f"{len(combinations)} mode combinations, but each lacks one: {tried}. Write the operation in terms of others, "
        f"or give it a rule by autodiff.custom_jvp or autodiff.custom_vjp."
    )
