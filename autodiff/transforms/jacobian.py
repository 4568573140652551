"""Floor 2: Jacobians by rows (reverse) or by columns (forward). Builds on `core` and `linearize`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, assert_never

import torch

from autodiff.core import basis, checks, graph
from autodiff.core._torch import bottom, compiling, quiet_fallbacks
from autodiff.core.arguments import Call, wraps
from autodiff.core.batch import over_rows, remember_randomness
from autodiff.core.chunks import Chunks, Sizes, sizes_for
from autodiff.core.dual import push
from autodiff.core.tape import record
from autodiff.transforms.linearize import transpose

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from autodiff.core.arguments import Argnums, Wrt
    from autodiff.core.batch import Randomness
    from autodiff.core.chunks import ChunkSize
    from autodiff.core.tape import Tape

JacobianMode: TypeAlias = Literal["auto", "reverse", "forward"]

# Of (co)tangents, and ``last=``; None where nothing depends.
Product: TypeAlias = "Callable[..., list[Tensor | None]]"

# A block for each output and each primal, zeros where the one does not depend on the other.
Blocks: TypeAlias = "list[list[Tensor]]"

# So many numbers in a strip of rows, over all samples of a batch, that a pull of its own pays: a heuristic.
# The Hessian of one sample of an MLP with 433 parameters is 1.1 x slower in strips, that of 64 takes 0.35 x.
_WORTH_A_PULL = 2**18


def jacrev(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    chunk_size: ChunkSize = None,
    holomorphic: bool = False,
    strict: bool = False,
    wrt: Wrt = None,
) -> Callable[..., Any]:
    r"""Jacobian by reverse mode: one evaluation, then a pull for every number of the output.

    .. math:: \operatorname{jacrev}(f)(x)_{ij} = \partial f_i / \partial x_j

    >>> import torch
    >>> jacrev(lambda x: x[0] * x[1:])(torch.tensor([2.0, 3.0, 5.0]))
    tensor([[3., 2., 0.],
            [5., 0., 2.]])

    Args:
        func: a function of trees that returns a tree of floating or complex tensors, or a pair
            ``(output, aux)`` if ``has_aux``.
        argnums: which arguments to differentiate: a position, a parameter name, or a tuple of them.
        has_aux: whether ``func`` returns ``(output, aux)``.
        chunk_size: how many rows to pull in one batch; None pulls all, 1 pulls row by row without vmap,
            ``"auto"`` learns from the first rows how many fit in half of the free memory. The function
            runs once in any case.
        holomorphic: differentiate a complex function of complex arguments, with one complex derivative.
        strict: raise where an output does not depend on a leaf, instead of giving zeros.
        wrt: which leaves of these arguments to differentiate, by patterns of their places, as for
            :func:`autodiff.grad`.

    Returns:
        A function of ``func``'s arguments that returns a tree like the output, holding at every leaf a
        tree like the selected argument (a tuple of trees for a tuple of ``argnums``), holding at every
        floating leaf a block of shape ``(*out_shape, *in_shape)`` and the input's dtype, and None at
        other leaves. With ``has_aux`` it returns ``(jacobian, aux)``.

    Raises:
        OptionError: ``chunk_size`` is not a positive int, ``"auto"`` or None.
        DtypeError: complex tensors without ``holomorphic``, or real ones with it.
        OutputError: the output is empty, or holds something else than floating or complex tensors.
        ArgnumsError, LeafError: ``argnums`` or ``wrt`` does not fit the call, or selects nothing to differentiate.
        IndependenceError: ``strict`` and an output is independent of a leaf.
    """
    return by_mode("jacrev", func, argnums, "reverse", has_aux, chunk_size, holomorphic, strict, wrt=wrt)


def jacfwd(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    randomness: Randomness = "same",
    chunk_size: ChunkSize = None,
    holomorphic: bool = False,
    strict: bool = False,
    wrt: Wrt = None,
) -> Callable[..., Any]:
    r"""Jacobian by forward mode: a push for every number of the input, all in one evaluation.

    .. math:: \operatorname{jacfwd}(f)(x)_{ij} = \partial f_i / \partial x_j

    >>> import torch
    >>> jacfwd(lambda x: x[0] * x[1:])(torch.tensor([2.0, 3.0, 5.0]))
    tensor([[3., 2., 0.],
            [5., 0., 2.]])

    Args:
        func: as for :func:`jacrev`.
        argnums: as for :func:`jacrev`.
        has_aux: whether ``func`` returns ``(output, aux)``.
        randomness: ``"same"`` lets ``func`` draw random numbers; one draw serves all columns, also with
            ``"different"``, since all columns are derivatives of one function. ``"error"`` forbids it.
        chunk_size: how many columns to push in one batch; None pushes all, ``"auto"`` learns how many
            fit. The function runs once for every chunk, with the same random numbers.
        holomorphic: as for :func:`jacrev`.
        strict: raise where an output does not depend on the selected arguments.
        wrt: as for :func:`jacrev`.

    Returns:
        What :func:`jacrev` returns, with blocks of the output's dtype.

    Raises:
        OptionError: ``chunk_size`` is not a positive int, ``"auto"`` or None, or ``randomness`` is unknown.
        DtypeError: complex tensors without ``holomorphic``, or real ones with it.
        OutputError: the output is empty, or holds something else than floating or complex tensors.
        ArgnumsError, LeafError: ``argnums`` or ``wrt`` does not fit the call, or selects nothing to differentiate.
        IndependenceError: ``strict`` and an output is independent of the arguments.
    """
    return by_mode(
        "jacfwd", func, argnums, "forward", has_aux, chunk_size, holomorphic, strict, randomness, wrt=wrt
    )


def jacobian(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    mode: JacobianMode = "auto",
    has_aux: bool = False,
    chunk_size: ChunkSize = None,
    holomorphic: bool = False,
    strict: bool = False,
    wrt: Wrt = None,
) -> Callable[..., Any]:
    r"""Jacobian by the mode that needs fewer products.

    .. math:: \operatorname{jacobian}(f)(x)_{ij} = \partial f_i / \partial x_j

    ``"auto"`` evaluates ``func`` once and then takes whichever is smaller: a pull for each number of
    the output, or, by the pullback of the pullback, a push for each number of the input.

    >>> import torch
    >>> jacobian(lambda t: torch.stack([t, t**2, t**3]))(torch.tensor(2.0))
    tensor([ 1.,  4., 12.])

    Args:
        func: as for :func:`jacrev`.
        argnums: as for :func:`jacrev`.
        mode: ``"auto"``, ``"reverse"`` (:func:`jacrev`) or ``"forward"`` (:func:`jacfwd`).
        has_aux: whether ``func`` returns ``(output, aux)``.
        chunk_size: how many rows or columns to compute in one batch; ``"auto"`` learns how many fit.
        holomorphic: as for :func:`jacrev`.
        strict: raise where an output does not depend on a leaf, instead of giving zeros.
        wrt: which leaves of these arguments to differentiate, by patterns of their places, as for
            :func:`autodiff.grad`.

    Returns:
        What :func:`jacrev` returns.

    Raises:
        OptionError: ``mode`` is unknown, or ``chunk_size`` is not a positive int, ``"auto"`` or None.
        DtypeError: complex tensors without ``holomorphic``, or real ones with it.
        OutputError: the output is empty, or holds something else than floating or complex tensors.
        ArgnumsError, LeafError: ``argnums`` or ``wrt`` does not fit the call, or selects nothing to differentiate.
        IndependenceError: ``strict`` and an output is independent of a leaf.
    """
    return by_mode("jacobian", func, argnums, mode, has_aux, chunk_size, holomorphic, strict, wrt=wrt)


def by_mode(
    name: str,
    func: Callable[..., Any],
    argnums: Argnums,
    mode: JacobianMode,
    has_aux: bool = False,
    chunk_size: ChunkSize = None,
    holomorphic: bool | None = False,
    strict: bool = False,
    randomness: Randomness = "same",
    frugal: Callable[[], bool] | None = None,
    wrt: Wrt = None,
) -> Callable[..., Any]:
    """A Jacobian under the public name that the user called.

    ``frugal`` pulls rows in batches that take about the memory of single rows, and row by row where
    they cannot be batched, or where, asked after the function ran, it says no. ``holomorphic=None``
    takes any dtypes, with torch's own convention.
    """
    checks.chunk_size(name, chunk_size)
    checks.allowed(name, "mode", mode, ("auto", "reverse", "forward"))
    checks.randomness(name, randomness)

    @wraps(func)
    def jacobian_of(*args: Any, **kwargs: Any) -> Any:
        call = Call(name, func, args, kwargs, argnums, has_aux, wrt)
        checks.complex_pairing(name, call.primals, holomorphic, "inputs")
        match mode:
            case "forward":
                blocks, aux = _columns(call, chunk_size, randomness, holomorphic, strict)
            case "reverse" | "auto":
                blocks, aux = _rows(call, chunk_size, mode, holomorphic, strict, frugal)
            case _:
                assert_never(mode)
        # J: [tree(out), tree(in), *out_shape, *in_shape]
        nested = call.like_output([call.like_arguments(of_output) for of_output in blocks])
        return (nested, call.aux(aux)) if has_aux else nested

    return jacobian_of


def _rows(
    call: Call,
    chunk_size: ChunkSize,
    mode: JacobianMode,
    holomorphic: bool | None,
    strict: bool,
    frugal: Callable[[], bool] | None,
) -> tuple[Blocks, list[Any]]:
    """One evaluation, then the rows by pulls, or with "auto" the columns where there are fewer."""
    tape = record(call.evaluate, call.primals)
    outputs = tape.outputs
    checks.tensor_outputs(call.name, outputs, call.path_of_output, any_dtype=holomorphic is None)
    checks.complex_pairing(call.name, outputs, holomorphic, "outputs")
    if strict:
        _check_rows(call, tape)
    sizes = sizes_for(chunk_size, call.primals)
    if mode == "auto" and basis.size_of(call.primals) < basis.size_of(outputs):
        move = transpose(tape)

        def without_last(tangents: list[Tensor], *, last: bool) -> list[Tensor | None]:
            del last
            return move(tangents)

        columns = _stacked(without_last, call.primals, sizes)
        return _by_columns(call, outputs, columns), tape.aux

    def pull(cotangents: Sequence[Tensor | None], *, last: bool) -> list[Tensor | None]:
        pulled = tape.pull(cotangents, retain_graph=frugal is not None or not last)
        # The engine pulls by the conjugate transpose.
        return [None if p is None else p.conj() for p in pulled] if holomorphic else pulled

    if frugal is not None and not compiling():
        return _frugal_blocks(pull, tape, call.primals, batched=frugal()), tape.aux
    blocks: Blocks = []
    groups = _groups(outputs, call.primals)
    for group in groups:
        pull_group = _of_group(pull, group, len(outputs), is_last=group is groups[-1])
        rows = _stacked(pull_group, outputs[group], sizes)
        blocks += _by_rows(rows, outputs[group], call.primals)
    return blocks, tape.aux


def _groups(outputs: Sequence[Tensor], primals: Sequence[Tensor]) -> list[slice]:
    """Which outputs are pulled together: a large one alone, small neighbours in one batch.

    Rows of one output leave the operations that lead to the others alone, which a batch over all of them
    would feed with zeros. But every pull costs some 0.2 ms, whatever its size.
    """
    if compiling():
        return [slice(0, len(outputs))]
    width = basis.size_of(primals)
    groups, start, waiting = [], 0, 0
    for position, output in enumerate(outputs):
        strip = bottom(output).numel() * width
        if strip >= _WORTH_A_PULL:
            if waiting:
                groups.append(slice(start, position))
            groups.append(slice(position, position + 1))
            start, waiting = position + 1, 0
            continue
        waiting += strip
        if waiting >= _WORTH_A_PULL:
            groups.append(slice(start, position + 1))
            start, waiting = position + 1, 0
    if start < len(outputs):
        groups.append(slice(start, len(outputs)))
    return groups


def _of_group(pull: Product, group: slice, count: int, *, is_last: bool = True) -> Product:
    """``pull`` of the cotangents of a group of outputs alone."""
    before, after = [None] * group.start, [None] * (count - group.stop)

    def pull_group(rows: Sequence[Tensor], *, last: bool) -> list[Tensor | None]:
        return pull([*before, *rows, *after], last=last and is_last)

    return pull_group


def _by_rows(rows: Sequence[Tensor | None], outputs: Sequence[Tensor], primals: Sequence[Tensor]) -> Blocks:
    by_input = [
        basis.row_blocks(of_primal, outputs, primal) for of_primal, primal in zip(rows, primals, strict=True)
    ]
    return [list(of_output) for of_output in zip(*by_input, strict=True)]


def _frugal_blocks(pull: Product, tape: Tape, primals: Sequence[Tensor], *, batched: bool) -> Blocks:
    """Rows of one output after the other, in batches where a batched pull is possible.

    A pull never runs the user's function again, so a batch that fails costs only its own time.
    """
    blocks: Blocks = []
    count = len(tape.outputs)
    chunk_sizes = _frugal_chunks(tape, primals) if batched else [1] * count
    for position, (output, chunk_size) in enumerate(zip(tape.outputs, chunk_sizes, strict=True)):
        pull_one = _of_group(pull, slice(position, position + 1), count)
        try:
            with quiet_fallbacks():
                rows = _stacked(pull_one, [output], Sizes(chunk_size))
        except Exception:
            # Some backward passes cannot be batched: they read a value, or write in place. What they
            # raise then is theirs to choose.
            if chunk_size == 1:
                raise
            rows = _stacked(pull_one, [output], Sizes(1))
        blocks += _by_rows(rows, [output], primals)
    return blocks


def _frugal_chunks(tape: Tape, primals: Sequence[Tensor]) -> list[int]:
    """How many rows of each output keep the peak within about half of what single rows need.

    Single rows need the graph, and the result twice: as rows and stacked. A batched pull has about
    three of its largest cotangents alive at a time (a heuristic).
    """
    if graph.is_wrong_in_batches(tape.ends):
        return [1] * len(tape.outputs)
    total, largest = graph.bytes_of_a_pull(tape.ends)
    row = sum(primal.numel() * primal.element_size() for primal in primals)
    budgets = [(total + 2 * row * output.numel()) // 2 for output in tape.outputs]
    return [max(1, budget // max(3 * largest + row, 1)) for budget in budgets]


def _columns(
    call: Call, chunk_size: ChunkSize, randomness: Randomness, holomorphic: bool | None, strict: bool
) -> tuple[Blocks, list[Any]]:
    """One evaluation for every chunk of columns."""
    seen: list[Any] = []
    aux: list[Any] = []

    def pushed(tangents: list[Tensor], *, last: bool) -> list[Tensor | None]:
        del last
        if rewind is not None:
            rewind()
        result = push(call.evaluate, call.primals, tangents)
        checks.tensor_outputs(call.name, result.outputs, call.path_of_output, any_dtype=holomorphic is None)
        checks.complex_pairing(call.name, result.outputs, holomorphic, "outputs")
        if strict:
            for position, tangent in enumerate(result.tangents):
                if tangent is None:
                    checks.depends(call.name, call.path_of_output(position), call.root, output=position)
        seen[:], aux[:] = result.outputs, result.aux
        return result.tangents

    draws: Randomness = "error" if randomness == "error" else "same"
    # Every chunk runs the function again, and has to see the same random numbers.
    rewind = None if chunk_size is None else remember_randomness(call.primals)
    columns = _stacked(pushed, call.primals, sizes_for(chunk_size, call.primals), draws)
    return _by_columns(call, seen, columns), aux


def _stacked(
    product: Product,
    leaves: Sequence[Tensor],
    sizes: Sizes,
    randomness: Randomness = "same",
) -> list[Tensor | None]:
    """``product`` of every standard basis vector of the leaves' space, stacked.

    A single vector needs no batch: its product is taken as it is. ``product`` is also told whether it
    is called for the ``last`` time.
    """
    chunks = Chunks(basis.size_of(leaves), sizes)

    def of_rows(start: int, stop: int) -> list[Tensor | None]:
        vectors = basis.standard_basis(leaves, start, max(stop, 1))
        # A chunk of a learnt size may have to be repeated.
        last = stop == chunks.total and not sizes.adapts
        if stop - start > 1:
            return over_rows(partial(product, last=last), vectors, stop - start, randomness)
        # One vector, or none: then one product still says what the results would look like.
        results = product([vector.squeeze(0) for vector in vectors], last=last)
        return [None if result is None else result.unsqueeze(0)[: stop - start] for result in results]

    count = 0
    for start, stop, pieces in chunks.each(of_rows):
        count = len(pieces)
        for key, piece in enumerate(pieces):
            chunks.add(key, start, stop, piece)
    return [chunks.whole(key) for key in range(count)]


def _by_columns(call: Call, outputs: Sequence[Tensor], columns: Sequence[Tensor | None]) -> Blocks:
    return [
        basis.column_blocks(of_output, output, call.primals)
        for of_output, output in zip(columns, outputs, strict=True)
    ]


def _check_rows(call: Call, tape: Tape) -> None:
    """Raise for the first output that no operation connects to a primal."""
    for position in range(len(tape.outputs)):
        seeds = [torch.ones_like(one) if at == position else None for at, one in enumerate(tape.outputs)]
        for index, cotangent in enumerate(tape.pull(seeds, retain_graph=True, create_graph=False)):
            if cotangent is None:
                paths = call.path_of_output(position), call.path_of_primal(index)
                checks.depends(call.name, *paths, output=position, primal=index)
