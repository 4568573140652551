"""Floor 2: the order of two modes in a second derivative, and the others where an operation lacks a rule.

Hands on `first_that_has_rules`. Builds on `core` alone.
"""

from __future__ import annotations

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
_MISSING = ("is not implemented", "does not support it", "marked with @once_differentiable", "setup_context")


def first_that_has_rules(
    name: str, first: Callable[[], R], others: Callable[[], Sequence[Callable[[], R]]]
) -> R:
    """What the first of the computations gives for which no operation lacks a rule.

    Random numbers are drawn anew from the same state, so that it is the same function, and ends as after one.
    """
    rewind = remember_randomness()
    try:
        return first()
    except RuntimeError as error:
        if not _is_missing_rule(error):
            raise
        failed = [error]
    for other in others():
        rewind()
        try:
            return other()
        except RuntimeError as error:
            if not _is_missing_rule(error):
                raise
            failed.append(error)
    raise _none_has_rules(name, failed) from failed[0]


def _is_missing_rule(error: RuntimeError) -> bool:
    return isinstance(error, NotImplementedError) or any(words in str(error) for words in _MISSING)


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
