"""A function of one sample as a function of a batch. Builds on `core` alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from autodiff import checks
from autodiff._torch import MESSAGES, compiling, traced_inline_only
from autodiff.checks import batching
from autodiff.checks.consistency import OutputConsistency, is_same
from autodiff.core import batch, trees
from autodiff.core.call import parameter_names, wraps
from autodiff.core.chunks import Chunks, Sizes, sizes_for
from autodiff.core.randomness import has_drawn, random_state, remember_randomness, set_random_state
from autodiff.core.trees import Spec
from autodiff.types import ChunkSize, Fallback, P, R, Randomness

# By these words torch says that a function cannot be batched.
_LOOP = (
    "the function branches on data, or reads a value out of a tensor, which a batch cannot. Use torch.where, or "
    "let vmap run it sample by sample: vmap(func, fallback='loop')."
)


def vmap(
    func: Callable[P, R],
    in_dims: Any = 0,
    out_dims: Any = 0,
    randomness: Randomness = "error",
    *,
    chunk_size: ChunkSize = None,
    fallback: Fallback = None,
) -> Callable[P, R]:
    r"""A function of one sample, made a function of a whole batch of them.

    .. math:: \operatorname{vmap}(f)(X)_n = f(X_n)

    >>> import torch
    >>> from autodiff import grad
    >>> vmap(torch.dot)(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 1.0], [0.0, 2.0]]))
    tensor([3., 8.])
    >>> vmap(lambda x, scale: x * scale, in_dims={"x": 0, "scale": None})(torch.ones(2), scale=3.0)
    tensor([3., 3.])
    >>> relu = vmap(grad(lambda x: x**2 if x > 0 else 0 * x), fallback="loop")
    >>> relu(torch.tensor([-1.0, 2.0, 3.0]))
    tensor([0., 4., 6.])

    Args:
        func: a function of trees that returns a tree. Leaves of its result that are no tensors must be
            the same for all samples; they are returned as they are.
        in_dims: which dimension of each leaf counts the samples: an int for all leaves, a tree whose
            structure begins that of the positional arguments, with None for what all samples share, or
            a dict from parameter names to such entries. What it does not name is shared, as are keyword
            arguments without a dict, and what ``*args`` collects beside one.
        out_dims: where the samples' dimension goes in each output: an int, or a tree whose structure
            begins that of the output, with None for an output that does not depend on the sample.
        randomness: ``"error"`` forbids random operations, ``"different"`` draws for each sample,
            ``"same"`` draws once for all.
        chunk_size: how many samples to compute in one batch; None computes all, ``"auto"`` learns from
            the first samples how many fit in half of the free memory. Less takes less memory, unless the
            results are tracked: a captured parameter that requires grad keeps every graph.
        fallback: ``"loop"`` runs a function that cannot be batched (it branches on data, or calls
            ``.item()``) sample by sample, also where that is the function of a transform inside, as in
            ``vmap(grad(f), fallback="loop")``, and where ``vmap`` itself is differentiated.

    Returns:
        A function of ``func``'s arguments with a batch dimension, whose outputs have one.

    Raises:
        BatchError: ``in_dims`` or ``out_dims`` do not fit the arguments or results, the batches differ in
            size, or samples that are computed one after the other give other containers, shapes, or values of
            what is no tensor.
        OptionError: ``chunk_size``, ``randomness`` or ``fallback`` has no documented value.
        RuntimeError: torch's, for what cannot be batched, or draws random numbers.
        RandomnessError: the loop draws random numbers, and ``randomness="error"``.
    """
    checks.chunk_size("vmap", chunk_size)
    checks.randomness("vmap", randomness)
    checks.choice("vmap", "fallback", fallback, (None, "loop"))
    batching.out_dims_type("vmap", out_dims)
    # What was learnt for arguments of the last call's shapes.
    learnt: dict[Any, Sizes] = {}

    def sizes_of(mapped: Mapped) -> Sizes:
        if chunk_size != "auto":
            return Sizes(chunk_size)
        kind = mapped.memory_signature()
        if kind not in learnt:
            learnt.clear()
            learnt[kind] = sizes_for(chunk_size, trees.leaves(mapped.leaves))
        return learnt[kind]

    @wraps(func)
    def batched(*args: Any, **kwargs: Any) -> Any:
        mapped = Mapped(func, in_dims, out_dims, args, kwargs)
        if fallback is None or compiling():
            try:
                return mapped.run(randomness, sizes_of(mapped))
            except RuntimeError as error:
                checks.advise("vmap", error, MESSAGES["cannot be batched"], _LOOP)
                raise
        rewind = remember_randomness()
        try:
            return mapped.run(randomness, sizes_of(mapped))
        except RuntimeError:
            if mapped.size == 0:
                raise
            rewind()
        return mapped.run_by_sample(randomness)

    return batched


class Mapped:
    """One call of a function under vmap: leaves with their dims, and how to put results together."""

    __slots__ = (
        "__weakref__",
        "_consistency",
        "_func",
        "_name",
        "_out_dims",
        "_spec",
        "_where",
        "dims",
        "leaves",
        "out_dims",
        "out_spec",
        "size",
    )

    out_spec: Spec
    out_dims: list[int | None]

    def __init__(
        self,
        func: Callable[..., Any],
        in_dims: Any,
        out_dims: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        name: str = "vmap",
    ) -> None:
        self._func, self._out_dims, self._name = func, out_dims, name
        self.leaves, self.dims, self._spec, where = _batched_leaves(name, func, in_dims, args, kwargs)
        mapped = [
            (path, leaf.shape[dim])
            for path, leaf, dim in zip(where, self.leaves, self.dims, strict=True)
            if dim is not None
        ]
        batching.batch_sizes(self._name, [path for path, _ in mapped], [size for _, size in mapped])
        self.size = mapped[0][1]
        # Where chunks are put together: what they have to agree in, and the samples of the one that is computed.
        self._consistency: OutputConsistency | None = None
        self._where = ""

    def with_zero_sample(self) -> Mapped:
        """The same call with one sample of zeros."""
        copied = copy.copy(self)
        pairs = zip(self.leaves, self.dims, strict=True)
        copied.leaves = [
            leaf
            if dim is None
            else leaf.new_zeros([1 if at == dim else n for at, n in enumerate(leaf.shape)])
            for leaf, dim in pairs
        ]
        copied.size = 1
        return copied

    def arguments(self, *, mapped: bool) -> Any:
        """The arguments with what is mapped, or with what is shared; empty tensors stand for the others."""
        pairs = zip(self.leaves, self.dims, strict=True)
        kept = [
            leaf.new_empty(0) if (dim is None) is mapped and isinstance(leaf, Tensor) else leaf
            for leaf, dim in pairs
        ]
        return [self.dims, trees.unflatten(self._spec, kept)]

    def memory_signature(self) -> tuple[Any, ...]:
        """What the memory that one sample takes depends on: shapes without the batch, and dtypes."""
        pairs = zip(self.leaves, self.dims, strict=True)
        return tuple(
            (tensor.dtype, *(size for at, size in enumerate(tensor.shape) if at != dim))
            for leaf, dim in pairs
            for tensor in trees.leaves(leaf)
            if isinstance(tensor, Tensor)
        )

    @traced_inline_only
    def run(self, randomness: Randomness, sizes: Sizes) -> Any:
        """All samples, in one batch or in chunks of it."""
        chunks = Chunks(self.size, sizes)
        self._consistency = None if chunks.in_one_chunk else OutputConsistency(self._name)
        rewind = None if chunks.in_one_chunk or randomness != "same" else remember_randomness()

        def compute(start: int, stop: int) -> list[Any]:
            if rewind is not None:
                rewind()
            if self._consistency is not None:
                self._where = f"samples {start} to {stop - 1}" if stop - start > 1 else f"sample {start}"
            return self.of_samples(start, stop, randomness)

        last: list[Any] = []

        def keep(start: int, stop: int, results: list[Any]) -> None:
            last[:] = results
            for key, (result, dim) in enumerate(zip(results, self.out_dims, strict=True)):
                if dim is not None:
                    chunks.add(key, start, stop, result, dim)

        chunks.each(compute, keep)
        return self._assembled(chunks, last)

    def of_samples(self, start: int, stop: int, randomness: Randomness) -> list[Any]:
        """The leaves of the results of samples ``start`` to ``stop``, in one batch."""
        count = stop - start
        pieces = self.leaves if count == self.size else self._each(batch.narrow, start, count)
        return batch.run(self._call, pieces, self.dims, count, randomness, self._destinations)

    def sample(self, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of one sample."""
        args, kwargs = trees.unflatten(self._spec, self._each(batch.select, index))
        return args, kwargs

    def run_by_sample(self, randomness: Randomness) -> Any:
        """All samples, one after the other, without a batching level."""
        chunks = Chunks(self.size, Sizes(1))
        self._consistency = OutputConsistency(self._name)
        state = random_state()
        before: list[Any] = []

        def of_sample(sample: int, _: int) -> list[Any]:
            if randomness == "same":
                set_random_state(state)
            self._where = f"sample {sample}"
            results = self._call(self._each(batch.select, sample))
            if randomness == "error" and has_drawn(state):
                set_random_state(state)
                batching.raise_random_numbers_drawn(self._name)
            return results

        def keep(sample: int, after: int, results: list[Any]) -> None:
            pairs = zip(self._broadcast_out_dims(), results, before or results, strict=True)
            differs = [dim is None and not is_same(one, other) for dim, one, other in pairs]
            for key, dim in enumerate(self._destinations(results, differs)):
                if dim is not None:
                    chunks.add(key, sample, after, results[key].unsqueeze(dim), dim)
            before[:] = results

        chunks.each(of_sample, keep)
        return self._assembled(chunks, before)

    def _call(self, leaves: Sequence[Any]) -> list[Any]:
        args, kwargs = trees.unflatten(self._spec, leaves)
        results, self.out_spec = trees.flatten(self._func(*args, **kwargs), batches=True)
        if self._consistency is not None:
            results, self.out_spec = self._consistency.match(results, self.out_spec, self._where)
        return results

    def _each(self, part: Callable[..., Any], *of_dim: int) -> list[Any]:
        pairs = zip(self.leaves, self.dims, strict=True)
        return [leaf if dim is None else part(leaf, dim, *of_dim) for leaf, dim in pairs]

    def _assembled(self, chunks: Chunks, results: list[Any]) -> Any:
        return trees.unflatten(
            self.out_spec,
            [
                result if dim is None else chunks.assembled(key, dim)
                for key, (result, dim) in enumerate(zip(results, self.out_dims, strict=True))
            ],
        )

    def _destinations(self, results: list[Any], batched: list[bool]) -> list[int | None]:
        """Where each output's batch goes; None for what is no tensor."""
        wanted = self._broadcast_out_dims()
        self.out_dims = []
        for position, (result, dim) in enumerate(zip(results, wanted, strict=True)):
            if not isinstance(result, Tensor) and not trees.hides_batches(result):
                self.out_dims.append(None)
                continue
            dims = result.dim() + 1
            if dim is None or not -dims <= dim < dims:
                path = trees.paths(self.out_spec, "output")[position]
                batching.out_dim(self._name, path, dim, result, batched[position])
            self.out_dims.append(dim if dim is None else dim % dims)
        return self.out_dims

    def _broadcast_out_dims(self) -> list[int | None]:
        count = self.out_spec.num_leaves
        if self._out_dims is None or isinstance(self._out_dims, int):
            return [self._out_dims] * count
        prefix = self._out_dims
        if self.out_spec.is_leaf() and isinstance(prefix, tuple) and len(prefix) == 1:
            prefix = prefix[0]
        values = trees.broadcast(prefix, self.out_spec)
        if values is None:
            batching.raise_out_dims_structure(self._name, self._out_dims, self.out_spec)
        return [dim for dim, _ in values]


