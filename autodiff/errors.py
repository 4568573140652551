"""Floor 0: every exception the package raises.

Each class is also a subclass of the builtin that ``torch.func`` raises in that place, so code that
catches ``RuntimeError`` or ``ValueError`` today keeps working. Imports nothing from the package.
"""

from __future__ import annotations


class AutodiffError(Exception):
    """Base of every error that autodiff raises on its own account.

    >>> issubclass(ShapeError, AutodiffError) and issubclass(ShapeError, RuntimeError)
    True
    """


class ArgnumsError(AutodiffError, RuntimeError):
    """``argnums`` names no argument of the call, repeats one, or is empty."""


class StructureError(AutodiffError, RuntimeError, ValueError):
    """Two trees that must have the same structure do not."""


class ShapeError(AutodiffError, RuntimeError):
    """A tangent, cotangent or block has another shape than the leaf it belongs to."""


class DtypeError(AutodiffError, RuntimeError):
    """A leaf has a dtype that the transform cannot use."""


class LeafError(AutodiffError, RuntimeError, ValueError, TypeError):
    """A leaf is of a kind that cannot stand where it stands, such as an unregistered class."""


class OutputError(AutodiffError, RuntimeError):
    """The differentiated function returned something that the transform cannot differentiate."""


class InPlaceError(AutodiffError, RuntimeError):
    """The differentiated function wrote in place to what it is differentiated by."""


class BatchedPullError(AutodiffError, RuntimeError):
    """Cotangents came in a batch where torch pulls a batch back wrongly."""


class IndependenceError(AutodiffError, RuntimeError):
    """``strict=True`` and an output does not depend on an input.

    ``output`` and ``input`` count the differentiated leaves, None where all of them are meant.
    """

    def __init__(self, message: str, *, output: int | None = None, input: int | None = None) -> None:  # noqa: A002
        super().__init__(message)
        self.output, self.input = output, input


class BatchError(AutodiffError, ValueError):
    """``vmap``'s ``in_dims`` or ``out_dims`` do not fit the arguments or the results."""


class RandomnessError(AutodiffError, RuntimeError):
    """A random operation ran where ``randomness="error"`` forbids it."""


class StrategyError(AutodiffError, AssertionError, ValueError):
    """An unknown strategy in :mod:`autodiff.functional`, where torch.autograd.functional asserts."""


class StrictModeError(IndependenceError):
    """``strict=True`` in :mod:`autodiff.functional`, in the words of torch.autograd.functional."""


class OutDimError(BatchError, IndexError):
    """``vmap``'s ``out_dims`` names a dimension that an output has not."""


class ForwardLevelError(AutodiffError, RuntimeError):
    """Another thread left torch's one forward-AD level while this one was inside it."""


class ForwardRuleError(AutodiffError, NotImplementedError, RuntimeError):
    """An operation has no rule for this use of forward mode, and another order of transforms has to serve."""


class CaptureError(AutodiffError, RuntimeError):
    """A checkpointed function captures a differentiated tensor in a way that cannot be followed."""


class MissingRuleError(AutodiffError, NotImplementedError):
    """torch has no second derivative of an operation, in whatever order of modes."""


class RuleError(AutodiffError, RuntimeError, TypeError):
    """A custom rule is missing, or gives something else than its function's derivative can be."""


class TwinError(AutodiffError, RuntimeError):
    """A module holds something that leads back to it and cannot be copied with it."""


class BufferWarning(UserWarning):
    """``functional_call`` lost what a module wrote to a buffer of its own."""


class OptionError(AutodiffError, ValueError, RuntimeError):
    """A keyword has a value outside its documented set, such as ``chunk_size=0``."""


class DerivativeError(AutodiffError, AssertionError):
    """A derivative is not that of the function's values, found by :mod:`autodiff.testing`.

    ``derivative`` and ``quotient`` are the two numbers, ``input`` and ``output`` name the leaves, and ``mode`` and
    ``order`` say which derivative it is. What does not apply is None.
    """

    def __init__(
        self,
        message: str,
        *,
        derivative: complex | None = None,
        quotient: complex | None = None,
        mode: str | None = None,
        order: int | None = None,
        output: str | None = None,
        input: str | None = None,  # noqa: A002
    ) -> None:
        super().__init__(message)
        self.derivative, self.quotient, self.mode, self.order = derivative, quotient, mode, order
        self.output, self.input = output, input


class SampleError(AutodiffError, RuntimeError):
    """``per_sample``'s function failed on a sample, or gave something that is not finite.

    ``index`` is the sample's.
    """

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


class BudgetError(AutodiffError, MemoryError):
    """What ``per_sample`` is asked for cannot be made within its memory."""


class BudgetWarning(UserWarning):
    """The smallest piece of ``per_sample``'s work takes more memory than it may."""


class ResumeError(AutodiffError, RuntimeError, ValueError):
    """A file holds the results of another run, or none that ``per_sample`` knows."""
