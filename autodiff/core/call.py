"""One call of a transformed function: argnums, trees and aux are handled here and nowhere else.

Provides `Call`, which turns ``func(*args, **kwargs)`` into a function from the differentiable
leaves of the selected arguments to the output's leaves. Imports `trees`, `checks` and `errors`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from autodiff import checks
from autodiff._torch import MESSAGES
from autodiff.core import trees

if TYPE_CHECKING:
    from autodiff.core.trees import Spec
    from autodiff.types import Argnums, Wrt

Lift: TypeAlias = Callable[[Tensor], Tensor]

_WILDCARDS = frozenset("*?[")
_CLONE = "the function writes in place to an argument that is differentiated. Write to a clone, as in x = x.clone()."


class Call:
    """``func(*args, **kwargs)``, seen from the leaves that are differentiated.

    ``argnums=None`` selects the tuple of all positional arguments. ``wrt`` leaves only those leaves of the
    selected arguments to be differentiated whose place matches one of its patterns.
    """

    __slots__ = (
        "_leaves",
        "_selected",
        "args",
        "aux_spec",
        "func",
        "has_aux",
        "kwargs",
        "name",
        "out_spec",
        "output_positions",
        "primal_positions",
        "primals",
        "spec",
    )

    out_spec: Spec
    aux_spec: Spec

    def __init__(
        self,
        name: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        argnums: Argnums | None,
        has_aux: bool,
        wrt: Wrt = None,
    ) -> None:
        self.name, self.func, self.args, self.kwargs, self.has_aux = name, func, args, kwargs, has_aux
        self._selected: list[int | str] | int | str | None
        if argnums is None:
            self._selected, tree = None, args
        elif type(argnums) is int and 0 <= argnums < len(args):
            self._selected, tree = argnums, args[argnums]
        else:
            self._selected = _resolve_argnums(name, func, args, kwargs, argnums)
            tree = self._select()
        while True:
            self._leaves, self.spec = trees.flatten(tree)
            self.primal_positions = [
                i
                for i, leaf in enumerate(self._leaves)
                # `is_differentiable`, inlined: this loop is hot.
                if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
            ]
            if len(self.primal_positions) == len(self._leaves):
                break
            known = trees.with_known_classes(self._leaves, self.spec)
            if known is None:
                break
            tree = known
        if not self.primal_positions:
            checks.raise_no_differentiable_leaf(name, self.spec, self._leaves, self.root)
        if wrt is not None:
            several = isinstance(self._selected, list)
            places = trees.dotted_paths(self.spec, skip=several)
            found = matching(name, wrt, [places[i] for i in self.primal_positions])
            self.primal_positions = [self.primal_positions[i] for i in found]
        self.primals: list[Tensor] = [self._leaves[i] for i in self.primal_positions]

    @property
    def root(self) -> str:
        """What the selected arguments are called, written as code.

        Made only for errors: to format a number under torch.compile would add a guard.
        """
        if self._selected is None:
            return "primals"
        if isinstance(self._selected, list):
            return "args"
        return f"args[{self._selected}]" if isinstance(self._selected, int) else self._selected

    def _select(self) -> Any:
        if isinstance(self._selected, list):
            return tuple(self._argument(pick) for pick in self._selected)
        assert self._selected is not None
        return self._argument(self._selected)

    def _argument(self, pick: int | str) -> Any:
        return self.args[pick] if isinstance(pick, int) else self.kwargs[pick]

    def evaluate(self, leaves: Sequence[Tensor], lift: Lift | None = None) -> tuple[list[Any], list[Any]]:
        """Run ``func`` once with ``leaves`` in place of the primals; the output's and aux's leaves.

        ``lift`` is applied to every other tensor among the arguments.
        """
        all_given = len(leaves) == len(self._leaves)
        filled = list(leaves) if all_given else refilled(self._leaves, self.primal_positions, leaves, lift)
        try:
            output = self._run(trees.unflatten(self.spec, filled), lift)
        except RuntimeError as error:
            checks.advise(self.name, error, MESSAGES["an input was written in place"], _CLONE)
            raise
        if self.has_aux:
            checks.aux_pair(self.name, output)
            output, aux = output
            aux_leaves, self.aux_spec = trees.flatten(aux)
        else:
            aux_leaves = []
        out_leaves, self.out_spec = trees.flatten(output)
        # None is not an output, as in a gradient, where it stands for what is not differentiated: so grad composes.
        self.output_positions = [i for i, leaf in enumerate(out_leaves) if leaf is not None]
        return [out_leaves[i] for i in self.output_positions], aux_leaves

    def _run(self, tree: Any, lift: Lift | None) -> Any:
        kwargs = _lifted_tree(self.kwargs, lift)
        if self._selected is None:
            return self.func(*tree, **kwargs)
        if len(self.args) == 1 and self._selected == 0:
            return self.func(tree, **kwargs)
        picks, values = (
            (self._selected, tree) if isinstance(self._selected, list) else ([self._selected], [tree])
        )
        # The selected arguments leave a gap, since their leaves are in ``tree``.
        args = _lifted_tree([None if i in picks else arg for i, arg in enumerate(self.args)], lift)
        kwargs = dict(kwargs)
        for pick, value in zip(picks, values, strict=True):
            if isinstance(pick, int):
                args[pick] = value
            else:
                kwargs[pick] = value
        return self.func(*args, **kwargs)

    @property
    def output_count(self) -> int:
        """How many leaves the output has, those that are None left aside."""
        return len(self.output_positions)

    def like_arguments(self, values: Sequence[Any]) -> Any:
        """A tree like the selected arguments with one value for each primal, None elsewhere."""
        return trees.unflatten(self.spec, spread(values, self.primal_positions, len(self._leaves)))

    def like_output(self, values: Sequence[Any]) -> Any:
        """A tree like the function's output, None where that held None."""
        return trees.unflatten(self.out_spec, spread(values, self.output_positions, self.out_spec.num_leaves))

    def aux(self, leaves: Sequence[Any]) -> Any:
        """The auxiliary output, put together again."""
        return trees.unflatten(self.aux_spec, leaves)

    def tangents(self, kind: str, tree: Any) -> list[Tensor]:
        """The leaves of a tree of tangents, checked against the primals; passive places are ignored."""
        leaves = checks.matching_structure(self.name, kind, self.spec, tree, self.root)
        picked = [leaves[i] for i in self.primal_positions]
        for primal, tangent, position in zip(self.primals, picked, self.primal_positions, strict=True):
            if type(tangent) is not Tensor or tangent.shape != primal.shape or tangent.dtype != primal.dtype:
                path = trees.paths(self.spec, kind)[position]
                home = trees.paths(self.spec, self.root)[position]
                checks.matching_leaf(self.name, "tangent", path, tangent, home, primal)
        return picked

    def cotangents(self, outputs: Sequence[Tensor], tree: Any) -> list[Tensor]:
        """The leaves of a tree of cotangents, checked against the outputs."""
        leaves = checks.matching_structure(self.name, "cotangents", self.out_spec, tree, "primal output")
        picked = [leaves[i] for i in self.output_positions]
        for output, cotangent, position in zip(outputs, picked, self.output_positions, strict=True):
            if (
                type(cotangent) is not Tensor
                or cotangent.shape != output.shape
                or cotangent.dtype != output.dtype
            ):
                path = trees.paths(self.out_spec, "cotangents")[position]
                home = trees.paths(self.out_spec, "output")[position]
                checks.matching_leaf(self.name, "cotangent", path, cotangent, home, output)
        return picked

    def dense_cotangents(self, pulled: Sequence[Tensor | None], strict: bool = False) -> list[Tensor]:
        """What was pulled back to the primals, with zeros for None; an error instead where ``strict``."""
        if strict:
            for index, cotangent in enumerate(pulled):
                if cotangent is None:
                    checks.raise_independent(
                        self.name, "the output", self.path_of_primal(index), primal=index
                    )
        pairs = zip(self.primals, pulled, strict=True)
        return [torch.zeros_like(like) if one is None else one for like, one in pairs]

    def dense_tangents(
        self, outputs: Sequence[Tensor], pushed: Sequence[Tensor | None], strict: bool = False
    ) -> list[Tensor]:
        """What was pushed forward to the outputs, with zeros for None; an error instead where ``strict``."""
        if strict:
            for index, tangent in enumerate(pushed):
                if tangent is None:
                    checks.raise_independent(
                        self.name, self.path_of_output(index), "the primals", output=index
                    )
        pairs = zip(outputs, pushed, strict=True)
        return [torch.zeros_like(like) if one is None else one for like, one in pairs]

    def path_of_primal(self, index: int, root: str | None = None) -> str:
        """The place of a primal, written as code; ``root`` is a tree like the selected arguments."""
        return trees.paths(self.spec, self.root if root is None else root)[self.primal_positions[index]]

    def path_of_output(self, index: int) -> str:
        """The place of an output, written as code."""
        return trees.paths(self.out_spec, "output")[self.output_positions[index]]


