"""Floor 1: operations that torch differentiates wrongly in forward mode, or not at all, done right.

Hands on `corrected`, inside which such an operation goes by its pullback, which is right: forward mode is
the pullback of the pullback. Builds on `tape` and `operation`.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from autodiff import _torch, checks
from autodiff.core import trees
from autodiff.core.call import is_differentiable, spread
from autodiff.core.reverse import transpose
from autodiff.core.rules import Rules, is_watched, operate, record_anew
from autodiff.errors import ForwardRuleError
from autodiff.torch_fixes import formulas

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autodiff.core.rules import Flat

# torch 2.13 in forward mode: the rule for products gives zeros, the one for a triangle takes the other half.
_ALWAYS: frozenset[Any] = frozenset({Tensor.triangular_solve, torch.triangular_solve})
_SCATTERED: frozenset[Any] = frozenset({Tensor.scatter_reduce, torch.scatter_reduce})
# Wrong over forward mode, in batches of batches, or, the losses, without a rule over reverse mode: tests/ops knows.
_NESTED: frozenset[Any] = frozenset(
    {
        *(Tensor.det, torch.det, torch.linalg.det),
        *(Tensor.slogdet, torch.slogdet, torch.linalg.slogdet),
        *(Tensor.logdet, torch.logdet),
        *(torch.linalg.solve, torch.linalg.solve_ex, torch.linalg.tensorsolve),
        *(Tensor.cholesky_inverse, torch.cholesky_inverse),
        *(Tensor.orgqr, torch.orgqr, torch.linalg.householder_product),
        *(torch.linalg.eig, torch.linalg.eigvals),
        *(Tensor.cumprod, torch.cumprod),
        *(functional.mse_loss, functional.huber_loss, functional.glu),
    }
)
_IN_PLACE: dict[Any, Any] = {Tensor.scatter_reduce_: Tensor.scatter_reduce, Tensor.cumprod_: Tensor.cumprod}
_OVERLOAD, _PACKET = _OPERATORS = type(torch.ops.aten.sin.default), type(torch.ops.aten.sin)
_TORCHS_OWN = ("aten", "prims", "prim", "higher_order")
_NO_RULE = "forward AD"
_WAY_OUT = (
    "has no right rule for forward mode in torch. The derivative of its pullback serves instead, and has failed. Take "
    "reverse mode: grad, vjp or jacrev."
)


class corrected(TorchFunctionMode):  # noqa: N801  used like a function
    """Sees every operation that a function calls: 0.9 us for each, next to 3 for the operation in forward mode."""

    def __enter__(self) -> Self:
        # Inside itself it would see every operation twice.
        self._entered = type(_torch.function_mode()) is not type(self)
        return super().__enter__() if self._entered else self

    def __exit__(self, *exc: object) -> None:
        if self._entered:
            super().__exit__(*exc)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            if func in _KNOWN or type(func) in _OPERATORS:
                return _known(func, args, kwargs or {})
            return func(*args, **kwargs) if kwargs else func(*args)
        except NotImplementedError as error:
            if _NO_RULE not in str(error) or str(getattr(func, "__name__", "")).endswith("_"):
                raise
            try:
                return _by_pullback(func, args, kwargs or {})
            except (RuntimeError, NotImplementedError):
                raise error from None


# By chunks it is made of an operator of torch.library's. New in torch 2.13.
_CHUNKED = getattr(functional, "linear_cross_entropy", None)
_KNOWN = frozenset(
    {*_ALWAYS, *_SCATTERED, *_NESTED, *_IN_PLACE, *formulas.ALWAYS, *formulas.NESTED}
    | {_CHUNKED, _torch.CUSTOM_FUNCTION_CALL}
)


def _known(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is wrong somewhere, some for some arguments only, and all that torch.library made."""
    if func is _torch.CUSTOM_FUNCTION_CALL:
        return func(_nesting(args[0]), *args[1:], **kwargs)
    if func in _IN_PLACE:
        return args[0].copy_(_known(_IN_PLACE[func], args, kwargs))
    nested = _torch.is_nested()
    wrong = func in _ALWAYS or (nested and func in _NESTED) or _is_custom(func)
    if func in _SCATTERED:
        wrong = "prod" in (*args[4:], kwargs.get("reduce"))
    if func is _CHUNKED:
        wrong = kwargs.get("options") is not None
    if wrong:
        return _by_pullback(func, args, kwargs)
    formula = formulas.ALWAYS.get(func) or (formulas.NESTED.get(func) if nested else None)
    return (formula or func)(*args, **kwargs)


def _is_custom(func: object) -> bool:
    """Whether the function is an operator that torch.library made: forward mode drops its tangent."""
    if isinstance(func, _OVERLOAD):
        return func.namespace not in _TORCHS_OWN
    return isinstance(func, _PACKET) and str(func).split(".")[0] not in _TORCHS_OWN


