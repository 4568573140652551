"""Every exception and warning of the package.

Each class is also a subclass of the builtin that ``torch.func`` raises in that place, so code that
catches ``RuntimeError`` or ``ValueError`` today keeps working. Imports nothing from the package.
"""

from __future__ import annotations


class AutodiffError(Exception):
    """Base of every error that autodiff raises itself.

    >>> issubclass(ShapeError, AutodiffError) and issubclass(ShapeError, RuntimeError)
    True
    """


class ArgnumsError(AutodiffError, RuntimeError):
    """``argnums`` names no argument of the call, repeats one, or is empty.

    >>> import torch, autodiff
    >>> autodiff.grad(torch.sin, argnums=3)(torch.zeros(()))
    Traceback (most recent call last):
    autodiff.errors.ArgnumsError: grad: Got argnum=3, but only 1 positional inputs. ...
    """


class StructureError(AutodiffError, RuntimeError, ValueError):
    """Two trees that must have the same structure do not.

    >>> import torch, autodiff
    >>> autodiff.jvp(torch.sin, (torch.zeros(2),), ([torch.ones(2)],))
    Traceback (most recent call last):
    autodiff.errors.StructureError: jvp: ... but tangents[0] is a list of 1, but primals[0] is a leaf. ...
    """


class ShapeError(AutodiffError, RuntimeError):
    """A tangent, cotangent or block has another shape than the leaf it belongs to.

    >>> import torch, autodiff
    >>> autodiff.jvp(torch.sin, (torch.zeros(2),), (torch.ones(3),))
    Traceback (most recent call last):
    autodiff.errors.ShapeError: jvp: tangents[0] has shape (3,), but primals[0] has shape (2,). ...
    """


class DtypeError(AutodiffError, RuntimeError):
    """A leaf has a dtype that the transform cannot use.

    >>> import torch, autodiff
    >>> autodiff.jacrev(torch.square)(torch.tensor(1j))
    Traceback (most recent call last):
    autodiff.errors.DtypeError: jacrev: Expected all inputs to be real but received complex tensor ...
    """


class LeafError(AutodiffError, RuntimeError, ValueError, TypeError):
    """A leaf is of a type that is not allowed in its place, such as an unregistered class.

    >>> import torch, autodiff
    >>> autodiff.grad(torch.square)(torch.tensor(1))
    Traceback (most recent call last):
    autodiff.errors.LeafError: grad: args[0] has no leaf to differentiate. ...
    """


class OutputError(AutodiffError, RuntimeError):
    """The differentiated function returned something that the transform cannot differentiate.

    >>> import torch, autodiff
    >>> autodiff.grad(torch.square)(torch.ones(2))
    Traceback (most recent call last):
    autodiff.errors.OutputError: grad: Expected f(*args) to return a scalar Tensor, got tensor with 1 dims, ...
    """


class InPlaceError(AutodiffError, RuntimeError):
    """An argument that is differentiated was written in place: by the function, or since it was recorded.

    >>> import torch, autodiff
    >>> computed = torch.ones(2, requires_grad=True) * 1
    >>> autodiff.grad(lambda x: x.mul_(2).sum())(computed)
    Traceback (most recent call last):
    autodiff.errors.InPlaceError: the function wrote in place to an argument that is differentiated, ...
    """


class BatchedPullError(AutodiffError, RuntimeError):
    """A batch of cotangents was to be pulled back where torch does it wrongly.

    >>> import torch, autodiff
    >>> _, pullback = autodiff.vjp(torch.cdist, torch.ones(3, 2), torch.zeros(3, 2))
    >>> autodiff.vmap(pullback)(torch.ones(4, 3, 3))
    Traceback (most recent call last):
    autodiff.errors.BatchedPullError: torch pulls a batch of cotangents of cdist back wrongly. ...
    """


class IndependenceError(AutodiffError, RuntimeError):
    """``strict=True`` and an output does not depend on an input.

    ``output`` and ``input`` count the differentiated leaves, None where all of them are meant.

    >>> import torch, autodiff
    >>> autodiff.jacrev(lambda x: torch.ones(2), strict=True)(torch.ones(3))
    Traceback (most recent call last):
    autodiff.errors.IndependenceError: jacrev: with strict=True, output is independent of args[0]: ...
    """

    def __init__(self, message: str, *, output: int | None = None, input: int | None = None) -> None:  # noqa: A002
        super().__init__(message)
        self.output, self.input = output, input


