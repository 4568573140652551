"""Names of the package that are loaded when they are first asked for, as a module may have them (PEP 562).

Imports nothing from the package until then: `import autodiff` takes a third less without the room `operators`.
"""

from __future__ import annotations

import sys
from importlib import import_module

# In which module each of them is; a room is a module itself.
_HOMES = {"operators": "autodiff", "hessian_eigenvalues": "autodiff.operators.hessian_eigenvalues"}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'autodiff' has no attribute {name!r}")
    is_room = home == "autodiff"
    value: object = import_module(f"autodiff.{name}") if is_room else getattr(import_module(home), name)
    setattr(sys.modules["autodiff"], name, value)
    return value


def __dir__() -> list[str]:
    return sorted({*vars(sys.modules["autodiff"]), *_HOMES})
