"""The exceptions: every one of ours, and every one also what torch.func raises in that place."""

from __future__ import annotations

import inspect

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
    "SampleError": (RuntimeError,),
    "BudgetError": (MemoryError,),
    "ResumeError": (RuntimeError, ValueError),
    "RuleError": (RuntimeError, TypeError),
    "ForwardRuleError": (NotImplementedError, RuntimeError),
    "MissingRuleError": (NotImplementedError, RuntimeError),
    "BatchedPullError": (RuntimeError,),
    "CaptureError": (RuntimeError,),
    "DerivativeError": (AssertionError,),
}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_error_is_ours_and_torchs_and_documented(cls: type[Exception]) -> None:
    if issubclass(cls, Warning):
        assert issubclass(cls, UserWarning)
        return
    assert issubclass(cls, errors.AutodiffError)
    for builtin in TORCH_RAISES.get(cls.__name__, ()):
        assert issubclass(cls, builtin)
    assert cls.__doc__
    more = (3,) if cls is errors.SampleError else ()
    assert cls("text", *more).args == ("text",)


def test_table_is_complete() -> None:
    assert {cls.__name__ for cls in CLASSES} >= set(TORCH_RAISES)
