"""The exceptions: every one of ours, and every one also what torch.func raises in that place."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from autodiff import errors

CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__]

TORCH_RAISES = {
    "AutodiffError": (),
    "ArgnumsError": (RuntimeError,),
    "StructureError": (RuntimeError, ValueError),
    "ShapeError": (RuntimeError,),
    "DtypeError": (RuntimeError,),
    "LeafError": (RuntimeError, ValueError, TypeError),
    "OutputError": (RuntimeError,),
    "IndependenceError": (RuntimeError,),
    "BatchError": (ValueError,),
    "OptionError": (ValueError, RuntimeError),
    "OptionCombinationError": (ValueError, RuntimeError, NotImplementedError),
    "SampleError": (RuntimeError,),
    "BudgetError": (MemoryError,),
    "DataError": (ValueError, RuntimeError),
    "ResumeError": (RuntimeError, ValueError),
    "RuleError": (RuntimeError, TypeError),
    "DegeneracyError": (RuntimeError,),
    "ForwardRuleError": (NotImplementedError, RuntimeError),
    "MissingRuleError": (NotImplementedError,),
    "BatchedPullError": (RuntimeError,),
    "CaptureError": (RuntimeError,),
    "DerivativeError": (AssertionError,),
    "InPlaceError": (RuntimeError,),
    "RandomnessError": (RuntimeError,),
    "StrategyError": (AssertionError, ValueError),
    "StrictModeError": (RuntimeError,),
    "OutDimError": (ValueError, IndexError),
    "ForwardLevelError": (RuntimeError,),
    "CloneError": (RuntimeError,),
    "SolverError": (RuntimeError, ArithmeticError),
    "SingularError": (RuntimeError, ArithmeticError),
}
WARNINGS = {"BufferWarning", "BudgetWarning", "ConvergenceWarning"}


def builtins_of(cls: type) -> set[type]:
    """The most derived classes of Python's own among its bases."""
    if not cls.__module__.startswith("autodiff"):
        return {cls} - {Exception}
    return set().union(*(builtins_of(base) for base in cls.__bases__))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_error_is_ours_and_torchs_and_documented(cls: type[Exception]) -> None:
    if issubclass(cls, Warning):
        assert issubclass(cls, UserWarning)
        return
    assert issubclass(cls, errors.AutodiffError)
    assert builtins_of(cls) == set(TORCH_RAISES[cls.__name__])
    assert cls.__doc__
    more = (3,) if cls is errors.SampleError else ()
    assert cls("text", *more).args == ("text",)


def test_table_is_complete() -> None:
    assert {cls.__name__ for cls in CLASSES} == set(TORCH_RAISES) | WARNINGS


def test_page_about_errors_lists_every_class() -> None:
    page = (Path(errors.__file__).parents[1] / "docs" / "how_to" / "errors.md").read_text()
    listed = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert listed == set(TORCH_RAISES) - {"AutodiffError"}
    assert all(f"`{name}`" in page for name in WARNINGS)