def is_differentiable(leaf: object) -> bool:
    """Whether a leaf is a floating or complex tensor."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def wraps(func: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """functools.wraps without the copy of ``__dict__``, which for a module holds its parameters."""

    def decorate(wrapper: Callable[..., Any]) -> Callable[..., Any]:
        return functools.update_wrapper(wrapper, func, updated=())

    return decorate


def parameter_names(func: Callable[..., Any]) -> list[str]:
    """The names of the positional parameters, a module's from its ``forward``; empty if unknown.

    >>> parameter_names(functools.partial(torch.nn.ReLU()))
    ['input']
    """
    try:
        parameters = inspect.signature(_with_signature(func)).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _with_signature(func: Callable[..., Any]) -> Callable[..., Any]:
    """What has the signature: a module's is its ``forward``'s, also inside transforms and partials."""
    func = inspect.unwrap(func, stop=lambda f: hasattr(f, "__signature__"))
    if isinstance(func, functools.partial):
        return functools.partial(_with_signature(func.func), *func.args, **func.keywords)
    return func.forward if isinstance(func, torch.nn.Module) else func


def _resolve_argnums(
    name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], argnums: Argnums
) -> list[int | str] | int | str:
    """Where the selected arguments stand in this call: a position, or a keyword."""
    checks.argnums(name, argnums)
    if not isinstance(argnums, tuple):
        return _resolve_argnum(name, func, args, kwargs, argnums)
    places = [_resolve_argnum(name, func, args, kwargs, pick) for pick in argnums]
    if len(set(places)) != len(places):
        checks.raise_repeated_argnums(name, argnums)
    return places


def _resolve_argnum(
    name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], pick: int | str
) -> int | str:
    if isinstance(pick, str):
        if pick in kwargs:
            return pick
        known = parameter_names(func)
        if pick in known and known.index(pick) < len(args):
            return known.index(pick)
        checks.raise_unknown_argname(name, pick, [*known[: len(args)], *kwargs])
    if -len(args) <= pick < len(args):
        return pick % len(args)
    known = parameter_names(func)
    if 0 <= pick < len(known) and known[pick] in kwargs:
        return known[pick]
    checks.raise_argnum_out_of_range(name, pick, len(args))


def matching(name: str, wrt: Wrt, places: Sequence[str]) -> list[int]:
    """The numbers of the leaves whose place matches a pattern."""
    checks.wrt(name, wrt)
    patterns = wrt if isinstance(wrt, tuple) else (str(wrt),)
    for pattern in patterns:
        if not any(_matches(place, pattern) for place in places):
            checks.raise_unmatched_wrt(name, pattern, places)
    return [i for i, place in enumerate(places) if any(_matches(place, pattern) for pattern in patterns)]


def _matches(place: str, pattern: str) -> bool:
    # torch.compile can trace an equality, and no pattern.
    return place == pattern if _WILDCARDS.isdisjoint(pattern) else fnmatchcase(place, pattern)


def refilled(
    leaves: Sequence[Any], positions: Sequence[int], values: Sequence[Any], lift: Lift | None
) -> list[Any]:
    """The leaves with ``values`` at these positions, every other tensor lifted."""
    filled = [leaf if lift is None else _lifted(leaf, lift) for leaf in leaves]
    for position, value in zip(positions, values, strict=True):
        filled[position] = value
    return filled


def spread(values: Sequence[Any], positions: Sequence[int], count: int) -> Sequence[Any]:
    """Values at their positions in a list of ``count``, None elsewhere."""
    if len(values) == count:
        return values
    filled: list[Any] = [None] * count
    for position, value in zip(positions, values, strict=True):
        filled[position] = value
    return filled


def _lifted(leaf: Any, lift: Lift) -> Any:
    return lift(leaf) if isinstance(leaf, Tensor) else leaf


def _lifted_tree(tree: Any, lift: Lift | None) -> Any:
    if lift is None or not tree:
        return tree
    leaves, spec = trees.flatten(tree)
    return trees.unflatten(spec, [_lifted(leaf, lift) for leaf in leaves])
