"""What only a backward pass sees: where forward mode would give something else than legacy's double backward.

Provides `refusing_backward_only`, whose function either runs as forward mode sees it, or stops at the first such thing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from autodiff._torch import GradMode, set_grad_enabled
from autodiff.core.forward import ForwardMode
from autodiff.core.hooks import differ_by_mode

if TYPE_CHECKING:
    from collections.abc import Callable

# Forward mode goes through a region without grad, ignores hooks, and knows no requires_grad.
_HOOKS = frozenset({Tensor.register_hook, Tensor.register_post_accumulate_grad_hook})
_SEEN_BY_BACKWARD = _HOOKS | {
    set_grad_enabled,
    Tensor.requires_grad_,
    Tensor.retain_grad,
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.grad_fn.__get__,  # type: ignore[union-attr]
    Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
}


class BackwardOnlyError(Exception):
    """The function does something that forward mode does not see."""


class _BackwardOnly(ForwardMode):
    """Raises at the first use of something that forward mode does not see, and is forward mode otherwise."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _SEEN_BY_BACKWARD or func in differ_by_mode:
            raise BackwardOnlyError
        return super().__torch_function__(func, types, args, kwargs)


def refusing_backward_only(func: Callable[..., Any]) -> Callable[..., Any]:
    """``func``, which raises `BackwardOnlyError` where forward mode would give something else.

    It runs with grad mode on, as a backward pass has it.
    """

    def checked(*args: Any) -> Any:
        with GradMode(), _BackwardOnly():
            return func(*args)

    return checked