def _by_pullback(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call's result, differentiated by the pullback of this operation alone."""
    leaves, spec = trees.flatten((args, kwargs))
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    out_spec: Any = None

    def flat(tensors: Sequence[Tensor]) -> list[Any]:
        nonlocal out_spec
        filled = list(leaves)
        for position, tensor in zip(where, tensors, strict=True):
            filled[position] = tensor
        args, kwargs = trees.unflatten(spec, filled)
        # The operation itself: a rule may run where `corrected` would send it here again.
        with _torch.WithoutModes():
            outputs, out_spec = trees.flatten(func(*args, **kwargs))
        return outputs

    flat.__name__ = getattr(func, "__name__", str(func))
    result = _transposable(flat, [leaves[i] for i in where])
    return trees.unflatten(out_spec, result)


def _transposable(func: Flat, tensors: Sequence[Tensor]) -> list[Any]:
    """``func`` of the tensors, differentiated by its pullback."""
    return operate(_ByPullback(func), func([tensor.detach() for tensor in tensors]), tensors)


class _ByPullback(Rules):
    """Both modes by pullbacks alone, also where these are differentiated forward in turn."""

    def __init__(self, func: Flat) -> None:
        self._func = func

    def pull(
        self, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        given, seeds = _without_none(cotangents)

        def pulled(tensors: Sequence[Tensor]) -> list[Any]:
            tape, where = record_anew(self._func, tensors[: len(saved)], wanted)
            result = tape.pull(spread(tensors[len(saved) :], given, len(cotangents)))
            return list(spread(result, where, len(saved)))

        return _where_pushed(pulled, [*saved, *seeds])

    def push(self, saved: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        given, moving = _without_none(tangents)

        def pushed(tensors: Sequence[Tensor]) -> list[Any]:
            moved = spread(tensors[len(saved) :], given, len(saved))
            try:
                with _torch.NoForward() if not _torch.is_nested() else nullcontext():
                    tape, where = record_anew(
                        self._func, tensors[: len(saved)], [True] * len(saved), twice=True
                    )
                    return transpose(tape)([moved[i] for i in where])
            except (RuntimeError, NotImplementedError) as error:
                checks.advise("forward mode", error, ("",), f"{self._func.__name__} {_WAY_OUT}")
                raise

        return _where_pushed(pushed, [*saved, *moving])


def _without_none(vectors: Sequence[Tensor | None]) -> tuple[list[int], list[Tensor]]:
    """Where there are vectors, and these."""
    pairs = [(i, vector) for i, vector in enumerate(vectors) if vector is not None]
    return [i for i, _ in pairs], [vector for _, vector in pairs]


def _where_pushed(func: Flat, tensors: Sequence[Tensor]) -> list[Any]:
    """``func`` of the tensors; where these carry tangents of an outer forward mode, by pullbacks again."""
    if _torch.forward_level_active() and any(map(_torch.has_tangent_at_any_depth, tensors)):
        return _transposable(func, tensors)
    return func(tensors)


# An autograd Function with a jvp of its own.


@functools.cache
def _nesting(cls: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The Function with a jvp that an outer forward mode sees, where it has one."""
    if cls.jvp is torch.autograd.Function.jvp or hasattr(cls, "nests"):
        return cls

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        cls.setup_context(ctx, inputs, output)
        outputs = output if isinstance(output, tuple) else (output,)
        known = {id(leaf) for leaf in (*inputs, *outputs)}
        kept = (*(ctx.saved_for_forward or ()), *(ctx.to_save or ()), *vars(ctx).values())
        keeps_intermediate = any(is_differentiable(leaf) and id(leaf) not in known for leaf in kept)
        ctx.suspicious = [leaf for leaf in inputs if is_differentiable(leaf)] if keeps_intermediate else []

    def jvp(ctx: Any, *tangents: Any) -> Any:
        with _torch.ForwardGrad():
            is_differentiated = any(is_watched(_at_primal(tensor)) for tensor in ctx.suspicious)
        if is_differentiated:
            raise ForwardRuleError(
                f"forward mode: {cls.__qualname__}.jvp is differentiated itself, but what its setup_context keeps is "
                f"neither an input nor an output of forward, and has lost its derivative. Keep inputs and outputs "
                f"alone, or take another order, as in jacfwd(jacrev(f))."
            )
        with _torch.ForwardGrad(), corrected():
            return cls.jvp(_AtPrimals(ctx), *tangents)

    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        with corrected():
            return cls.vmap(info, in_dims, *args)

    own: dict[str, Any] = {"setup_context": staticmethod(setup_context), "jvp": staticmethod(jvp)}
    if cls.vmap is not torch.autograd.Function.vmap:
        own["vmap"] = staticmethod(vmap)
    return type(cls.__name__, (cls,), own)


class _AtPrimals:
    """A Function's context inside its jvp: what it saved, without the tangents of this level."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._ctx, name)
        if isinstance(value, tuple):
            return tuple(map(_at_primal, value))
        return _at_primal(value)


def _at_primal(leaf: Any) -> Any:
    return _torch.unpack_dual(leaf)[0] if is_differentiable(leaf) else leaf
