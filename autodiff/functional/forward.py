"""Floor 3: when forward mode gives what legacy's double backward gives.

Hands on `as_forward_sees`, whose function either runs as forward mode sees it, or stops at the first
thing that only a backward pass would honour. Builds on `core`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from autodiff._torch import SWITCH_OF_GRAD_MODE, Recording
from autodiff.torch_fixes.forward_mode import corrected

if TYPE_CHECKING:
    from collections.abc import Callable

# Forward mode goes through a region without grad, ignores hooks, and knows no requires_grad.
_HOOKS = frozenset({Tensor.register_hook, Tensor.register_post_accumulate_grad_hook})
_SEEN_BY_BACKWARD = _HOOKS | {
    SWITCH_OF_GRAD_MODE,
    Tensor.requires_grad_,
    Tensor.retain_grad,
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.grad_fn.__get__,  # type: ignore[union-attr]
    Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
}
# Where torch's two modes differ without a word, and neither is wrong: the rules of factorisations symmetrise in one of
# them, and an embedding's padding row moves.
_DIFFERENT = frozenset(
    {
        Tensor.cholesky,
        torch.cholesky,
        torch.linalg.cholesky,
        torch.linalg.cholesky_ex,
        torch.nn.functional.embedding,
    }
)


_STOPS = _SEEN_BY_BACKWARD | _DIFFERENT


class BackwardOnlyError(Exception):
    """The function does something that forward mode does not see."""


class BackwardOnly(corrected):
    """Raises at the first use of something that forward mode does not see, and corrects the rest."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _STOPS:
            raise BackwardOnlyError
        return super().__torch_function__(func, types, args, kwargs)


class HookWatch(TorchFunctionMode):
    """Notices whether a hook is registered: then a gradient may be no function's."""

    seen = False

    def over(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """``func``, watched."""

        def watched(*args: Any) -> Any:
            with self:
                return func(*args)

        return watched

    def may_batch(self) -> bool:
        """Whether a batched pull shows nobody a batched cotangent."""
        return not self.seen

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen = self.seen or func in _HOOKS
        return func(*args, **kwargs) if kwargs else func(*args)


def as_forward_sees(func: Callable[..., Any]) -> Callable[..., Any]:
    """``func``, which raises `BackwardOnlyError` where forward mode would give something else.

    It runs with grad mode on, as a backward pass has it.
    """

    def watched(*args: Any) -> Any:
        with Recording(), BackwardOnly():
            return func(*args)

    return watched
