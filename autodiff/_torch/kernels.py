"""How operations of torch's are run otherwise inside its levels.

Provides `inside_levels`, for operations that torch composes of others. Imports nothing from the package.
"""

from __future__ import annotations

import warnings
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

    with warnings.catch_warnings():
        # A second copy of this package, as the benchmark has one, takes the place of the first.
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        name = operator.name().removeprefix("aten::")
        _LIBRARY.impl(name, kernel, "FuncTorchDynamicLayerFrontMode", allow_override=True)
