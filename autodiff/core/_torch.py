"""Floor 1: the map of the seam to torch.

Levels, wrappers, modes and the engine under names of our own, each entered by ``with``. Only the files of
`seam`, which stand behind these names, name private parts of torch.
"""

from autodiff.core.seam.engine import (
    DispatchMode,
    backward,
    cotangent_sizes,
    rearrange,
    register_with_torch,
    torch_registry,
    versions,
)
from autodiff.core.seam.forward import (
    dual_ground,
    dual_stacked,
    make_dual,
    unpack_dual,
)
from autodiff.core.seam.levels import (
    add_batch,
    batch_level,
    bottom,
    detached,
    forward_level_active,
    grad_level,
    grad_level_active,
    is_batched_at,
    is_wrapped,
    on_ground,
    quiet_fallbacks,
    remove_batch,
    requires_grad_at_any_depth,
    unwrap,
    wrap,
    wrap_watched,
)
from autodiff.core.seam.modes import (
    FLASH_ATTENTION,
    MATH_ATTENTION,
    SWITCH_OF_GRAD_MODE,
    ForwardGrad,
    NormalMode,
    Recording,
    compiling,
    in_inference_mode,
    outside_inference,
)

__all__ = [
    "FLASH_ATTENTION",
    "MATH_ATTENTION",
    "SWITCH_OF_GRAD_MODE",
    "DispatchMode",
    "ForwardGrad",
    "NormalMode",
    "Recording",
    "add_batch",
    "backward",
    "batch_level",
    "bottom",
    "compiling",
    "cotangent_sizes",
    "detached",
    "dual_ground",
    "dual_stacked",
    "forward_level_active",
    "grad_level",
    "grad_level_active",
    "in_inference_mode",
    "is_batched_at",
    "is_wrapped",
    "make_dual",
    "on_ground",
    "outside_inference",
    "quiet_fallbacks",
    "rearrange",
    "register_with_torch",
    "remove_batch",
    "requires_grad_at_any_depth",
    "torch_registry",
    "unpack_dual",
    "unwrap",
    "versions",
    "wrap",
    "wrap_watched",
]
