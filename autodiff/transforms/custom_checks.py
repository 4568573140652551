"""Checks of custom rules, named as `checks` says; ``func`` is the name of the function that has the rule.

Imports `_torch`, `trees` and `errors`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from torch import Tensor

from autodiff._torch import compiling, stop_tracing
from autodiff.core import trees
from autodiff.errors import ArgnumsError, RuleError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autodiff.core.specs import TensorSpec
    from autodiff.core.trees import Spec


def nondiff_argnums(
    name: str, value: object, parameters: Sequence[str], *, more: bool = False
) -> frozenset[int]:
    """The positions of the arguments that are not differentiated; ``more`` says that others may follow."""
    picks = value if isinstance(value, tuple) else (value,)
    positions = []
    for pick in picks:
        position = parameters.index(pick) if pick in parameters else pick
        is_place = isinstance(position, int) and not isinstance(position, bool) and position >= 0
        if not is_place or not (more or position < len(parameters)):
            listed = ", ".join(map(repr, parameters)) or "unknown"
            raise ArgnumsError(
                f"{name}: nondiff_argnums are positions from 0 on or names of parameters, got {pick!r}. The function's "
                f"parameters are {listed}. Write nondiff_argnums=(0,)."
            )
        positions.append(position)
    return frozenset(positions)


def raise_keyword_arguments(name: str, func: str, names: Sequence[str]) -> NoReturn:
    raise RuleError(
        f"{name}: {func} is called with {names} by keyword, but rules get arguments by position. Expected positional "
        f"parameters; write them before the * in {func}'s signature."
    )


def untraced_call(name: str, func: str) -> None:
    if compiling():
        stop_tracing(
            f"{name}: torch.compile traces a call of {func}. Expected a call outside of what is compiled: no tracer "
            f"can follow a rule, and it would differentiate {func} in its place. Compile with fullgraph=False, which "
            f"runs the transform around {func} uncompiled, or compile what does not need the rule."
        )


def raise_no_rule(name: str, func: str, how: str) -> NoReturn:
    raise RuleError(
        f"{name}: {func} is differentiated, but has no rule. Expected one, set by {func}.{how}, before the first "
        f"derivative."
    )


def no_nondiff_argnums(name: str, func: str, nondiff: frozenset[int]) -> None:
    if nondiff:
        raise RuleError(
            f"{name}: {func}.defjvps takes a rule for every argument, but {func} has nondiff_argnums "
            f"{sorted(nondiff)}. Use defjvp."
        )


def rule_result_pair(name: str, func: str, rule: str, pair: str, value: object) -> None:
    if not isinstance(value, tuple) or len(value) != 2:
        came = f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__
        raise RuleError(
            f"{name}: the {rule} of {func} is expected to return {pair}, got {came}. Return a tuple of the two."
        )


def raise_wrong_cotangent_count(name: str, func: str, value: object, count: int) -> NoReturn:
    came = f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__
    raise RuleError(
        f"{name}: bwd of {func} is expected to return a tuple of {count}, a cotangent for each differentiated "
        f"argument, got {came}. Write (c,) for one, and None for zero."
    )


def raise_wrong_rule_structure(
    name: str, func: str, kind: str, came: Spec, wanted: Spec, root: str
) -> NoReturn:
    raise RuleError(
        f"{name}: the {kind} that the rule of {func} gives is expected to have the structure of {root}, but "
        f"{trees.difference(came, kind, wanted, root)} Give a tensor for each floating-point leaf, and None for zero."
    )


def raise_wrong_rule_leaf(
    name: str, func: str, kind: str, path: str, value: object, like: Tensor | TensorSpec
) -> NoReturn:
    came = (
        f"shape {tuple(value.shape)} and dtype {value.dtype}"
        if isinstance(value, Tensor)
        else f"type {type(value).__name__}"
    )
    raise RuleError(
        f"{name}: the {kind} that the rule of {func} gives for {path} has {came}, but {path} has shape "
        f"{tuple(like.shape)} and dtype {like.dtype}. Sum over what was broadcast, or give None for zero."
    )


def raise_nonlinear_rule(name: str, func: str) -> NoReturn:
    rule, vector, mode, other, instead = (
        ("bwd", "cotangent", "forward mode", "custom_jvp", "reverse mode")
        if name == "custom_vjp"
        else ("rule", "tangents", "reverse mode", "custom_vjp", "forward mode")
    )
    raise RuleError(
        f"{name}: {mode} transposes the {rule} of {func}, which does not act as a linear function of the {vector}. "
        f"Expected no branch and no bound that depends on the {vector}, and a solver that converges for each. Write "
        f"such a {rule}, give one for {mode} by {other}, or use {instead}."
    )


def raise_captured_tensor(name: str, func: str) -> NoReturn:
    raise RuleError(
        f"{name}: {func} captures a tensor that is differentiated, but is not an argument of it, so that no rule "
        f"gives the derivative. Expected only arguments to be differentiated; make it an argument, or detach it."
    )


def raise_differentiated_nondiff(name: str, func: str, path: str) -> NoReturn:
    raise RuleError(
        f"{name}: {path} of {func} is differentiated, but listed in nondiff_argnums. Expected a constant there; detach "
        f"it, or leave it out of nondiff_argnums."
    )


def raise_argument_written(name: str, func: str) -> NoReturn:
    raise RuleError(
        f"{name}: {func} wrote in place to an argument that is differentiated: its derivative belongs to another "
        f"point. Expected a function that leaves its arguments as they are; write to a clone."
    )