def _batched_leaves(
    name: str, func: Callable[..., Any], in_dims: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], list[int | None], Spec, list[str]]:
    """The leaves of ``(args, kwargs)``, the dim and the path of each, and the structure."""
    batching.in_dims_type(name, in_dims)
    if not args and not kwargs:
        batching.raise_no_inputs(name)
    leaves, spec = trees.flatten((args, kwargs), batches=True)
    args_spec, kwargs_spec = spec.children()
    if isinstance(in_dims, dict):
        positions, named = _by_name(name, func, in_dims, args, kwargs)
    else:
        positions, named = in_dims, dict.fromkeys(kwargs)
    of_args = trees.broadcast(positions, args_spec)
    of_kwargs = trees.broadcast(named, kwargs_spec)
    if of_args is None:
        batching.raise_in_dims_structure(name, in_dims, positions, args_spec)
    if of_kwargs is None:
        batching.raise_in_dims_structure(name, in_dims, named, kwargs_spec)
    where = trees.paths(args_spec, "args") + trees.paths(kwargs_spec, "kwargs")
    dims: list[int | None] = []
    alone = [child.is_leaf() for child in args_spec.children() for _ in range(child.num_leaves)]
    alone += [False] * len(of_kwargs)
    pairs = zip(where, leaves, [*of_args, *of_kwargs], alone, strict=True)
    for position, (path, leaf, (dim, exact), argument) in enumerate(pairs):
        # A number or string inside a tree that one in_dim stands for is the same for all samples; as
        # an argument of its own it is a mistake.
        top = argument and not isinstance(in_dims, dict)
        if not isinstance(leaf, Tensor):
            if trees.hides_batches(leaf):
                leaves[position] = leaf = batch.container_with_dim(leaf, dim)  # noqa: PLW2901
            elif not exact and not top:
                dims.append(None)
                continue
        batching.in_dim(name, in_dims, path, dim, leaf)
        dims.append(dim if dim is None else dim % leaf.dim())
    return leaves, dims, spec, where


def _by_name(
    name: str,
    func: Callable[..., Any],
    in_dims: dict[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The dims that a dict names, for the positional and for the keyword arguments."""
    names = parameter_names(func)[: len(args)]
    for unknown in in_dims:
        if unknown not in names and unknown not in kwargs:
            batching.raise_unknown_in_dims_name(name, unknown, [*names, *kwargs])
    positions = [in_dims.get(name) for name in names] + [None] * (len(args) - len(names))
    return tuple(positions), {key: in_dims.get(key) for key in kwargs}
