"""`per_sample`, which turns a function of one sample into one of many, and the ways to take its results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from autodiff import checks
from autodiff._torch import traced_inline_only
from autodiff.core.memory import parse_bytes
from autodiff.core.progress import Progress
from autodiff.samples.evaluator import Evaluator, name_of
from autodiff.samples.report import Report
from autodiff.samples.run import Chunk, Options, Run
from autodiff.types import ChunkSize, OnError, Randomness


def per_sample(
    func: Callable[..., Any],
    in_dims: Any = 0,
    *,
    chunk_size: ChunkSize = "auto",
    row_chunk_size: ChunkSize = "auto",
    memory: int | str | None = None,
    as_matrix: bool = False,
    on_error: OnError = "raise",
    randomness: Randomness = "error",
    progress: bool = False,
) -> PerSample:
    r"""Turn a function of one sample into a function of any number of samples, in bounded memory.

    .. math:: \operatorname{per\_sample}(f)(X)_n = f(X_n)

    What :func:`vmap` does in one batch, this does in chunks whose size it learns: the first is one sample,
    its peak of memory sets the next. Where one sample of a Hessian or of a Jacobian by pulls is too large,
    its rows are computed in chunks. Results are constants: nothing is recorded for a later backward.

    >>> import torch
    >>> from autodiff import hessian
    >>> loss = lambda w, x, y: (w @ x - y) ** 2
    >>> curvature = per_sample(hessian(loss), in_dims=(None, 0, 0))
    >>> X, Y = torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.zeros(2)
    >>> curvature(torch.ones(2), X, Y)  # 2 x x^T of each sample
    tensor([[[2., 0.],
             [0., 0.]],
    <BLANKLINE>
            [[2., 4.],
             [4., 8.]]])
    >>> curvature.map(torch.trace, torch.ones(2), X, Y)
    tensor([ 2., 10.])

    Args:
        func: a function of one sample: a transform such as ``hessian(loss)``, or any function of trees
            that returns a tree of tensors.
        in_dims: which dimension of each leaf counts the samples: an int for all, a tree that begins like the
            positional arguments, with None for what samples share, or a dict from parameter names to such entries.
        chunk_size: how many samples to compute at once; ``"auto"`` learns it, None takes all.
        row_chunk_size: how many rows of a Hessian or Jacobian to compute at once where samples are
            taken one by one; ``"auto"`` learns it, and does so only where one sample is too large; a
            number takes samples one by one; None never splits a sample.
        memory: what the run may take beyond what is in use when it starts, in bytes or as in
            ``"512MiB"``: results included, unless ``out`` takes them. None: half of what is free.
        as_matrix: give the Hessian or Jacobian of each sample as one matrix ``[M, N]`` over all leaves,
            in the order of :func:`autodiff.pytree.to_matrix`.
        on_error: ``"raise"`` stops at a sample on which ``func`` fails or gives infinities or NaN;
            ``"nan"`` fills its result with NaN and lists it in ``report.failed``.
        randomness: ``"error"`` forbids random operations, ``"different"`` draws for each sample, ``"same"`` once.
        progress: show a bar with samples per second and memory (needs tqdm).

    Returns:
        A :class:`.PerSample`: call it with ``func``'s arguments for all results, each with the samples
        in front; or take them by its ``stream`` and ``map``.

    Raises:
        OptionError: an option has no documented value.
        BatchError: ``in_dims`` does not fit the arguments, or the batches differ in size.
        SampleError: a sample failed, with ``on_error="raise"``; ``index`` says which.
        BudgetError: the results do not fit into ``memory``, or a chunk cannot be made small enough.
    """
    name = "per_sample"
    checks.chunk_size(name, chunk_size)
    checks.chunk_size(name, row_chunk_size)
    checks.randomness(name, randomness)
    checks.choice(name, "on_error", on_error, ("raise", "nan"))
    budget = None if memory is None else parse_bytes(name, memory)
    Evaluator(func, in_dims, randomness, as_matrix=as_matrix)  # whether the options fit the function
    if progress:
        Progress.check("per_sample")
    options = Options(chunk_size, row_chunk_size, budget, as_matrix, on_error, randomness, progress)
    return PerSample(func, in_dims, options)


class PerSample:
    """What :func:`autodiff.per_sample` returns. ``report`` tells of the last run, None before the first.

    >>> import torch
    >>> squares = per_sample(torch.square)
    >>> X = torch.arange(5.0)
    >>> squares(X)
    tensor([ 0.,  1.,  4.,  9., 16.])
    >>> squares.map(torch.sqrt, X)
    tensor([0., 1., 2., 3., 4.])
    >>> sum(chunk.result.sum() for chunk in squares.stream(X))
    tensor(30.)
    >>> squares.report.samples
    5
    """

    def __init__(self, func: Callable[..., Any], in_dims: Any, options: Options) -> None:
        self._func, self._in_dims, self._options = func, in_dims, options
        self.report: Report | None = None
        # The chunk sizes that were learnt, for samples of the last call's shapes.
        self._learnt: dict[Any, list[Any]] = {}

    def __repr__(self) -> str:
        options = self._options
        shown = (
            f"per_sample({name_of(self._func)}, in_dims={self._in_dims}, chunk_size={options.chunk_size!r})"
        )
        return shown if self.report is None else f"{shown}\n{self.report}"

    def __call__(self, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        """All results.

        Args:
            args: ``func``'s positional arguments, with the samples where ``in_dims`` says. In place of all
                mapped ones may stand one iterable of batches, such as a ``DataLoader``, that is not a tree:
                each batch holds the mapped arguments, in order, with any number of samples.
            out: where results go: nothing for new tensors; a tensor, NumPy array or memmap, or a tree of
                them like the result, with the samples in front; or a path. A path that ends in ``.npy`` is
                one file, any other a folder with a file for each tensor of the result. A run to a path that
                was interrupted continues where it stopped when it is started again with the same function,
                arguments and options, and computes the chunks that one run would have.
            kwargs: ``func``'s keyword arguments, shared by all samples unless ``in_dims`` is a dict that names them.

        Returns:
            A tree like ``func``'s result, with the samples in front of every tensor. Tensors on disk are
            mapped, privately: writing to them leaves the file alone.

        Raises:
            ResumeError: the path holds results of another run, or something else.
            ShapeError: ``out``'s tensors do not have the results' keys, shapes, dtypes or number of samples.
            OptionError: ``out`` cannot be written to, or overlaps itself or an argument.
        """
        return self._collected(None, args, kwargs, out)

    def map(self, reduce: Callable[[Any], Any], *args: Any, out: Any = None, **kwargs: Any) -> Any:
        """``reduce`` of each sample's result, taken before the next chunk is made.

        Args:
            reduce: a function of one sample's result, such as ``torch.linalg.eigvalsh``. Where it cannot be
                batched it is called sample by sample.
            args: ``func``'s positional arguments, with the samples, or one iterable of batches of the mapped ones.
            out: where results go: nothing for new tensors, a tensor or array or a tree of them, or a path.
            kwargs: ``func``'s keyword arguments.

        Returns:
            A tree like ``reduce``'s result, with the samples in front.
        """
        return self._collected(reduce, args, kwargs, out)

    @traced_inline_only
    def stream(self, *args: Any, **kwargs: Any) -> Iterator[Chunk]:
        """The results, chunk by chunk, as a :class:`.Chunk` each.

        While the next chunk is computed, the loop's own variable still refers to the last; ``memory`` counts both.

        Args:
            args: ``func``'s positional arguments, with the samples, or one iterable of batches of the mapped ones.
            kwargs: ``func``'s keyword arguments.

        Returns:
            An iterator of chunks, in the order of the samples.
        """
        checks.untraced_call("per_sample")
        return self._run(args, kwargs, kept_results=1 + self._options.as_matrix, whole_results=2).stream()

    @traced_inline_only
    def _collected(
        self, reduce: Callable[[Any], Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Any:
        checks.untraced_call("per_sample")
        # To be reduced, a matrix is put together beside its blocks.
        kept = 0 if reduce is None else int(self._options.as_matrix)
        run = self._run(args, kwargs, kept_results=kept, whole_results=0 if reduce is None else 1)
        return run.collect(out, reduce)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any], **in_memory: int) -> Run:
        run = Run(self._func, self._in_dims, self._options, self._learnt, args, kwargs, **in_memory)
        self.report = run.report
        return run