class BatchError(AutodiffError, ValueError):
    """``vmap``'s ``in_dims`` or ``out_dims`` do not fit the arguments or the results.

    >>> import torch, autodiff
    >>> autodiff.vmap(torch.dot)(torch.ones(2, 3), torch.ones(4, 3))
    Traceback (most recent call last):
    autodiff.errors.BatchError: vmap: Expected all tensors to have the same size in the mapped dimension, ...
    """


class RandomnessError(AutodiffError, RuntimeError):
    """A random operation ran where ``randomness="error"`` forbids it.

    >>> import torch, autodiff
    >>> noisy = lambda x: x * torch.rand(()) if x > 0 else x
    >>> autodiff.vmap(noisy, fallback="loop")(torch.ones(2))
    Traceback (most recent call last):
    autodiff.errors.RandomnessError: vmap: called random operation while in randomness error mode, ...
    """


class StrategyError(AutodiffError, AssertionError, ValueError):
    """An unknown strategy in :mod:`autodiff.functional`, where torch.autograd.functional asserts.

    >>> import torch, autodiff
    >>> autodiff.functional.jacobian(torch.sin, torch.ones(2), strategy="sideways")
    Traceback (most recent call last):
    autodiff.errors.StrategyError: Expected strategy to be either "forward-mode" or "reverse-mode". ...
    """


class StrictModeError(IndependenceError):
    """``strict=True`` in :mod:`autodiff.functional`, with torch.autograd.functional's message.

    >>> import torch, autodiff
    >>> autodiff.functional.jacobian(lambda a, b: a * 2, (torch.ones(2), torch.ones(2)), strict=True)
    Traceback (most recent call last):
    autodiff.errors.StrictModeError: Output 0 of the user-provided function is independent of input 1. ...
    """


class OutDimError(BatchError, IndexError):
    """``vmap``'s ``out_dims`` names a dimension that an output does not have.

    >>> import torch, autodiff
    >>> autodiff.vmap(torch.sin, out_dims=2)(torch.ones(3))
    Traceback (most recent call last):
    autodiff.errors.OutDimError: vmap: Dimension out of range: out_dim=2 for output, ...
    """


class ForwardLevelError(AutodiffError, RuntimeError):
    """Another thread left torch's one forward-AD level while this one was inside it.

    A function that waits for another thread's ``torch.func.jvp``, which came first:

    >>> import threading, torch, autodiff
    >>> x, came, over = torch.ones(()), threading.Event(), threading.Event()
    >>> torchs = threading.Thread(
    ...     target=torch.func.jvp, args=(lambda x: (came.set(), over.wait(), x.sin())[2], (x,), (x,))
    ... )
    >>> torchs.start(); _ = came.wait()
    >>> autodiff.jvp(lambda x: (over.set(), torchs.join(), x.sin())[2], (x,), (x,))
    Traceback (most recent call last):
    autodiff.errors.ForwardLevelError: forward mode: another thread left torch's one forward-AD level, ...
    """


class ForwardRuleError(AutodiffError, NotImplementedError, RuntimeError):
    """An operation has no rule for this use of forward mode; another mode combination is needed.

    >>> import torch, autodiff
    >>> class Square(torch.autograd.Function):
    ...     @staticmethod
    ...     def forward(x):
    ...         return x * x
    ...     @staticmethod
    ...     def setup_context(ctx, inputs, output):
    ...         ctx.twice = 2 * inputs[0]  # neither an input nor an output
    ...     @staticmethod
    ...     def jvp(ctx, t):
    ...         return ctx.twice * t
    >>> autodiff.jacfwd(autodiff.jacfwd(Square.apply))(torch.tensor(3.0))
    Traceback (most recent call last):
    autodiff.errors.ForwardRuleError: ...
    """


