"""Floor 3: when forward mode gives what legacy's double backward gives.

Hands on `as_forward_sees`, whose function either runs as forward mode sees it, or stops at the first
thing that only a backward pass would honour. Imports `core` for one name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from autodiff.core._torch import SWITCH_OF_GRAD_MODE

if TYPE_CHECKING:
    from collections.abc import Callable

# Forward mode goes through a region without grad, ignores hooks, and knows no requires_grad; its rule
# for the product mode of scatter_reduce gives zeros without a word.
_SEEN_BY_BACKWARD = frozenset(
    {
        SWITCH_OF_GRAD_MODE,
        Tensor.register_hook,
        Tensor.register_post_accumulate_grad_hook,
        Tensor.requires_grad_,
        Tensor.retain_grad,
        Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
        Tensor.grad_fn.__get__,  # type: ignore[union-attr]
        Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
        Tensor.scatter_reduce,
        Tensor.scatter_reduce_,
        torch.scatter_reduce,
    }
)


class BackwardOnlyError(Exception):
    """The function does something that forward mode does not see."""


class BackwardOnly(TorchFunctionMode):
    """Raises at the first use of something that forward mode does not see."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _SEEN_BY_BACKWARD:
            raise BackwardOnlyError
        return func(*args, **kwargs) if kwargs else func(*args)


def as_forward_sees(func: Callable[..., Any]) -> Callable[..., Any]:
    """``func``, which raises `BackwardOnlyError` where forward mode would give something else."""

    def watched(*args: Any) -> Any:
        with BackwardOnly():
            return func(*args)

    return watched
