"""How operations of torch's are run otherwise inside its levels.

Provides `inside_levels`, for operations that torch composes of others. Imports nothing from the package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch._C import DispatchKey

if TYPE_CHECKING:
    from collections.abc import Callable

_LIBRARY = torch.library.Library("aten", "IMPL")


def inside_levels(
    operator: torch._ops.OpOverload, other: Callable[[tuple[Any, ...]], Callable[..., Any] | None]
) -> None:
    """Run what ``other`` gives for the arguments, where a level is active; where it gives None, what torch composes.

    Outside of all levels nothing changes, and nothing is asked. torch.func's own levels are among them.
    """

    def kernel(*args: Any) -> Any:
        replacement = other(args)
        if replacement is not None:
            return replacement(*args)
        return operator._op_dk(DispatchKey.CompositeImplicitAutograd, *args)

    _LIBRARY.impl(operator.name().removeprefix("aten::"), kernel, "FuncTorchDynamicLayerFrontMode")
