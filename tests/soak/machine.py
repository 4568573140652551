"""Runs one composition: it returns and is right, or it raises and what was raised comes out.

After each, nothing may be left: `state` is what conftest.py asserts after every test, and what the
library keeps itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from autodiff._torch import forward_level as forward
from autodiff._torch.thread_state import thread
from autodiff.core import tape
from autodiff.torch_fixes import attention
from conftest import state_of_torch
from soak.compositions import Composition, compose
from soak.containers import Draw, Tree, active_leaves, distance, leaves, ravel, weights
from soak.operations import Fuse
from soak.reference import Differences, DifferencesOverRows, Rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from soak.reference import Calculus

TOLERANCE = 1e-9
# Sixth-order differences: the step of one derivative, and that of two nested ones.
STEPS, TOLERANCE_OF_DIFFERENCES = {1: 2e-3, 2: 1e-2}, 1e-6
MOST_EVALUATIONS = 500


# What torch warns of: its own jvp uses TorchScript, and vmap loops over fused attention.
QUIET = [r".*torch\.jit\..* is deprecated", "There is a performance drop"]


class Stop(BaseException):
    """Like KeyboardInterrupt: not an Exception."""


ERRORS = [ValueError, RuntimeError, StopIteration, Stop, KeyboardInterrupt, GeneratorExit]


@dataclass
class Outcome:
    """How one composition went."""

    composition: Composition
    raised: str = ""
    error: float = 0.0
    by_differences: float | None = None


def state() -> dict[str, Any]:
    """Everything that a transform switches, takes or counts while it runs."""
    return state_of_torch() | {
        "pushes": thread.pushes,
        "users of the forward-mode level": forward.dual_level._users,
        "forward-mode level owned": forward.dual_level.owned,
        "forward-mode lock": forward.dual_level._lock.locked(),
        "recordings": tape._thread.recording,
        "users of attention's formula": attention.plain_attention._users,
        "attention's lock": attention.plain_attention._lock.locked(),
        "nothing is compiled in this thread": thread.__dict__.get("uncompiled", 0),
    }


def check(seed: int, index: int) -> Outcome:
    """Run composition ``index``, every third of which raises; an AssertionError says what was wrong."""
    draw, composition = Draw(f"{seed}/{index}/run"), compose(seed, index)
    tensors = [
        leaf for leaf in leaves(composition.args) if isinstance(leaf, Tensor) and not leaf.is_inference()
    ]
    versions = [tensor._version for tensor in tensors]
    raises = index % 3 == 2
    with composition.context():
        before = state()
        result = _raised(draw, composition) if raises else composition.library(Fuse())()
        left = state()
        changed = {name: value for name, value in left.items() if value != before[name]}
        assert not changed, f"left behind: {changed}"
    assert [tensor._version for tensor in tensors] == versions, "an argument was written to"
    return Outcome(composition, raised=result) if raises else _compared(draw, composition, result)


def _raised(draw: Draw, composition: Composition) -> str:
    """Count where it may raise, then raise somewhere there; the name of what came out."""
    counting = Fuse()
    composition.library(counting)()
    error = draw.pick(ERRORS)("inside")
    came = _what_comes_out(composition.library(Fuse(error, draw.integer(1, counting.count))))
    assert came is error, f"{came!r} came out instead of {error!r}"
    # What it leads to, frames and their tensors, lives no longer than this.
    error.__traceback__ = error.__context__ = None
    return type(error).__name__


def _what_comes_out(call: Callable[[], Tree]) -> BaseException | None:
    try:
        call()
    except BaseException as error:  # noqa: BLE001  any of ERRORS
        return error
    return None


def _compared(draw: Draw, composition: Composition, result: Tree) -> Outcome:
    """Compare with raw autograd, through what is tracked too, and with differences where these are cheap."""
    expected = _plainly(composition, Rows())
    error = distance(result, expected)
    assert error < TOLERANCE, f"off by {error}"
    outcome = Outcome(composition, error=error)
    if composition.tracked:
        error = _distance_of_gradients(result, expected, composition.tracked)
        assert error < TOLERANCE, f"the gradient by what is tracked is off by {error}"
        outcome.error = max(outcome.error, error)
    elif not any(layer.options.get("create_graph") for layer in composition.layers):
        assert not any(leaf.requires_grad for leaf in active_leaves(result)), "a result requires grad"
    if draw.chance(0.5):
        outcome.by_differences = _distance_of_differences(composition, result)
    return outcome


def _plainly(composition: Composition, calculus: Calculus) -> Tree:
    """The expected result; attention by the formula, since torch's fused kernels have one derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        return composition.expected(calculus)


def _distance_of_differences(composition: Composition, result: Tree) -> float | None:
    """From nested differences up to the second derivative, from differences of raw autograd beyond."""
    if {"hook", "function"} & {step.name for step in composition.program.steps}:
        return None  # they give what is not the derivative of anything
    order = len(composition.modes)
    width = sum(leaf.numel() for leaf in active_leaves(composition.args))
    alone = (6 * width) ** order <= MOST_EVALUATIONS and order <= 2
    if order == 0 or (not alone and 6 * width * composition.rows > MOST_EVALUATIONS):
        return None
    for finer in (1, 4, 16):
        step = STEPS[order if alone else 1] / finer
        calculus = Differences(step) if alone else DifferencesOverRows(step)
        error = distance(result, _plainly(composition, calculus))
        if error < TOLERANCE_OF_DIFFERENCES:
            return error
    raise AssertionError(f"off by {error} from differences")


def _distance_of_gradients(result: Tree, expected: Tree, tracked: Sequence[Tensor]) -> float:
    """Of the gradients of both by what somebody outside watches."""
    gradients = []
    for tree in (result, expected):
        total = ravel(tree)
        total = total @ weights(tuple(total.shape))
        if not total.requires_grad:
            gradients.append([None] * len(tracked))
            continue
        gradients.append(list(torch.autograd.grad(total, tracked, allow_unused=True)))
    pairs = zip(*gradients, tracked, strict=True)
    filled = [tuple(torch.zeros_like(w) if g is None else g for g in (one, other)) for one, other, w in pairs]
    return distance([one for one, _ in filled], [other for _, other in filled], "gradients")
