"""What every test shares: a seed before it, and after it the proof that nothing was left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch._functorch import eager_transforms, pyfunctorch
from torch.autograd import forward_ad
from torch.backends import cuda, mha

if TYPE_CHECKING:
    from collections.abc import Iterator


def state_of_torch() -> dict[str, Any]:
    """Everything that a transform switches while it runs."""
    return {
        "transforms on the stack": len(pyfunctorch.retrieve_all_functorch_interpreters()),
        "forward-mode levels open": forward_ad._current_level + 1,
        "torch.func.jvp nesting": eager_transforms.JVP_NESTING,
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "forward-mode grad": torch._C._is_fwd_grad_enabled(),
        "saved-tensor hooks allowed": torch._C._autograd._saved_tensors_hooks_is_enabled(),
        "default dtype": torch.get_default_dtype(),
        "kernels of attention": (
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
            cuda.math_sdp_enabled(),
            mha.get_fastpath_enabled(),
        ),
    }


CLEAN = {
    "transforms on the stack": 0,
    "forward-mode levels open": 0,
    "torch.func.jvp nesting": 0,
    "grad mode": True,
    "inference mode": False,
    "forward-mode grad": True,
    "saved-tensor hooks allowed": True,
    "default dtype": torch.float32,
    "kernels of attention": (True,) * 5,
}


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Seed before the test; after it, no level, mode or hook may be other than torch starts with."""
    torch.manual_seed(20)
    yield
    left = state_of_torch()
    torch.set_grad_enabled(True)
    assert left == CLEAN
