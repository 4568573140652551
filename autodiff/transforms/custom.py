"""Functions with custom derivatives, at every order and under every transform.

`Custom` lifts one custom_call of a function over trees; the two decorators say which rule there is, and how the
other mode follows from it. Builds on `core` alone.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any, Generic, NoReturn, TypeAlias, overload

import torch
from torch import Tensor

from autodiff._torch import traced_inline_only
from autodiff.core import randomness, trees
from autodiff.core.call import is_differentiable, spread, wraps
from autodiff.core.rules import Rules, attach, inplace_counts, is_tracked
from autodiff.core.seeds import generic_vector
from autodiff.core.specs import TensorSpec
from autodiff.core.transpose import LinearityCheck, transposed
from autodiff.core.trees import Spec
from autodiff.transforms import custom_checks
from autodiff.types import NondiffArgnums, P, R

Vectors: TypeAlias = Sequence[Tensor | None]
Linear: TypeAlias = Callable[[Sequence[Tensor]], Vectors]


@overload
def custom_vjp(func: Callable[P, R], nondiff_argnums: NondiffArgnums = ()) -> CustomVjp[P, R]: ...
@overload
def custom_vjp(
    func: None = None, nondiff_argnums: NondiffArgnums = ()
) -> Callable[[Callable[P, R]], CustomVjp[P, R]]: ...
def custom_vjp(func: Callable[..., Any] | None = None, nondiff_argnums: NondiffArgnums = ()) -> Any:
    r"""A function whose pullback is given by a rule, as in JAX.

    .. math:: \mathrm{bwd}(r, c) = c^\top \partial f(x), \quad (f(x), r) = \mathrm{fwd}(x)

    The decorated function gets its rules from ``defvjp(fwd, bwd)``. ``fwd(*args)`` returns the output and
    what the pullback needs of it, any tree. ``bwd(*nondiff, residuals, cotangent)`` returns a tuple with one
    tree for each differentiated argument, like that argument, with None for zero in place of a leaf or of a
    whole tree. Where no derivative is asked for, ``func`` itself runs.

    Forward mode transposes ``bwd``, which has to be linear in the cotangent then, and is checked. A second
    derivative differentiates ``bwd``, and runs ``fwd`` once more in order to differentiate the residuals.

    >>> import torch
    >>> import autodiff as ad
    >>> @custom_vjp
    ... def clipped(x, limit):
    ...     return x
    >>> clipped.defvjp(lambda x, limit: (x, limit), lambda limit, c: (c.clamp(-limit, limit), None))
    >>> ad.grad(lambda x: (3 * clipped(x, 1.0)).sum())(torch.zeros(2))
    tensor([1., 1.])

    Args:
        func: a function of trees that returns a tree. Arguments may be passed by keyword; rules get them
            by position, with the defaults filled in. Leaves that are no floating or complex tensors are static.
        nondiff_argnums: the arguments that are not differentiated, by position or name. They come first in
            ``bwd``, and ``fwd`` gets all arguments in their order.

    Returns:
        The function as a :class:`.CustomVjp`, with the method ``defvjp(fwd, bwd)``. Without ``func``, a decorator.

    Raises:
        RuleError: when it is called or differentiated: there is no rule yet; a rule returns another structure,
            shape or dtype, or is transposed and not linear; ``func`` writes in place to an argument that is
            differentiated, or reaches a differentiated tensor that is no argument, or one in ``nondiff_argnums``.
        ArgnumsError: ``nondiff_argnums`` names no parameter.

    The interface is that of ``jax.custom_vjp``.
    """
    return (
        partial(CustomVjp, nondiff_argnums=nondiff_argnums)
        if func is None
        else CustomVjp(func, nondiff_argnums)
    )


@overload
def custom_jvp(func: Callable[P, R], nondiff_argnums: NondiffArgnums = ()) -> CustomJvp[P, R]: ...
@overload
def custom_jvp(
    func: None = None, nondiff_argnums: NondiffArgnums = ()
) -> Callable[[Callable[P, R]], CustomJvp[P, R]]: ...
def custom_jvp(func: Callable[..., Any] | None = None, nondiff_argnums: NondiffArgnums = ()) -> Any:
    r"""A function whose pushforward is given by a rule, as in JAX.

    .. math:: \mathrm{rule}(x, t) = (f(x),\; \partial f(x)\, t)

    The decorated function gets its rule from ``defjvp(rule)``, also usable as a decorator.
    ``rule(*nondiff, primals, tangents)`` takes two tuples with a tree for each differentiated argument, and
    returns the output and its tangent, a tree like the output with None for zero. The rule has to be linear in
    the tangents: reverse mode transposes and checks it.

    >>> import torch
    >>> import autodiff as ad
    >>> @custom_jvp
    ... def log1pexp(x):
    ...     return torch.log(1 + torch.exp(x))
    >>> @log1pexp.defjvp
    ... def rule(primals, tangents):
    ...     (x,), (t,) = primals, tangents
    ...     return log1pexp(x), (1 - 1 / (1 + torch.exp(x))) * t
    >>> ad.grad(log1pexp)(torch.tensor(100.0))
    tensor(1.)

    Args:
        func: a function of trees that returns a tree. Arguments may be passed by keyword; rules get them
            by position, with the defaults filled in. Leaves that are no floating or complex tensors are static.
        nondiff_argnums: the arguments that are not differentiated, by position or name. They come first in the rule.

    Returns:
        The function as a :class:`.CustomJvp`, with the methods ``defjvp(rule)`` and ``defjvps(*rules)``: one rule for
        each argument, ``rule(tangent, output, *args)``, or None for one that the output does not depend on. Without
        ``func``, a decorator.

    Raises:
        RuleError: when it is called or differentiated: there is no rule yet; a rule returns another structure,
            shape or dtype, or is transposed and not linear; ``func`` writes in place to an argument that is
            differentiated, or reaches a differentiated tensor that is no argument, or one in ``nondiff_argnums``.
        ArgnumsError: ``nondiff_argnums`` names no parameter.

    The interface is that of ``jax.custom_jvp``.
    """
    return (
        partial(CustomJvp, nondiff_argnums=nondiff_argnums)
        if func is None
        else CustomJvp(func, nondiff_argnums)
    )


class Custom(ABC, Generic[P, R]):
    """What the two have in common: one call, its arguments as tensors, and the check of what a rule gives."""

    name: str

    def __init__(self, func: Callable[P, R], nondiff_argnums: NondiffArgnums = ()) -> None:
        wraps(func)(self)
        self.func: Callable[..., R] = func
        self.shown = getattr(func, "__name__", type(func).__name__)
        try:
            self._signature: inspect.Signature | None = inspect.signature(func)
        except (TypeError, ValueError):
            self._signature = None
        parameters = {} if self._signature is None else self._signature.parameters
        more = self._signature is None or any(one.kind is one.VAR_POSITIONAL for one in parameters.values())
        self._was_linear = False
        self.nondiff = custom_checks.nondiff_argnums(self.name, nondiff_argnums, list(parameters), more=more)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """As a method: the instance is the first argument, a static one."""
        return self if instance is None else MethodType(self, instance)

    @traced_inline_only
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function's value, which knows its derivatives."""
        custom_checks.untraced_call(self.name, self.shown)
        custom_call = CustomCall(self, self._positional(args, kwargs))
        if not any(map(is_tracked, custom_call.saved)):
            return self.func(*custom_call.args)
        custom_call.refuse_tracked_nondiff()
        return self._differentiated(custom_call)

    @abstractmethod
    def _differentiated(self, custom_call: CustomCall) -> R:
        """The output, tied to the arguments by the rule."""

    def transposed(self, rule: Linear, point: Sequence[Tensor]) -> Callable[[Vectors], Vectors]:
        """The transpose of a rule, checked the first time in any case: Python's branches leave no trace in a graph."""

        def refuse() -> NoReturn:
            self._was_linear = False
            custom_checks.raise_nonlinear_rule(self.name, self.shown)

        check = LinearityCheck(refuse, unless_shown=self._was_linear)
        self._was_linear = True
        return transposed(rule, point, check)

    def _positional(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        if self._signature is None:
            if kwargs:
                custom_checks.raise_keyword_arguments(self.name, self.shown, list(kwargs))
            return args
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if bound.kwargs:
            custom_checks.raise_keyword_arguments(self.name, self.shown, list(bound.kwargs))
        return bound.args


class CustomCall:
    """One call of a custom function. ``saved``: all tensors among its arguments, the differentiated ones first."""

    def __init__(self, custom: Custom[..., Any], args: tuple[Any, ...]) -> None:
        self.custom, self.args = custom, args
        picked = [i for i in range(len(args)) if i not in custom.nondiff]
        self._order = [*picked, *sorted(set(range(len(args))) - set(picked))]
        self.count = len(picked)
        leaves, self._spec = trees.flatten(tuple(args[i] for i in picked))
        others, self._nondiff_spec = trees.flatten(tuple(args[i] for i in self._order[self.count :]))
        self._leaves, self._nondiff_start = [*leaves, *others], len(leaves)
        is_saved = [is_differentiable(leaf) for leaf in leaves] + [False] * len(others)
        self.where = [i for i, one in enumerate(is_saved) if one]
        self._constant = [
            i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor) and not is_saved[i]
        ]
        self.saved: list[Tensor] = [self._leaves[i] for i in (*self.where, *self._constant)]

    def parts(self, saved: Sequence[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The arguments that are not differentiated, and those that are, with these tensors."""
        leaves = list(self._leaves)
        for position, tensor in zip((*self.where, *self._constant), saved, strict=True):
            leaves[position] = tensor
        differentiated = trees.unflatten(self._spec, leaves[: self._nondiff_start])
        return trees.unflatten(self._nondiff_spec, leaves[self._nondiff_start :]), differentiated

    def all_args(self, saved: Sequence[Tensor]) -> tuple[Any, ...]:
        """All arguments in their order, with these tensors."""
        nondiff, differentiated = self.parts(saved)
        args: list[Any] = [None] * len(self.args)
        for position, value in zip(self._order, (*differentiated, *nondiff), strict=True):
            args[position] = value
        return tuple(args)

    def evaluate(self, func: Callable[..., Any]) -> Any:
        """``func`` of the arguments as constants."""
        constants = [tensor.detach() for tensor in self.saved]
        before = inplace_counts(constants[: len(self.where)])
        result = func(*self.all_args(constants))
        if before != inplace_counts(constants[: len(self.where)]):
            custom_checks.raise_argument_written(self.custom.name, self.custom.shown)
        return result

    def tangents(self, saved: Sequence[Tensor], vectors: Vectors) -> tuple[Any, ...]:
        """A tree of tangents for each differentiated argument: zeros for None, None where nothing is to be."""
        pairs = zip(vectors[: len(self.where)], saved, strict=False)
        filled = [torch.zeros_like(like) if vector is None else vector for vector, like in pairs]
        tangents: tuple[Any, ...] = trees.unflatten(
            self._spec, spread(filled, self.where, self._nondiff_start)
        )
        return tangents

    def cotangents(self, tree: Any) -> list[Tensor | None]:
        """What a rule gave for the differentiated arguments, as one cotangent for each of ``saved``."""
        if not isinstance(tree, tuple) or len(tree) != self.count:
            custom_checks.raise_wrong_cotangent_count(self.custom.name, self.custom.shown, tree, self.count)
        leaves = _like(self.custom, "cotangent", tree, self._spec, "args")
        pairs = [(leaves[i], self._leaves[i], i) for i in self.where]
        return [
            _vector(self.custom, "cotangent", value, tensor, self._spec, i) for value, tensor, i in pairs
        ] + [None] * len(self._constant)

    def refuse_tracked_nondiff(self) -> None:
        """An argument that is not differentiated must not carry a derivative."""
        for position in self._constant:
            if is_tracked(self._leaves[position]):
                path = trees.paths(self._nondiff_spec, "nondiff")[position - self._nondiff_start]
                custom_checks.raise_differentiated_nondiff(self.custom.name, self.custom.shown, path)


class Output:
    """An output as leaves, those that are differentiated apart."""

    def __init__(self, custom: Custom[..., Any], tree: Any) -> None:
        self._custom = custom
        self.leaves, self.spec = trees.flatten(tree)
        self.where = [i for i, leaf in enumerate(self.leaves) if is_differentiable(leaf)]
        if any(is_tracked(leaf) for leaf in self.leaves if isinstance(leaf, Tensor)):
            custom_checks.raise_captured_tensor(custom.name, custom.shown)
        self.specs = [TensorSpec.of(self.leaves[i]) for i in self.where]

    def cotangent(self, vectors: Vectors) -> Any:
        """A tree like the output: zeros for None, None where the output is not differentiated."""
        pairs = zip(vectors, self.specs, strict=True)
        filled = [spec.full(0.0) if vector is None else vector for vector, spec in pairs]
        return trees.unflatten(self.spec, spread(filled, self.where, self.spec.num_leaves))

    def tangents(self, tree: Any) -> list[Tensor | None]:
        """What a rule gave for the output, as one tangent for each differentiated leaf."""
        leaves = _like(self._custom, "tangent", tree, self.spec, "output")
        pairs = zip(self.where, self.specs, strict=True)
        return [_vector(self._custom, "tangent", leaves[i], spec, self.spec, i) for i, spec in pairs]

    def tied(self, rules: Rules, saved: Sequence[Tensor]) -> Any:
        """The output, differentiated by the rules, which have no need of its values."""
        leaves, self.leaves = self.leaves, []
        return trees.unflatten(self.spec, attach(rules, leaves, saved))


def _like(custom: Custom[..., Any], kind: str, tree: Any, spec: Spec, root: str) -> list[Any]:
    values = trees.broadcast(tree, spec)
    if values is None or any(value is not None and not exact for value, exact in values):
        custom_checks.raise_wrong_rule_structure(
            custom.name, custom.shown, kind, trees.structure(tree), spec, root
        )
    return [value for value, _ in values]


def _vector(
    custom: Custom[..., Any], kind: str, value: Any, like: Tensor | TensorSpec, spec: Spec, position: int
) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
        path = trees.paths(spec, "args" if kind == "cotangent" else "output")[position]
        custom_checks.raise_wrong_rule_leaf(custom.name, custom.shown, kind, path, value, like)
    return value


class CustomVjp(Custom[P, R]):
    """A function with a pullback of its own, which :func:`autodiff.custom_vjp` returns."""

    name = "custom_vjp"

    def __init__(self, func: Callable[P, R], nondiff_argnums: NondiffArgnums = ()) -> None:
        super().__init__(func, nondiff_argnums)
        self.fwd: Callable[..., Any] | None = None
        self.bwd: Callable[..., Any] | None = None

    def defvjp(self, fwd: Callable[..., tuple[R, Any]], bwd: Callable[..., tuple[Any, ...]]) -> None:
        """Set the rules: ``fwd(*args) -> (output, residuals)``, ``bwd(*nondiff, residuals, cotangent)``."""
        self.fwd, self.bwd = fwd, bwd

    def _differentiated(self, custom_call: CustomCall) -> Any:
        if self.fwd is None or self.bwd is None:
            custom_checks.raise_no_rule(self.name, self.shown, "defvjp(fwd, bwd)")
        state = randomness.random_state()
        pair = custom_call.evaluate(self.fwd)
        custom_checks.rule_result_pair(self.name, self.shown, "fwd", "(output, residuals)", pair)
        output, residuals = Output(self, pair[0]), trees.flatten(pair[1])
        rules = _ByPullback(self, custom_call, output, residuals, state)
        return output.tied(rules, [*custom_call.saved, *rules.residuals])


class _ByPullback(Rules):
    def __init__(
        self,
        custom: CustomVjp[..., Any],
        custom_call: CustomCall,
        output: Output,
        residuals: tuple[list[Any], Spec],
        state: dict[str, Tensor],
    ) -> None:
        self._custom, self._custom_call, self._output, self._state = custom, custom_call, output, state
        self._leaves, self._spec = residuals
        self._where = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.residuals: list[Tensor] = [self._leaves[i].detach() for i in self._where]

    def user_code(self) -> Sequence[Any]:
        return self._custom.fwd, self._custom.bwd

    def pull(self, saved: Sequence[Tensor], cotangents: Vectors, wanted: Sequence[bool]) -> Vectors:
        del wanted  # JAX's rules give all
        assert self._custom.bwd is not None
        count = len(self._custom_call.saved)
        primals, tensors = saved[:count], saved[count:]
        nondiff, _ = self._custom_call.parts(primals)
        leaves = list(self._leaves)
        for position, tensor in zip(self._where, tensors, strict=True):
            leaves[position] = tensor
        residuals = trees.unflatten(self._spec, leaves)
        if any(map(is_tracked, primals)):
            # The residuals of the first run are constants. Somebody differentiates the pullback.
            with randomness.random_numbers_from(self._state):
                _, residuals = self._custom.fwd(*self._custom_call.all_args(primals))  # type: ignore[misc]
        pulled = self._custom.bwd(*nondiff, residuals, self._output.cotangent(cotangents))
        return [*self._custom_call.cotangents(pulled), *[None] * len(tensors)]

    def push(self, saved: Sequence[Tensor], tangents: Vectors) -> Vectors:
        pull = partial(self.pull, saved, wanted=[True] * len(saved))
        point = [generic_vector(spec) for spec in self._output.specs]
        return self._custom.transposed(pull, point)(tangents)


class CustomJvp(Custom[P, R]):
    """A function with a pushforward of its own, which :func:`autodiff.custom_jvp` returns."""

    name = "custom_jvp"

    def __init__(self, func: Callable[P, R], nondiff_argnums: NondiffArgnums = ()) -> None:
        super().__init__(func, nondiff_argnums)
        self.rule: Callable[..., Any] | None = None

    def defjvp(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Set the rule: ``rule(*nondiff, primals, tangents) -> (output, tangent)``; returns it."""
        self.rule = rule
        return rule

    def defjvps(self, *rules: Callable[..., Any] | None) -> None:
        """Set a rule for each argument, ``rule(tangent, output, *args)``; the tangents are added."""
        custom_checks.no_nondiff_argnums(self.name, self.shown, self.nondiff)

        def rule(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
            output = self(*primals)  # type: ignore[call-arg]  # the parameters are func's
            of_output, spec = trees.flatten(output)
            total: list[Any] = [None] * len(of_output)
            for one, tangent in zip(rules, tangents, strict=True):
                if one is not None:
                    moved = _like(self, "tangent", one(tangent, output, *primals), spec, "output")
                    pairs = zip(total, moved, strict=True)
                    total = [b if a is None else a if b is None else a + b for a, b in pairs]
            return output, trees.unflatten(spec, total)

        self.rule = rule

    def _differentiated(self, custom_call: CustomCall) -> Any:
        if self.rule is None:
            custom_checks.raise_no_rule(self.name, self.shown, "defjvp(rule)")
        output = Output(self, custom_call.evaluate(self.func))
        return output.tied(_ByPushforward(self, custom_call, output), custom_call.saved)


class _ByPushforward(Rules):
    def __init__(self, custom: CustomJvp[..., Any], custom_call: CustomCall, output: Output) -> None:
        self._custom, self._custom_call, self._output = custom, custom_call, output

    def user_code(self) -> Sequence[Any]:
        return (self._custom.rule,)

    def push(self, saved: Sequence[Tensor], tangents: Vectors) -> Vectors:
        assert self._custom.rule is not None
        nondiff, primals = self._custom_call.parts(saved)
        pair = self._custom.rule(*nondiff, primals, self._custom_call.tangents(saved, tangents))
        name = self._custom.name, self._custom.shown
        custom_checks.rule_result_pair(*name, "jvp rule", "(output, tangent)", pair)
        return self._output.tangents(pair[1])

    def pull(self, saved: Sequence[Tensor], cotangents: Vectors, wanted: Sequence[bool]) -> Vectors:
        del wanted  # a rule for tangents is transposed as a whole
        count = len(self._custom_call.where)
        point = [generic_vector(tensor) for tensor in saved[:count]]
        pulled = self._custom.transposed(partial(self.push, saved), point)(cotangents)
        return [*pulled, *[None] * (len(saved) - count)]
