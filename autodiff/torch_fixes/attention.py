"""Attention that can be differentiated twice, and in forward mode.

torch's fused kernels have a gradient and nothing else; its plain formula has every derivative. Hands on `unfused`,
inside which torch takes the formula.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.backends import cuda, mha

from autodiff import _torch

if TYPE_CHECKING:
    from collections.abc import Callable

# Whether each is on, and its switch. The CPU obeys the first two as well; the fused layers are those that
# nn.MultiheadAttention and nn.TransformerEncoderLayer use in eval mode.
_flash_is_on, _switch_flash = _torch.flash_attention
_formula_is_on, _switch_formula = _torch.math_attention
_layers_are_on, _switch_layers = mha.get_fastpath_enabled, mha.set_fastpath_enabled
_OF_CUDA: list[tuple[Callable[[], bool], Callable[[bool], None]]] = []
if cuda.is_built():
    _OF_CUDA += [
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    ]


def _take_formula() -> Callable[[], None]:
    flash, formula, layers = _flash_is_on(), _formula_is_on(), _layers_are_on()
    of_cuda = [switch for is_on, switch in _OF_CUDA if is_on()] if _OF_CUDA else ()
    if flash:
        _switch_flash(False)
    if not formula:
        _switch_formula(True)
    if layers:
        _switch_layers(False)
    for switch in of_cuda:
        switch(False)

    def turn_back() -> None:
        if flash:
            _switch_flash(True)
        if not formula:
            _switch_formula(False)
        if layers:
            _switch_layers(True)
        for switch in of_cuda:
            switch(True)

    return turn_back


unfused = _torch.SharedSwitch(_take_formula)
