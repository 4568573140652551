"""Where a call of a module's clone may reach the module itself, and an error where it does.

Provides `found_by_name` and `refusing`. Imports `errors`, `_torch` and `references`.
"""

from __future__ import annotations

import contextlib
import gc
import threading
import types
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from autodiff._torch import SharedSwitch, compiling
from autodiff.errors import CloneError
from autodiff.nn import references

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch.utils.hooks import RemovableHandle


def found_by_name(code: Iterable[type | types.FunctionType]) -> Iterator[Any]:
    """What functions find by global names; ``forward`` of a class also around and in the class. Modules at least."""
    for one in code:
        function: Any = one
        values: list[Any] = []
        if isinstance(one, type):
            function = getattr(one, "forward", None)
            values = [*vars(one).values()]
            cells = getattr(function, "__closure__", None) or ()
            values += [part for cell in cells for part in gc.get_referents(cell)]
        if isinstance(function, types.FunctionType):
            names = function.__globals__
            values += [names[name] for name in function.__code__.co_names if name in names]
        for value in values:
            if issubclass(type(value), nn.Module):
                yield value
            elif type(value) in references.WITH_OWN_COPY or type(value) is tuple:
                yield from references.first(value)


class _Refused(threading.local):
    """The ids of modules that this thread may not call, since it is to call their clones."""

    originals: frozenset[int] = frozenset()


_refused = _Refused()


def _refuse(module: nn.Module, _: Any) -> None:
    if not compiling() and id(module) in _refused.originals:
        raise CloneError(
            f"functional_call: forward called a {type(module).__name__} with the module's own parameters. It is held "
            f"by an object that cannot be looked into, or that is too large or too far away to be searched, or by a "
            f"global name or a class. Expected layers in attributes of modules. Make it an attribute, or put it in a "
            f"ModuleList, and reach it from self."
        )


def _read_hook() -> Callable[[bool], None]:
    handles: list[RemovableHandle] = []

    def register(on: bool) -> None:
        while handles:
            handles.pop().remove()
        if on:
            handles.append(register_module_forward_pre_hook(_refuse))

    return register


_refusal = SharedSwitch(_read_hook)


@contextlib.contextmanager
def refusing(originals: Iterable[nn.Module]) -> Iterator[None]:
    """A call of one of these modules is an error in this thread. In others it is as it was, and a little slower."""
    before = _refused.originals
    with _refusal:
        try:
            _refused.originals = before.union(map(id, originals))
            yield
        finally:
            _refused.originals = before
