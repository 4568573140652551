"""Checks of options: argnums and wrt, chunk sizes, and keywords with few values. Imports `_torch` and `errors`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from autodiff._torch import compiling, stop_tracing
from autodiff.errors import ArgnumsError, OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence


def chunk_size(name: str, size: object) -> None:
    if size is None or size == "auto" or (isinstance(size, int) and not isinstance(size, bool) and size > 0):
        return
    rule = "chunk_size should be None or" if name == "vmap" else "`chunk_size` should be"
    raise OptionError(
        f"{name}: {rule} greater than 0. (got {size!r}) None takes everything in one batch, a smaller int "
        f"takes less memory, and 'auto' learns what fits."
    )


def positive_int(name: str, option: str, value: object, meaning: str) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return
    raise OptionError(f"{name}: {option} is a positive int, got {value!r}. {meaning}")


def randomness(name: str, value: str) -> None:
    choice(name, "randomness", value, ("error", "different", "same"), opening="Only allowed values")


def choice(name: str, option: str, value: object, choices: Sequence[str | None], opening: str = "") -> None:
    if value in choices:
        return
    listed = ", ".join(map(repr, choices))
    raise OptionError(f"{name}: {opening or 'the allowed values'} for {option} are {listed}. Got {value!r}.")


def argnums(name: str, value: object) -> None:
    """Only ints, names and non-empty tuples of them, each once."""
    picks = value if isinstance(value, tuple) else (value,)
    if isinstance(value, tuple) and not value:
        raise ArgnumsError(
            f"{name}: argnums must be non-empty, got (). Name at least one argument, as in argnums=0."
        )
    for pick in picks:
        if isinstance(pick, bool) or not isinstance(pick, int | str):
            several = "argnum must be int" if picks is value else "argnums must be int or Tuple[int, ...]"
            raise ArgnumsError(
                f"{name}: {several}, or the name of a parameter, got: {type(pick)}. Write argnums=0, "
                f"argnums='w' or argnums=(0, 'w')."
            )


def wrt(name: str, value: object) -> None:
    """A pattern, or a non-empty tuple of them."""
    patterns = value if isinstance(value, tuple) else (value,)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise OptionError(
            f"{name}: wrt is a pattern of leaves' places, or a tuple of patterns, got {value!r}. Write "
            f"wrt='last.*' or wrt=('0.weight', '2.*')."
        )


def untraced_call(name: str) -> None:
    if compiling():
        stop_tracing(
            f"{name}: torch.compile traces the call. Expected a call outside of what is compiled: it measures memory, "
            f"which no tracer can. Compile with fullgraph=False, which runs it uncompiled, or compile vmap of the "
            f"function, and call that in chunks of one size."
        )


def raise_unmatched_wrt(name: str, pattern: str, places: Sequence[str]) -> NoReturn:
    shown = ", ".join(map(repr, places[:8])) + (", ..." if len(places) > 8 else "")
    raise ArgnumsError(
        f"{name}: wrt={pattern!r} matches no leaf that can be differentiated. Their places are {shown}. "
        f"A * stands for any text, as in wrt='last.*'."
    )


def raise_argnum_out_of_range(name: str, pick: int, count: int) -> NoReturn:
    raise ArgnumsError(
        f"{name}: Got argnum={pick}, but only {count} positional inputs. argnums counts positional "
        f"arguments from 0; a keyword argument is picked by its name, as in argnums='w'."
    )


def raise_unknown_argname(name: str, pick: str, known: Sequence[str]) -> NoReturn:
    listed = ", ".join(map(repr, known)) or "none"
    raise ArgnumsError(
        f"{name}: argnums={pick!r} names no argument of this call. The function's arguments are "
        f"{listed}. Pass the argument, or correct the name."
    )


def raise_repeated_argnums(name: str, value: object) -> NoReturn:
    raise ArgnumsError(
        f"{name}: argnums elements must be unique, got {value}. Each argument is differentiated once; "
        f"remove the repetition."
    )
