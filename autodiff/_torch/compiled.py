"""Functions that torch.compile has compiled, where a transform has to see what they are made of.

Provides `uncompiled`: inside it they run as they are written, in this thread alone. Imports `thread_state`.
"""

from __future__ import annotations

import operator
import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from autodiff._torch.thread_state import thread

if TYPE_CHECKING:
    from collections.abc import Callable

R = TypeVar("R")
_TRACER, _OPERANDS = "torch._dynamo.eval_frame", "torch._dynamo.variables.builtin"
_modules = sys.modules


def is_uncompiled() -> bool:
    """Whether this thread is inside `uncompiled`."""
    return bool(thread.__dict__.get("uncompiled"))


class _StanceByThread:
    """torch's stance, which belongs to the process: in a thread inside `uncompiled` it is to compile nothing."""

    def __init__(self, of_process: Any) -> None:
        self._of_process = of_process

    @property
    def stance(self) -> Any:
        return "force_eager" if is_uncompiled() else self._of_process.stance

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of_process, name)


class _Uncompiled(AbstractContextManager[None]):
    """Inside it a call of a compiled function runs the function that was compiled."""

    __slots__ = ()

    def __enter__(self) -> None:
        # Again each time: torch.compiler.set_stance may have put another in its place.
        if _TRACER in _modules:
            _set_stance()
        own = thread.__dict__
        own["uncompiled"] = own.get("uncompiled", 0) + 1

    def __exit__(self, *exc: object) -> None:
        thread.__dict__["uncompiled"] -= 1

    def around(self, func: Callable[..., R], *args: Any) -> R:
        """``func(*args)`` inside it, where no guard is."""
        own = thread.__dict__
        if own.get("uncompiled"):
            return func(*args)
        if _TRACER in _modules:
            _set_stance()
        own["uncompiled"] = 1
        try:
            return func(*args)
        finally:
            own["uncompiled"] = 0


def _set_stance() -> None:
    tracer: Any = _modules[_TRACER]
    stance = getattr(tracer, "_stance", None)  # None in the middle of the import
    if stance is not None and type(stance) is not _StanceByThread:
        tracer._stance = _StanceByThread(stance)


def _trace_matmul() -> None:
    """Have the tracer know ``@`` of objects that are not tensors.

    Where one operand is a tensor it calls a torch function of the other, but takes A @ v for v @ A. Where none is, it
    knows all other operators, and not this one.
    """
    module = _modules[_OPERANDS]
    reflected, builtins = (
        getattr(module, name, None) for name in ("BUILTIN_TO_TENSOR_RFN_MAP", "BuiltinVariable")
    )
    if reflected is not None:
        reflected.setdefault(operator.matmul, Tensor.__rmatmul__)
        _operand_orders.append("matmul")
    if builtins is not None and not hasattr(builtins, "call_matmul"):
        builtins.call_matmul = _call_matmul


def _call_matmul(_: Any, tracer: Any, one: Any, other: Any) -> Any:
    for left, name, right in ((one, "__matmul__", other), (other, "__rmatmul__", one)):
        if hasattr(getattr(left, "value", None), name):
            product = left.call_method(tracer, name, [right], {})
            if not product.is_constant_match(NotImplemented):
                return product
    return None


# Which operations of a tensor-like operand the tracer gives with their operands in order.
_operand_orders: list[str] = []


def tells_order_of_matmul() -> bool:
    """Whether the tracer distinguishes ``A @ v`` from ``v @ A`` where A only behaves like a tensor."""
    return bool(_operand_orders)


class _OnImport:
    """Finds a module of the tracer's as the other finders do, and runs ``then`` when it is imported.

    That takes a second. The first call of torch.compile or torch.cond imports it, and may come inside a transform.
    """

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self._name, self._then = name, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path)
        spec: Any = next((one for one in specs if one is not None), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_then(module: Any) -> None:
                execute(module)
                self._then()

            spec.loader.exec_module = execute_and_then
        return spec


uncompiled = _Uncompiled()
if _TRACER not in _modules:
    sys.meta_path.insert(0, _OnImport(_TRACER, _set_stance))
if _OPERANDS in _modules:
    _trace_matmul()
else:
    sys.meta_path.insert(0, _OnImport(_OPERANDS, _trace_matmul))