class CaptureError(AutodiffError, RuntimeError):
    """A checkpointed function, or the function of an operator, captures a differentiated tensor and hides it.

    >>> import torch, autodiff
    >>> def loss(w):
    ...     block = autodiff.checkpoint(lambda x: autodiff.grad(lambda u: u**2 * x)(w))
    ...     return block(torch.tensor(2.0))
    >>> autodiff.vmap(autodiff.grad(loss))(torch.ones(3))
    Traceback (most recent call last):
    autodiff.errors.CaptureError: checkpoint: <lambda> captures a tensor that is differentiated, ...
    """


class MissingRuleError(AutodiffError, NotImplementedError):
    """torch has no second derivative of an operation, in any mode combination.

    >>> import torch, autodiff
    >>> loss = lambda x: torch.nn.functional.multi_margin_loss(x, torch.tensor([0]))
    >>> autodiff.hessian(loss)(torch.ones(1, 2))
    Traceback (most recent call last):
    autodiff.errors.MissingRuleError: hessian: torch has no second derivative of an operation of this function. ...
    """


class RuleError(AutodiffError, RuntimeError, TypeError):
    """A custom rule is missing, or returns what cannot be its function's derivative.

    >>> import torch, autodiff
    >>> autodiff.grad(autodiff.custom_vjp(lambda x: x**2))(torch.ones(()))
    Traceback (most recent call last):
    autodiff.errors.RuleError: custom_vjp: <lambda> is differentiated, but has no rule. ...
    """


class CloneError(AutodiffError, RuntimeError):
    """A module has an attribute that leads back to it and cannot be cloned, or it calls a layer that was not cloned.

    >>> import torch, autodiff
    >>> layer = torch.nn.Linear(2, 1)
    >>> layer.pending = iter([layer])
    >>> autodiff.functional_call(layer, {}, torch.ones(2))
    Traceback (most recent call last):
    autodiff.errors.CloneError: functional_call: Linear.pending is, or holds, a list_iterator that leads back ...
    """


class BufferWarning(UserWarning):
    """``functional_call`` discarded what a module wrote to a buffer that was not given.

    >>> import torch, autodiff, warnings
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     output = autodiff.functional_call(torch.nn.BatchNorm1d(1), {}, torch.ones(2, 1))
    >>> caught[0].message
    BufferWarning('functional_call: the module wrote to its buffers num_batches_tracked, which were not given. ...')
    """


class DegeneracyError(AutodiffError, RuntimeError):
    """The derivative of an eigenvector does not exist, since its eigenvalue is repeated.

    >>> import torch, autodiff
    >>> def last(d):
    ...     return autodiff.operators.eigsh(autodiff.operators.diagonal(d), 1)[1].sum()
    >>> autodiff.grad(last)(torch.ones(200))
    Traceback (most recent call last):
    autodiff.errors.DegeneracyError: operators.eigsh: ...
    """


class OptionError(AutodiffError, ValueError, RuntimeError):
    """An option has a value that is not allowed, such as ``chunk_size=0``.

    >>> import torch, autodiff
    >>> autodiff.hessian(torch.sum, chunk_size=0)
    Traceback (most recent call last):
    autodiff.errors.OptionError: hessian: `chunk_size` should be greater than 0. (got 0) ...
    """


class OptionCombinationError(OptionError, NotImplementedError):
    """Options that are each allowed, but not together.

    >>> import torch, autodiff
    >>> autodiff.functional.jacobian(
    ...     torch.sin, torch.ones(2), create_graph=True, strict=True, strategy="forward-mode"
    ... )
    Traceback (most recent call last):
    autodiff.errors.OptionCombinationError: torch.autograd.functional.jacobian: `create_graph=True` and ...
    """


