"""The seam to torch: the only room that names private parts of it, and the map of what it hands on.

Levels, wrappers, modes and the engine under names of our own, each entered by ``with``. Imports `errors` alone.
"""

from autodiff._torch.autograd import CUSTOM_FUNCTION_CALL as CUSTOM_FUNCTION_CALL
from autodiff._torch.autograd import DispatchMode as DispatchMode
from autodiff._torch.autograd import backward as backward
from autodiff._torch.autograd import copy_of_scripted as copy_of_scripted
from autodiff._torch.autograd import cotangent_sizes as cotangent_sizes
from autodiff._torch.autograd import is_zero_tensor as is_zero_tensor
from autodiff._torch.autograd import rearrange as rearrange
from autodiff._torch.autograd import register_with_torch as register_with_torch
from autodiff._torch.autograd import torch_registry as torch_registry
from autodiff._torch.autograd import versions as versions
from autodiff._torch.forward_level import NoForward as NoForward
from autodiff._torch.forward_level import dual_ground as dual_ground
from autodiff._torch.forward_level import dual_stacked as dual_stacked
from autodiff._torch.forward_level import make_dual as make_dual
from autodiff._torch.forward_level import unpack_dual as unpack_dual
from autodiff._torch.levels import active_levels as active_levels
from autodiff._torch.levels import add_batch as add_batch
from autodiff._torch.levels import batch_level as batch_level
from autodiff._torch.levels import batch_levels as batch_levels
from autodiff._torch.levels import bottom as bottom
from autodiff._torch.levels import detached as detached
from autodiff._torch.levels import forward_level_active as forward_level_active
from autodiff._torch.levels import grad_level as grad_level
from autodiff._torch.levels import grad_level_active as grad_level_active
from autodiff._torch.levels import has_tangent_at_any_depth as has_tangent_at_any_depth
from autodiff._torch.levels import is_batched_at as is_batched_at
from autodiff._torch.levels import is_nested as is_nested
from autodiff._torch.levels import is_wrapped as is_wrapped
from autodiff._torch.levels import level_of as level_of
from autodiff._torch.levels import on_ground as on_ground
from autodiff._torch.levels import quiet_fallbacks as quiet_fallbacks
from autodiff._torch.levels import remove_batch as remove_batch
from autodiff._torch.levels import requires_grad_at_any_depth as requires_grad_at_any_depth
from autodiff._torch.levels import unwrap as unwrap
from autodiff._torch.levels import vmap_levels as vmap_levels
from autodiff._torch.levels import without_dead_level as without_dead_level
from autodiff._torch.levels import wrap as wrap
from autodiff._torch.levels import wrap_watched as wrap_watched
from autodiff._torch.modes import FLASH_ATTENTION as FLASH_ATTENTION
from autodiff._torch.modes import MATH_ATTENTION as MATH_ATTENTION
from autodiff._torch.modes import SWITCH_OF_GRAD_MODE as SWITCH_OF_GRAD_MODE
from autodiff._torch.modes import ForwardGrad as ForwardGrad
from autodiff._torch.modes import NormalMode as NormalMode
from autodiff._torch.modes import Recording as Recording
from autodiff._torch.modes import WithoutModes as WithoutModes
from autodiff._torch.modes import compiling as compiling
from autodiff._torch.modes import function_mode as function_mode
from autodiff._torch.modes import function_modes as function_modes
from autodiff._torch.modes import outside_inference as outside_inference
from autodiff._torch.modes import stop_tracing as stop_tracing
from autodiff._torch.modes import whole as whole
