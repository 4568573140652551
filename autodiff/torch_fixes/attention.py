"""Floor 1: attention that can be differentiated twice, and in forward mode.

torch's fused kernels have a gradient and nothing else, its plain formula has everything. Hands on `unfused`,
inside which torch takes the formula. Imports only `_torch`.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from torch.backends import cuda, mha

from autodiff import _torch

if TYPE_CHECKING:
    from collections.abc import Callable

# Whether each is on, and its switch. The CPU obeys the first two as well; the fused layers are those that
# nn.MultiheadAttention and nn.TransformerEncoderLayer use in eval mode.
_flash_is_on, _switch_flash = _torch.FLASH_ATTENTION
_formula_is_on, _switch_formula = _torch.MATH_ATTENTION
_layers_are_on, _switch_layers = mha.get_fastpath_enabled, mha.set_fastpath_enabled
_OF_CUDA: list[tuple[Callable[[], bool], Callable[[bool], None]]] = []
if cuda.is_built():
    _OF_CUDA += [
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    ]


class _Unfused(AbstractContextManager[None]):
    """The switches belong to the process: the first user turns them, and the last one turns them back.

    The lock is never held while user code runs. Every second derivative comes by, so that this is written
    for speed: 0.5 us, where loops over the switches and `with` took 1.0.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = (False, True, False)
        self._turned: list[Callable[[bool], None]] = []

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            self._users += 1
            if self._users == 1:
                self._before = flash, formula, layers = _flash_is_on(), _formula_is_on(), _layers_are_on()
                if flash:
                    _switch_flash(False)
                if not formula:
                    _switch_formula(True)
                if layers:
                    _switch_layers(False)
                if _OF_CUDA:
                    self._turned = [switch for is_on, switch in _OF_CUDA if is_on()]
                    for switch in self._turned:
                        switch(False)
        finally:
            self._lock.release()

    def __exit__(self, *exc: object) -> None:
        self._lock.acquire()
        try:
            self._users -= 1
            if self._users == 0:
                flash, formula, layers = self._before
                if flash:
                    _switch_flash(True)
                if not formula:
                    _switch_formula(False)
                if layers:
                    _switch_layers(True)
                for switch in self._turned:
                    switch(True)
        finally:
            self._lock.release()


unfused = _Unfused()