class DerivativeError(AutodiffError, AssertionError):
    """A derivative is not that of the function's values, found by :mod:`autodiff.testing`.

    ``derivative`` and ``finite_difference`` are the two numbers, ``input`` and ``output`` name the leaves, and ``mode``
    and ``order`` say which derivative it is. What does not apply is None.

    >>> import torch, autodiff
    >>> wrong = lambda primals, tangents: (primals[0].sin(), tangents[0])
    >>> autodiff.testing.check_jvp(torch.sin, wrong, (torch.ones(2),))
    Traceback (most recent call last):
    autodiff.errors.DerivativeError: check_jvp: the derivative of output at [...] with respect to args[0], ...
    """

    def __init__(
        self,
        message: str,
        *,
        derivative: complex | None = None,
        finite_difference: complex | None = None,
        mode: str | None = None,
        order: int | None = None,
        output: str | None = None,
        input: str | None = None,  # noqa: A002
    ) -> None:
        super().__init__(message)
        self.derivative, self.finite_difference = derivative, finite_difference
        self.mode, self.order, self.output, self.input = mode, order, output, input


class SampleError(AutodiffError, RuntimeError):
    """``per_sample``'s function failed on a sample, or gave a result that is not finite.

    ``index`` is the sample's.

    >>> import torch, autodiff
    >>> autodiff.per_sample(autodiff.grad(torch.log))(torch.tensor([1.0, 0.0]))
    Traceback (most recent call last):
    autodiff.errors.SampleError: per_sample: sample 1: the result holds infinities or NaN. ...
    """

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


class BudgetError(AutodiffError, MemoryError):
    """``per_sample``'s results, or its smallest chunk, do not fit into its memory.

    >>> import torch, autodiff
    >>> autodiff.per_sample(autodiff.hessian(lambda x: (x**3).sum()), memory="1kB")(torch.ones(100, 5))
    Traceback (most recent call last):
    autodiff.errors.BudgetError: per_sample: the results of 100 samples take 9.8 KiB, more than the 1000 B ...
    """


class BudgetWarning(UserWarning):
    """The smallest piece of ``per_sample``'s work takes more memory than is allowed.

    >>> import torch, autodiff, warnings
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     sums = autodiff.per_sample(lambda x: x.sin().sum(), memory="1kB")(torch.ones(3, 1000))
    >>> caught[0].message
    BudgetWarning('per_sample: ...')
    """


class DataError(AutodiffError, ValueError, RuntimeError):
    """A data set that is gone through for every product of an operator is not the same each time.

    >>> import torch, autodiff
    >>> batches = (torch.ones(2) for _ in range(3))
    >>> autodiff.operators.hessian(torch.sum).over(batches)
    Traceback (most recent call last):
    autodiff.errors.DataError: operators.over(sum): expected batches that can be gone through for every product, ...
    """


class ResumeError(AutodiffError, RuntimeError, ValueError):
    """A file holds the results of another run, or is not one of ``per_sample``'s.

    >>> import torch, autodiff, tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".npy") as file:
    ...     autodiff.per_sample(torch.sin)(torch.ones(2), out=file.name)
    Traceback (most recent call last):
    autodiff.errors.ResumeError: per_sample: ... exists, but has no journal of per_sample beside it. ...
    """


class SolverError(AutodiffError, RuntimeError, ArithmeticError):
    """A solver cannot go on: the operator is not what its method needs, or its numbers are not finite.

    >>> import torch, autodiff
    >>> A = autodiff.operators.from_matrix(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
    >>> autodiff.operators.solve(A, torch.ones(2), "cg")
    Traceback (most recent call last):
    autodiff.errors.SolverError: operators.solve: expected a positive definite operator for method='cg', ...
    """


class SingularError(SolverError):
    """A matrix has no inverse, such as the Jacobian of an equation whose solution is differentiated.

    >>> import torch, autodiff
    >>> fit = autodiff.operators.minimum(lambda x, a: (x.sum() - a) ** 2)(lambda start, a: start + a / 2)
    >>> autodiff.grad(lambda a: fit(torch.zeros(2), a).sum())(torch.ones(()))
    Traceback (most recent call last):
    autodiff.errors.SingularError: operators.minimum: ...
    """


class ConvergenceWarning(UserWarning):
    """An iteration ended before its result was as exact as was asked for.

    >>> import torch, autodiff, warnings
    >>> A = autodiff.operators.diagonal(torch.tensor([1.0, 2.0, 3.0]))
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     x = autodiff.operators.solve(A, torch.ones(3), "cg", maxiter=1)
    >>> caught[0].message
    ConvergenceWarning('operators.solve: cg has not converged after 1 of 1 steps: ...
    """
