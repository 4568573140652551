"""Every message of torch's that is recognised by its text, under what it means. Imports nothing from the package."""

from __future__ import annotations

from typing import Literal, TypeAlias

Meaning: TypeAlias = Literal[
    "an input was written in place",
    "out of memory",
    "cannot be batched",
    "random numbers are forbidden",
    "no rule",
    "no forward rule",
    "a level that is gone",
    "a level cannot run it",
    "dtypes are mixed",
    "a graph was freed",
    "a saved tensor was written",
]

MESSAGES: dict[Meaning, tuple[str, ...]] = {
    "an input was written in place": ("a leaf Variable that requires grad", "a view of a leaf Variable"),
    # The CPU allocator raises a RuntimeError; on an accelerator there is a class.
    "out of memory": ("can't allocate memory", "not enough memory"),
    "cannot be batched": ("data-dependent control flow", ".item()", "dynamic shape", "doesn't have storage"),
    "random numbers are forbidden": ("randomness error mode",),
    "no rule": (
        "is not implemented",
        "does not support it",
        "marked with @once_differentiable",
        "setup_context",
        "You must implement",
    ),
    "no forward rule": ("forward AD",),
    "a level cannot run it": (
        "setup_context",
        "doesn't have storage",
        "would mutate a captured Tensor",
        "saved-tensor hook",
    ),
    "a level that is gone": ("INTERNAL ASSERT",),
    "a saved tensor was written": ("modified by an inplace operation",),
    "a graph was freed": ("backward through the graph a second time",),
    "dtypes are mixed": ("dtype", "scalar type", "should be the same"),
}


def says(error: BaseException, meaning: Meaning) -> bool:
    """Whether torch's error means this, as far as its text tells."""
    return any(words in str(error) for words in MESSAGES[meaning])
