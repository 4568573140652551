"""Attention that can be differentiated twice, and in forward mode.

torch's fused kernels have a gradient and nothing else; its plain formula has every derivative. Inside `plain_attention`
torch takes the formula.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.backends import cuda, mha

from autodiff import _torch

if TYPE_CHECKING:
    from collections.abc import Callable

# Whether each is on, and its switch. The CPU obeys the first two as well; the fused fast_path are those that
# nn.MultiheadAttention and nn.TransformerEncoderLayer use in eval mode.
_flash_is_on, _switch_flash = _torch.flash_attention
_formula_is_on, _switch_formula = _torch.math_attention
_fast_path_is_on, _switch_fast_path = mha.get_fastpath_enabled, mha.set_fastpath_enabled
_OF_CUDA: list[tuple[Callable[[], bool], Callable[[bool], None]]] = []
if cuda.is_built():
    _OF_CUDA += [
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    ]


def _read_kernels() -> Callable[[bool], None]:
    flash, formula, fast_path = _flash_is_on(), _formula_is_on(), _fast_path_is_on()
    of_cuda = [switch for is_on, switch in _OF_CUDA if is_on()] if _OF_CUDA else ()

    def take_formula(on: bool) -> None:
        if flash:
            _switch_flash(not on)
        if not formula:
            _switch_formula(on)
        if fast_path:
            _switch_fast_path(not on)
        for switch in of_cuda:
            switch(not on)

    return take_formula


plain_attention = _torch.SharedSwitch(_read_kernels)
