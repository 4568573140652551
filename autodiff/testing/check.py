"""Derivatives checked against finite differences. Builds on `jvp` and `vjp`.

Provides `check_grads`, `check_jvp` and `check_vjp`, after JAX's ``jax.test_util``. Derivatives are only compared with
differences of values; nothing here differentiates to find the expected number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf, isfinite
from typing import Any, assert_never

import torch
from torch import Tensor

from autodiff import checks
from autodiff.core import trees
from autodiff.errors import DerivativeError, OutputError
from autodiff.testing.differences import (
    Point,
    copied,
    double,
    in_double,
    naming,
    point_at,
    same_random_numbers,
)
from autodiff.transforms.jvp import jvp
from autodiff.transforms.vjp import vjp
from autodiff.types import CheckMode

__all__ = ["check_grads", "check_jvp", "check_vjp"]


def check_grads(
    f: Callable[..., Any],
    args: tuple[Any, ...],
    order: int = 2,
    modes: CheckMode | Sequence[CheckMode] = ("fwd", "rev"),
    *,
    kwargs: Mapping[str, Any] | None = None,
    has_aux: bool = False,
    atol: float | None = None,
    rtol: float | None = None,
    eps: float | None = None,
    seed: int = 0,
) -> None:
    r"""Check that a function's derivatives, up to an order and in both modes, are those of its values.

    .. math:: J_f(x)\, t \approx \frac{8\,(f(x + \epsilon t) - f(x - \epsilon t))
        - (f(x + 2 \epsilon t) - f(x - 2 \epsilon t))}{12\, \epsilon}

    >>> import torch
    >>> check_grads(lambda p: p["a"].sin() * p["b"], ({"a": torch.ones(3), "b": torch.tensor(2.0)},))

    A backward that is wrong by a factor of 2, in one of two leaves:

    >>> class Product(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(ctx, x, y):
    ...         ctx.save_for_backward(x, y)
    ...         return x * y
    ...
    ...     @staticmethod
    ...     def backward(ctx, cotangent):
    ...         x, y = ctx.saved_tensors
    ...         return cotangent * y, cotangent * 2 * x
    >>> def f(p):
    ...     return {"loss": Product.apply(p["w"], p["b"]).sum()}
    >>> p = {"w": torch.ones(3), "b": torch.ones(3)}
    >>> check_grads(f, (p,), modes="rev")  # doctest: +NORMALIZE_WHITESPACE
    Traceback (most recent call last):
        ...
    autodiff.errors.DerivativeError: check_grads: the derivative of output['loss'] with respect to args[0]['b'], by
    vjp of f (order 1, mode 'rev'), is expected to be ..., the finite difference along a random direction, within
    ..., but is .... Correct the rule of an operation (a custom Function, a detach) that is used there. ...

    The error has the leaves and the numbers too:

    >>> try:
    ...     check_grads(f, (p,), modes="rev")
    ... except AssertionError as error:
    ...     print(error.input, round(error.derivative / error.finite_difference, 6))
    args[0]['b'] 2.0

    Args:
        f: a function of one or more trees that returns a tree of floating or complex tensors. It runs many times.
        args: a tuple of its positional arguments, each any tree. Floating and complex leaves are
            differentiated; others pass through.
        order: derivatives up to this order are checked, mixed ones of both modes too. Order 2 checks each
            first derivative along a direction, as a function of the arguments and of the direction.
        modes: ``"fwd"`` (:func:`autodiff.jvp`), ``"rev"`` (:func:`autodiff.vjp`) or both.
        kwargs: ``f``'s keyword arguments, any trees; not differentiated.
        has_aux: whether ``f`` returns ``(output, aux)``.
        atol: the absolute tolerance between the two numbers; by default 1e-9, and 1e-5 for a function that
            computes in float32.
        rtol: the tolerance relative to the finite difference; by default 1e-6, and 1e-3 in float32.
        eps: the step of the finite difference, as a multiple of each number (of 0.01 and 10 for smaller and larger
            ones); by default 2**-17, and 2**-7 in float32. The truncation error grows with its fourth
            power, and rounding with its inverse: for a tight ``rtol``, such as 1e-11, pass 1e-3.
        seed: of the directions, which do not depend on torch's own random state.

    Raises:
        DerivativeError: a derivative and its finite difference disagree, or one is not finite. The
            message names the leaf, and gives the two numbers.
        OutputError: the output is empty, or has leaves that are not floating-point or complex tensors.
        LeafError: ``args`` hold no floating or complex tensor.
        OptionError: an option has a value that is not allowed.

    **float64.** Arguments of lower precision are converted, and ``f`` runs in float64. What it captures is not
    converted: check a module as ``module.double()``, or pass its parameters in ``args``. A function that has to
    compute in float32 can be checked as ``lambda x: f(x.float())``; its output's dtype then decides the tolerances.

    Each leaf is perturbed alone, along a random direction, so that a leaf with small derivatives does not hide
    behind one with large ones. ``f`` sees the same random numbers in each run, and leaves torch's random state as
    one run does. For complex leaves the derivative is the real-linear one, as in ``torch.autograd``, so
    that ``f`` need not be holomorphic.

    Where ``f`` has a kink, as ``relu`` at 0, there is no derivative to compare with. What differs from the derivative
    on purpose, such as ``detach`` or a straight-through estimator, fails. So does a mode combination in which torch
    itself is wrong, such as ``"fwd"`` of ``"fwd"`` of an autograd Function's ``jvp``: leave it out of ``modes``.

    Source: after ``jax.test_util.check_grads``, which perturbs all leaves at once, along one direction.
    """
    checks.positive_int("check_grads", "order", order, "Order 1 checks first derivatives.")
    picked = (modes,) if isinstance(modes, str) else tuple(modes)
    for mode in picked or [picked]:
        checks.choice("check_grads", "modes", mode, ("fwd", "rev"))
    with same_random_numbers() as again:
        func = partial(again(f), **in_double(dict(kwargs or {})))
        _check_orders(point_at("check_grads", func, args, has_aux, (atol, rtol, eps), seed), order, picked)


def check_jvp(
    f: Callable[..., Any],
    f_jvp: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    has_aux: bool = False,
    atol: float | None = None,
    rtol: float | None = None,
    eps: float | None = None,
    seed: int = 0,
) -> None:
    """Check a custom Jacobian-vector product against finite differences.

    >>> import torch
    >>> x = torch.tensor([1.0, 2.0])
    >>> check_jvp(torch.sin, lambda primals, tangents: (primals[0].sin(), primals[0].cos() * tangents[0]), (x,))
    >>> check_jvp(torch.sin, lambda primals, tangents: (primals[0].sin(), tangents[0]), (x,))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    autodiff.errors.DerivativeError: check_jvp: the derivative of output...

    Args:
        f: a function of trees that returns a tree of floating or complex tensors.
        f_jvp: takes ``(primals, tangents)``, two tuples like ``args`` (tangents hold None where a leaf is
            not differentiated), and returns ``(output, tangents_out)``, and more if ``has_aux``; both like
            ``f``'s output. None for a tangent stands for zero.
        args: a tuple of ``f``'s positional arguments, each any tree.
        has_aux: whether ``f`` returns ``(output, aux)``, and ``f_jvp`` a triple.
        atol: the absolute tolerance; by default 1e-9, and 1e-5 for a function that computes in float32.
        rtol: the tolerance relative to the finite difference; by default 1e-6, and 1e-3 in float32.
        eps: the relative step of the finite difference; by default 2**-17, and 2**-7 in float32.
        seed: of the directions, which do not depend on torch's own random state.

    Raises:
        DerivativeError: a tangent and its finite difference disagree, one is not finite, or ``f_jvp``'s
            output is not ``f``'s.
        StructureError, ShapeError, DtypeError: what ``f_jvp`` returns is not like ``f``'s output.
        OutputError: the output is empty, or has leaves that are not floating-point or complex tensors.
        LeafError: ``args`` hold no floating or complex tensor.
    """
    with same_random_numbers() as again:
        point = point_at("check_jvp", again(f), args, has_aux, (atol, rtol, eps), seed)
        _compare_jvp(point, again(f_jvp), "f_jvp")


def check_vjp(
    f: Callable[..., Any],
    f_vjp: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    has_aux: bool = False,
    atol: float | None = None,
    rtol: float | None = None,
    eps: float | None = None,
    seed: int = 0,
) -> None:
    """Check a custom vector-Jacobian product against finite differences.

    >>> import torch
    >>> x = torch.tensor([1.0, 2.0])
    >>> check_vjp(torch.sin, lambda x: (x.sin(), lambda cotangent: (cotangent * x.cos(),)), (x,))
    >>> check_vjp(torch.sin, lambda x: (x.sin(), lambda cotangent: (cotangent,)), (x,))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    autodiff.errors.DerivativeError: check_vjp: the derivative of output...

    Args:
        f: a function of trees that returns a tree of floating or complex tensors.
        f_vjp: takes ``*args`` and returns ``(output, pullback)``, and more if ``has_aux``. ``pullback(cotangents)``
            takes a tree like the output, and returns a tuple like ``args``. None for a cotangent stands for zero.
        args: a tuple of ``f``'s positional arguments, each any tree.
        has_aux: whether ``f`` returns ``(output, aux)``, and ``f_vjp`` a triple.
        atol: the absolute tolerance; by default 1e-9, and 1e-5 for a function that computes in float32.
        rtol: the tolerance relative to the finite difference; by default 1e-6, and 1e-3 in float32.
        eps: the relative step of the finite difference; by default 2**-17, and 2**-7 in float32.
        seed: of the directions, which do not depend on torch's own random state.

    Raises:
        DerivativeError: a cotangent and its finite difference disagree, one is not finite, or ``f_vjp``'s
            output is not ``f``'s.
        StructureError, ShapeError, DtypeError: what ``f_vjp`` returns is not like ``f``'s output, or what the
            pullback returns is not like ``args``.
        OutputError: the output is empty, or has leaves that are not floating-point or complex tensors.
        LeafError: ``args`` hold no floating or complex tensor.
    """
    with same_random_numbers() as again:
        point = point_at("check_vjp", again(f), args, has_aux, (atol, rtol, eps), seed)
        _compare_vjp(point, again(f_vjp), "f_vjp")


# Orders.


def _check_orders(point: Point, order: int, modes: Sequence[CheckMode]) -> None:
    """All modes at this order, then the product of each mode as a function of its own."""
    for mode in modes:
        match mode:
            case "fwd":
                transform = partial(jvp, point.func, has_aux=point.has_aux)
                _compare_jvp(point, transform, f"jvp of {point.named}")
            case "rev":
                transform = partial(vjp, point.func, has_aux=point.has_aux)
                _compare_vjp(point, transform, f"vjp of {point.named}")
            case _:
                assert_never(mode)
    if order > 1:
        for mode in modes:
            _check_orders(_pushforward(point) if mode == "fwd" else _pullback(point), order - 1, modes)


def _pushforward(point: Point) -> Point:
    """The jvp as a function of primals and tangents."""
    count = len(point.args)

    def pushforward(*inputs: Any) -> Any:
        return jvp(point.func, inputs[:count], inputs[count:], has_aux=point.has_aux)[1]

    tangents = point.call.like_arguments([point.options.random_like(primal) for primal in point.primals])
    return point.next("jvp", pushforward, tangents, [f"the tangent of {path}" for path in point.outputs])


def _pullback(point: Point) -> Point:
    """The vjp as a function of primals and cotangents."""
    count = len(point.args)

    def pullback(*inputs: Any) -> Any:
        return vjp(point.func, *inputs[:count], has_aux=point.has_aux)[1](inputs[count])

    cotangents = point.call.like_output([point.options.random_like(value) for value in point.values])
    return point.next("vjp", pullback, (cotangents,), [f"the cotangent of {path}" for path in point.inputs])


# The two modes.


def _compare_jvp(point: Point, f_jvp: Callable[..., Any], named: str) -> None:
    """Push each direction alone, then all of them at once."""
    call, name = point.call, point.options.name
    for perturbed, where in _each_and_all(point.inputs, "all inputs"):
        directions = [d if i in perturbed else torch.zeros_like(d) for i, d in enumerate(point.directions)]
        with naming(name, named):
            result = f_jvp(*copied((point.args, call.like_arguments(directions))))
        output, pushed = _pair(name, named, result, "(output, tangents_out)")
        _same_value(point, output, named)
        tangents = _matched(name, "tangents_out", pushed, call.like_output(point.values), "output")
        for j, tangent in enumerate(tangents):
            value, rounding = point.finite_difference(perturbed, j)
            tolerance = point.atol + point.rtol * value.abs() + rounding
            _compare(point, "fwd", named, point.outputs[j], where, tangent, value, tolerance)


def _compare_vjp(point: Point, f_vjp: Callable[..., Any], named: str) -> None:
    """Pull a random cotangent of each output alone, then of all of them at once."""
    call, name = point.call, point.options.name
    with naming(name, named):
        result = f_vjp(*copied(point.args))
    output, pullback = _pair(name, named, result, "(output, pullback)")
    _same_value(point, output, named)
    drawn = [point.options.random_like(value) for value in point.values]
    for pulled_from, where in _each_and_all(point.outputs, "all outputs"):
        seeds = [c if j in pulled_from else torch.zeros_like(c) for j, c in enumerate(drawn)]
        with naming(name, named):
            pulled = pullback(copied(call.like_output(seeds)))
        cotangents = _matched(name, "cotangents", pulled, call.like_arguments(point.primals), "args")
        for i, cotangent in enumerate(cotangents):
            # Over the real numbers <cotangent of the input, direction> = <cotangent of the output, difference>.
            pairs = [(drawn[j], *point.finite_difference([i], j)) for j in pulled_from]
            terms = torch.cat([_terms(seed, value) for seed, value, _ in pairs])
            rounding = torch.cat([_terms(seed.abs(), rounding) for seed, _, rounding in pairs])
            # The errors of single terms are independent: their squares add up.
            slack = (point.rtol * terms.abs() + rounding).norm()
            tolerance = point.atol + point.rtol * terms.sum().abs() + slack
            derivative = _terms(cotangent, point.directions[i]).sum()
            _compare(point, "rev", named, where, point.inputs[i], derivative, terms.sum(), tolerance)


def _pair(name: str, named: str, result: Any, expected: str) -> tuple[Any, Any]:
    """The first two of what a product returns; the third, if any, is aux."""
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        came = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
        raise OutputError(
            f"{name}: {named} is expected to return {expected}, got {came}. Return f's output, too."
        )
    return result[0], result[1]


def _each_and_all(names: Sequence[str], together: str) -> list[tuple[Sequence[int], str]]:
    """The positions one by one, and all of them where there are several: a wrong rule need not be linear."""
    alone: list[tuple[Sequence[int], str]] = [((i,), name) for i, name in enumerate(names)]
    return alone if len(names) == 1 else [*alone, (range(len(names)), together)]


def _terms(one: Tensor, other: Tensor) -> Tensor:
    """The terms of the real inner product."""
    return torch.real(one.detach().conj().to(double(one)) * other).flatten()


def _matched(name: str, kind: str, tree: Any, model: Any, reference: str) -> list[Tensor]:
    """The leaves of ``tree`` where ``model`` holds tensors, checked against these; None stands for zeros."""
    models, spec = trees.flatten(model)
    leaves = checks.matching_structure(name, kind, spec, tree, reference)
    paths = zip(trees.paths(spec, kind), trees.paths(spec, reference), strict=True)
    found = []
    for like, leaf, (path, home) in zip(models, leaves, paths, strict=True):
        if like is not None:
            found.append(torch.zeros_like(like) if leaf is None else leaf)
            checks.matching_leaf(
                name, "cotangent" if kind == "cotangents" else "tangent", path, found[-1], home, like
            )
    return found


# Errors where numbers differ.


def _compare(
    point: Point,
    mode: CheckMode,
    named: str,
    whose: str,
    by: str,
    derivative: Tensor,
    difference: Tensor,
    tolerance: Tensor,
) -> None:
    """Raise for the element that is furthest out of tolerance."""
    element = _furthest(derivative, difference, tolerance)
    if element is None:
        return
    came, expected, within = (every[element].item() for every in (derivative, difference, tolerance))
    if not isfinite(abs(expected)):
        way_out = "f is not finite around args: pass others, or a smaller eps."
    elif not isfinite(abs(came)):
        way_out = (
            "A rule divides by zero there, or multiplies zero and infinity: correct it, or pass other args."
        )
    else:
        way_out = (
            f"Correct the rule of an operation (a custom Function, a detach) that is used there. If f has a kink "
            f"within eps={point.eps:.2g} of args, pass others; if it is rough (float32 inside), pass eps, rtol or atol."
        )
    raise DerivativeError(
        f"{point.options.name}: the derivative of {whose}{_at(element)} with respect to {by}, by {named} "
        f"(order {point.order}, mode {mode!r}), is expected to be {expected:.9g}, the finite difference along a "
        f"random direction, within {within:.1e}, but is {came:.9g}. {way_out}",
        derivative=came,
        finite_difference=expected,
        mode=mode,
        order=point.order,
        output=whose,
        input=by,
    )


def _furthest(came: Tensor, expected: Tensor, tolerance: Tensor) -> tuple[int, ...] | None:
    """The element that is furthest out of tolerance, None where none is. NaN is furthest."""
    excess = ((came.detach() - expected).abs() - tolerance).nan_to_num(nan=inf)
    if (excess <= 0).all():
        return None
    return tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))


def _at(element: tuple[int, ...]) -> str:
    return f" at {list(element)}" if element else ""


def _same_value(point: Point, output: Any, named: str) -> None:
    """The value that a product returns besides the derivative is the function's."""
    values = _matched(point.options.name, "value", output, point.call.like_output(point.values), "output")
    for path, came, expected in zip(point.outputs, values, point.values, strict=True):
        element = _furthest(came, expected, point.atol + point.rtol * expected.abs())
        if element is not None:
            raise DerivativeError(
                f"{point.options.name}: {path}{_at(element)}, as {named} gives it, is expected to be f's own "
                f"{expected[element].item():.9g}, but is {came[element].item():.9g}. Return the value of f, and draw "
                f"random numbers by torch's default generators, which are rewound.",
                output=path,
            )
