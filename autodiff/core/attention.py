"""Floor 1: attention that can be differentiated twice, and in forward mode.

torch's fused kernels have a gradient and nothing else, its plain formula has everything. Hands on `unfused`,
inside which torch takes the formula. Imports nothing of the package.
"""

from __future__ import annotations

import threading
from contextlib import ContextDecorator
from typing import TYPE_CHECKING

from torch.backends import cuda, mha

if TYPE_CHECKING:
    from collections.abc import Callable

# How to set and how to ask for torch's switches, and what each has to be: those of
# scaled_dot_product_attention, which the CPU obeys as well, and that of the fused layers, which
# nn.MultiheadAttention and nn.TransformerEncoderLayer use in eval mode.
_SWITCHES = [
    (cuda.enable_flash_sdp, cuda.flash_sdp_enabled, False),
    (cuda.enable_math_sdp, cuda.math_sdp_enabled, True),
    (mha.set_fastpath_enabled, mha.get_fastpath_enabled, False),
]
if cuda.is_built():
    _SWITCHES += [
        (cuda.enable_mem_efficient_sdp, cuda.mem_efficient_sdp_enabled, False),
        (cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled, False),
    ]


class _Unfused(ContextDecorator):
    """The switches belong to the process: the first user turns them, and the last one turns them back.

    The lock is never held while user code runs.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._turned: list[tuple[Callable[[bool], None], bool]] = []

    def __enter__(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                for turn, is_on, wanted in _SWITCHES:
                    if is_on() is not wanted:
                        turn(wanted)
                        self._turned.append((turn, wanted))

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for turn, wanted in self._turned:
                    turn(not wanted)
                self._turned.clear()


unfused = _Unfused()
