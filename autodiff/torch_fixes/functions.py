"""An autograd Function's own ``jvp``, made visible to an outer forward mode.

torch switches forward mode off inside it, for all levels, and hands it tensors that still carry this level's tangents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from autodiff import _torch
from autodiff.core.call import is_differentiable
from autodiff.core.forward import ForwardMode
from autodiff.core.rules import is_tracked
from autodiff.errors import ForwardRuleError

if TYPE_CHECKING:
    from collections.abc import Callable


def with_nesting_jvp(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Apply the autograd Function that is the first argument, with a ``jvp`` that autodiff_jvp_nests."""
    cls = args[0]
    # Kept by the class itself: a cache would keep the classes, and what they capture.
    nesting = vars(cls).get("autodiff_nesting")
    if nesting is None:
        nesting = cls.autodiff_nesting = _nesting(cls)
    return func(nesting, *args[1:], **kwargs)


def _nesting(cls: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """The Function with a jvp that an outer forward mode sees, where it has one."""
    if cls.jvp is torch.autograd.Function.jvp or hasattr(cls, "autodiff_jvp_nests"):
        return cls

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        cls.setup_context(ctx, inputs, output)
        outputs = output if isinstance(output, tuple) else (output,)
        known = {id(leaf) for leaf in (*inputs, *outputs)}
        kept = (*(ctx.saved_for_forward or ()), *(ctx.to_save or ()), *vars(ctx).values())
        keeps_intermediate = any(is_differentiable(leaf) and id(leaf) not in known for leaf in kept)
        ctx.inputs_to_check = (
            [leaf for leaf in inputs if is_differentiable(leaf)] if keeps_intermediate else []
        )

    def jvp(ctx: Any, *tangents: Any) -> Any:
        with _torch.ForwardModeAllowed():
            is_differentiated = any(is_tracked(_without_tangent(tensor)) for tensor in ctx.inputs_to_check)
        if is_differentiated:
            raise ForwardRuleError(
                f"forward mode: {cls.__qualname__}.jvp is differentiated itself, but what its setup_context keeps is "
                f"neither an input nor an output of forward, and has lost its derivative. Keep only inputs and "
                f"outputs, or use another mode combination, as in jacfwd(jacrev(f))."
            )
        with _torch.ForwardModeAllowed(), ForwardMode():
            return cls.jvp(_AtPrimals(ctx), *tangents)

    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        with ForwardMode():
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
            return tuple(map(_without_tangent, value))
        return _without_tangent(value)


def _without_tangent(leaf: Any) -> Any:
    return _torch.unpack_dual(leaf)[0] if is_differentiable(leaf) else leaf
