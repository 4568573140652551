"""Floor 2: the blocks of a Jacobian, by pulls of rows or by pushes of columns.

What the Jacobians, the Hessian and autodiff.functional have in common. Builds on `core` and `linearize`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, assert_never

import torch

from autodiff import checks
from autodiff._torch import bottom, compiling, quiet_fallbacks, whole
from autodiff.core import graph, seeds
from autodiff.core.batch import over_rows, remember_randomness, the_same_for_all
from autodiff.core.call import Call, wraps
from autodiff.core.chunks import Chunks, Sizes, sizes_for
from autodiff.core.forward import push
from autodiff.core.reverse import conjugated, record, transpose
from autodiff.transforms.mode_combinations import first_that_has_rules

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from autodiff.core.batch import Randomness
    from autodiff.core.call import Argnums, Wrt
    from autodiff.core.chunks import ChunkSize
    from autodiff.core.reverse import Tape

JacobianMode: TypeAlias = Literal["auto", "reverse", "forward"]

# Of (co)tangents, and ``last=``; None where nothing depends.
Product: TypeAlias = "Callable[..., list[Tensor | None]]"

# A block for each output and each primal, zeros where the one does not depend on the other.
Blocks: TypeAlias = "list[list[Tensor]]"

# So many numbers in a strip of rows, over all samples of a batch, that a pull of its own pays: a heuristic.
# The Hessian of one sample of an MLP with 433 parameters is 1.1 x slower in strips, that of 64 takes 0.35 x.
_WORTH_A_PULL = 2**18
# So many bytes more or less are nobody's concern, and rows of tiny functions all go into one batch.
_NEGLIGIBLE = 2**16


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
    inner: bool = False,
    others: Callable[[], Sequence[Callable[..., Any]]] = tuple,
) -> Callable[..., Any]:
    """A Jacobian under the public name that the user called.

    ``frugal`` pulls rows in batches that take about the memory of single rows, and row by row where
    they cannot be batched, or where, asked after the function ran, it says no. ``holomorphic=None``
    takes any dtypes, with torch's own convention. ``inner`` says that it is only called by another Jacobian
    of the same transform. ``others`` are the same Jacobian by other orders, for where a rule is missing in this one.
    """
    checks.chunk_size(name, chunk_size)
    checks.choice(name, "mode", mode, ("auto", "reverse", "forward"))
    checks.randomness(name, randomness)
    recipe = Recipe(
        name,
        func,
        argnums,
        mode,
        has_aux,
        chunk_size,
        holomorphic,
        strict,
        randomness,
        frugal,
        wrt,
        inner,
        others,
    )

    @wraps(func)
    def jacobian_of(*args: Any, **kwargs: Any) -> Any:
        call, blocks, aux = recipe.blocks(args, kwargs)
        # J: [tree(out), tree(in), *out_shape, *in_shape]
        nested = call.like_output([call.like_arguments(of_output) for of_output in blocks])
        return (nested, call.aux(aux)) if has_aux else nested

    if not compiling():
        jacobian_of.recipe = recipe  # type: ignore[attr-defined]
    return jacobian_of


class Strip(NamedTuple):
    """Some rows of one output's blocks, from row ``first`` on: ``blocks[k]`` is ``[rows, *in_shape]``."""

    output: int
    first: int
    blocks: list[Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a Jacobian is made: what :func:`by_mode` was told."""

    name: str
    func: Callable[..., Any]
    argnums: Argnums
    mode: JacobianMode
    has_aux: bool
    chunk_size: ChunkSize
    holomorphic: bool | None
    strict: bool
    randomness: Randomness
    frugal: Callable[[], bool] | None
    wrt: Wrt
    inner: bool
    others: Callable[[], Sequence[Callable[..., Any]]]

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """One call, checked at the door."""
        call = Call(self.name, self.func, args, kwargs, self.argnums, self.has_aux, self.wrt)
        checks.holomorphic_dtypes(self.name, call.primals, self.holomorphic, "inputs")
        return call

    @whole
    def blocks(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Blocks, list[Any]]:
        """The call, a block for each output and primal, and the leaves of aux."""
        if self.others is tuple or compiling():
            return self._blocks(args, kwargs)

        def others() -> list[Callable[[], tuple[Call, Blocks, list[Any]]]]:
            recipes: list[Recipe] = [other.recipe for other in self.others()]  # type: ignore[attr-defined]
            return [partial(recipe.blocks, args, kwargs) for recipe in recipes]

        return first_that_has_rules(self.name, lambda: self._blocks(args, kwargs), others)

    def _blocks(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Call, Blocks, list[Any]]:
        call = self.call(args, kwargs)
        match self.mode:
            case "forward" if not compiling():
                return call, *_columns(self, call)
            case "reverse" | "auto" | "forward":
                return call, *_rows(self, call)
            case _:
                assert_never(self.mode)

    def some_rows(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], start: int, stop: int
    ) -> tuple[Call, list[Tensor], list[Strip]]:
        """The call, the outputs, and rows ``start`` to ``stop``, counted over all outputs, by pulls."""
        call = self.call(args, kwargs)
        tape = _recorded(self, call)
        strips, offset = [], 0
        for position, output in enumerate(tape.outputs):
            first, last = max(start - offset, 0), min(stop - offset, output.numel())
            if first < last:
                pull = of_group(_puller(self, tape), slice(position, position + 1), len(tape.outputs))
                alone = graph.is_wrong_in_batches(tape.kinds())
                sizes = Sizes(1) if alone else sizes_for(self.chunk_size, call.primals)
                rows = stacked(pull, [output], sizes, bounds=(first, last))
                blocks = [
                    seeds.zeros(primal, (last - first, *primal.shape)) if of_primal is None else of_primal
                    for of_primal, primal in zip(rows, call.primals, strict=True)
                ]
                strips.append(Strip(position, first, blocks))
            offset += output.numel()
        return call, tape.outputs, strips


def _recorded(recipe: Recipe, call: Call) -> Tape:
    """One evaluation, its outputs checked."""
    tape = record(call.evaluate, call.primals, twice=recipe.mode == "auto", inner=recipe.inner)
    any_dtype = recipe.holomorphic is None
    checks.tensor_outputs(call.name, tape.outputs, call.path_of_output, any_dtype=any_dtype)
    checks.holomorphic_dtypes(call.name, tape.outputs, recipe.holomorphic, "outputs")
    if recipe.strict:
        _check_rows(call, tape)
    return tape


def _puller(recipe: Recipe, tape: Tape) -> Product:
    """A pull that keeps the graph unless it is the last, and with ``frugal`` always."""

    def pull(cotangents: Sequence[Tensor | None], *, last: bool) -> list[Tensor | None]:
        pulled = tape.pull(cotangents, retain_graph=recipe.frugal is not None or not last)
        return conjugated(pulled) if recipe.holomorphic else pulled

    return pull


def _rows(recipe: Recipe, call: Call) -> tuple[Blocks, list[Any]]:
    """One evaluation, then the rows by pulls, or the columns: with "auto" where there are fewer.

    Forward mode comes here while torch.compile traces; see `push`.
    """
    tape = _recorded(recipe, call)
    outputs = tape.outputs
    sizes = sizes_for(recipe.chunk_size, call.primals)
    fewer = recipe.mode == "auto" and seeds.size_of(call.primals) < seeds.size_of(outputs)
    if fewer or recipe.mode == "forward":
        move = transpose(tape)

        def without_last(tangents: list[Tensor], *, last: bool) -> list[Tensor | None]:
            del last
            return move(tangents)

        columns = stacked(without_last, call.primals, sizes)
        return _by_columns(call, outputs, columns), tape.aux
    if not compiling() and seeds.size_of(outputs) > 1 and graph.is_wrong_in_batches(tape.kinds()):
        sizes = Sizes(1)
    pull = _puller(recipe, tape)
    if recipe.frugal is not None and not compiling():
        return _frugal_blocks(pull, tape, call.primals, batched=recipe.frugal()), tape.aux
    blocks: Blocks = []
    groups = _groups(tape, call.primals)
    for group in groups:
        pull_group = of_group(pull, group, len(outputs), is_last=group is groups[-1])
        rows = stacked(pull_group, outputs[group], sizes)
        blocks += _by_rows(rows, outputs[group], call.primals)
    return blocks, tape.aux


def _groups(tape: Tape, primals: Sequence[Tensor]) -> list[slice]:
    """Which outputs are pulled together: a large one alone, small neighbours in one batch.

    Rows of one output leave the operations that lead to the others alone, which a batch over all of them
    would feed with zeros. But every pull costs some 0.2 ms, whatever its size.
    """
    outputs = tape.outputs
    if len(outputs) == 1 or compiling():
        return [slice(0, len(outputs))]
    # What a row's pull computes, which inside a batch the graph does not tell of, is no less than the row.
    width = max(seeds.size_of(primals), graph.bytes_of_a_pull(tape.ends)[0] // 4)
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


def of_group(pull: Product, group: slice, count: int, *, is_last: bool = True) -> Product:
    """``pull`` of the cotangents of a group of outputs alone."""
    before, after = [None] * group.start, [None] * (count - group.stop)

    def pull_group(rows: Sequence[Tensor], *, last: bool) -> list[Tensor | None]:
        return pull([*before, *rows, *after], last=last and is_last)

    return pull_group


def _by_rows(rows: Sequence[Tensor | None], outputs: Sequence[Tensor], primals: Sequence[Tensor]) -> Blocks:
    by_input = [
        seeds.row_blocks(of_primal, outputs, primal) for of_primal, primal in zip(rows, primals, strict=True)
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
        pull_one = of_group(pull, slice(position, position + 1), count)
        try:
            with quiet_fallbacks():
                rows = stacked(pull_one, [output], Sizes(chunk_size))
        except Exception:
            # Some backward passes cannot be batched: they read a value, or write in place. What they
            # raise then is theirs to choose.
            if chunk_size == 1:
                raise
            rows = stacked(pull_one, [output], Sizes(1))
        blocks += _by_rows(rows, [output], primals)
    return blocks


def _frugal_chunks(tape: Tape, primals: Sequence[Tensor]) -> list[int]:
    """How many rows of each output keep the peak within about half of what single rows need.

    Single rows need the graph, and the result twice: as rows and stacked. A batched pull has about
    three of its largest cotangents alive at a time (a heuristic).
    """
    if graph.is_wrong_in_batches(tape.kinds()):
        return [1] * len(tape.outputs)
    total, largest = graph.bytes_of_a_pull(tape.ends)
    row = sum(primal.numel() * primal.element_size() for primal in primals)
    budgets = [max((total + 2 * row * output.numel()) // 2, _NEGLIGIBLE) for output in tape.outputs]
    return [max(1, budget // max(3 * largest + row, 1)) for budget in budgets]


def _columns(recipe: Recipe, call: Call) -> tuple[Blocks, list[Any]]:
    """One evaluation for every chunk of columns."""
    any_dtype = recipe.holomorphic is None
    seen: list[Any] = []
    aux: list[Any] = []

    def pushed(tangents: list[Tensor], *, last: bool) -> list[Tensor | None]:
        del last
        if rewind is not None:
            rewind()
        result = push(call.evaluate, call.primals, tangents)
        checks.tensor_outputs(call.name, result.outputs, call.path_of_output, any_dtype=any_dtype)
        checks.holomorphic_dtypes(call.name, result.outputs, recipe.holomorphic, "outputs")
        if recipe.strict:
            for position, tangent in enumerate(result.tangents):
                if tangent is None:
                    checks.raise_independent(
                        call.name, call.path_of_output(position), call.root, output=position
                    )
        seen[:] = result.outputs
        aux[:] = the_same_for_all(result.aux, tangents)
        return result.tangents

    draws: Randomness = "error" if recipe.randomness == "error" else "same"
    # Every chunk runs the function again, and has to see the same random numbers.
    rewind = None if recipe.chunk_size is None else remember_randomness()
    columns = stacked(pushed, call.primals, sizes_for(recipe.chunk_size, call.primals), draws)
    return _by_columns(call, seen, columns), aux


def stacked(
    product: Product,
    leaves: Sequence[Tensor],
    sizes: Sizes,
    randomness: Randomness = "same",
    bounds: tuple[int, int] | None = None,
    keep: Callable[[Tensor, int], Tensor] = lambda rows, _: rows,
) -> list[Tensor | None]:
    """``product`` of every standard basis vector of the leaves' space, or of those in ``bounds``, stacked.

    A single vector needs no batch: its product is taken as it is. ``product`` is also told whether it
    is called for the ``last`` time. ``keep`` is shown the products of each chunk and the number of its
    first vector, and says what to keep of them before the next chunk is made.
    """
    first, end = (0, seeds.size_of(leaves)) if bounds is None else bounds
    chunks = Chunks(end - first, sizes)

    def of_rows(start: int, stop: int) -> list[Tensor | None]:
        vectors = seeds.standard_basis(leaves, first + start, max(first + stop, 1))
        # A chunk of a learnt size may have to be repeated.
        last = bounds is None and stop == chunks.total and not sizes.adapts
        if stop - start > 1:
            results = over_rows(partial(product, last=last), vectors, stop - start, randomness)
        else:
            # One vector, or none: then one product still says what the results would look like.
            results = product([vector.squeeze(0) for vector in vectors], last=last)
            results = [None if result is None else result.unsqueeze(0) for result in results]
            if stop == start:
                results = [None if result is None else result[:0] for result in results]
        return [None if result is None else keep(result, first + start) for result in results]

    count = 0

    def add(start: int, stop: int, pieces: list[Tensor | None]) -> None:
        nonlocal count
        count = len(pieces)
        for key, piece in enumerate(pieces):
            chunks.add(key, start, stop, piece)

    chunks.each(of_rows, add)
    return [chunks.whole(key) for key in range(count)]


def _by_columns(call: Call, outputs: Sequence[Tensor], columns: Sequence[Tensor | None]) -> Blocks:
    return [
        seeds.column_blocks(of_output, output, call.primals)
        for of_output, output in zip(columns, outputs, strict=True)
    ]


def _check_rows(call: Call, tape: Tape) -> None:
    """Raise for the first output that no operation connects to a primal."""
    for position in range(len(tape.outputs)):
        seeds = [torch.ones_like(one) if at == position else None for at, one in enumerate(tape.outputs)]
        for index, cotangent in enumerate(tape.pull(seeds, retain_graph=True, create_graph=False)):
            if cotangent is None:
                paths = call.path_of_output(position), call.path_of_primal(index)
                checks.raise_independent(call.name, *paths, output=position, primal=index)
