"""Functions that torch.compile has compiled, where a transform has to see what they are made of.

Provides `uncompiled`: inside it they run as they are written, in this thread alone. Imports nothing from the package.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from threading import get_ident
from typing import Any

_TRACER, _modules = "torch._dynamo.eval_frame", sys.modules
# The threads inside `uncompiled`, each as often as it has entered. A list takes less time than a threading.local.
_inside: list[int] = []


class _StanceByThread:
    """torch's stance, which belongs to the process: in a thread inside `uncompiled` it is to compile nothing."""

    def __init__(self, of_process: Any) -> None:
        self._of_process = of_process

    @property
    def stance(self) -> Any:
        return "force_eager" if get_ident() in _inside else self._of_process.stance

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of_process, name)


class _Uncompiled(AbstractContextManager[None]):
    """Inside it a call of a compiled function runs the function that was compiled."""

    __slots__ = ()

    def __enter__(self) -> None:
        # Whoever has compiled a function has imported the tracer, which takes a second.
        if _TRACER in _modules:
            _set_stance()
        _inside.append(get_ident())

    def __exit__(self, *exc: object) -> None:
        _inside.remove(get_ident())


def _set_stance() -> None:
    tracer: Any = _modules[_TRACER]
    stance = getattr(tracer, "_stance", None)  # None in the middle of the import
    if stance is not None and type(stance) is not _StanceByThread:
        tracer._stance = _StanceByThread(stance)


uncompiled = _Uncompiled()
