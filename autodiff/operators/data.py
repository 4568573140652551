"""Operators over a data set: sums over its batches, each of which is evaluated when a product needs it.

Provides `Over`, which makes them, and `OverData`, which they are. Imports `batch_sums`, `batches` and `kept`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from autodiff import checks
from autodiff._torch import fully_unwrapped, functorch_active, traced_inline_only
from autodiff.core import memory, randomness, trees
from autodiff.core.call import parameter_names, refilled, spread
from autodiff.core.rules import inplace_counts, is_tracked
from autodiff.core.seeds import generic_vector
from autodiff.operators.batch_sums import BatchSum, Term
from autodiff.operators.batches import Batch, DataSet, narrowed
from autodiff.operators.kept import KeptParts
from autodiff.operators.lazy import lazy
from autodiff.operators.linear_map import tree_class
from autodiff.operators.operator import Operator
from autodiff.operators.outside_writes import OutsideWrites
from autodiff.operators.space import Leaves, Space

if TYPE_CHECKING:
    from autodiff.operators.makers import Maker

# Two products may differ by 4 eps to this power, as a share of the sum of the norms of the batches' products. A
# heuristic: with 4,000 samples shuffled into batches of 16 to 1,000, rounding makes up to 3 eps of it, which is 1/270
# of this in float32, and BatchNorm in training mode at least 200,000 eps.
_ROUNDING = 2 / 3
# Into fewer samples a batch is not divided to see whether the function is a mean over them.
_DIVISIBLE_SAMPLES = 3
# Batches of a learnt size are of this much, on a CPU: allocations beyond come from the system page by page.
_MAX_CPU_BATCH = 64 * 2**20
_BUDGET_FRACTION = 0.8
# Memory is measured at so many samples, and at four times as many.
_MEASURED_SAMPLES = 4


@dataclass(frozen=True)
class Over:
    """What makes an operator over a data set, at the arguments that the batches do not hold."""

    maker: Maker[Any]
    source: Any
    reduction: Literal["mean", "sum"]
    progress: bool
    memory: int | None
    check: bool
    batch_size: int | Literal["auto"] | None

    @traced_inline_only
    def __call__(self, *args: Any, **kwargs: Any) -> OverData:
        """The operator at these arguments, after which those of a batch are put."""
        name = self.maker.name_over
        checks.untraced_data(name)
        data = DataSet(name, self.source, None, mean=self.reduction == "mean", progress=self.progress)
        operator = OverData(self.maker, data, args, kwargs)
        if self.batch_size is not None:
            size = self.batch_size
            data.size = max(1, data.total()) if size == "auto" else size
            if size == "auto":
                data.size = _size_that_fits(operator, self.memory)
        leaves = trees.leaves((args, kwargs))
        kept = KeptParts(data, self.memory or 0, memory.device_of(leaves))
        operator.domain  # noqa: B018  raises where the arguments do not fit
        if self.check:
            _check_repeats(operator)
        operator.__dict__["_kept"] = kept
        operator.__dict__["_written"] = inplace_counts([*leaves, *data.tensors()])
        return operator

    def __repr__(self) -> str:
        return f"<{self.maker!r} over a data set>"


class Facts(NamedTuple):
    """What the operators of all batches have in common."""

    domain: Space
    codomain: Space
    symmetric: bool
    positive: bool
    name: str
    cost: float


@tree_class("args", "kwargs")
@dataclass(eq=False, repr=False)
class OverData(Operator):
    """The sum, or the weighed mean, of operators at the batches of a data set.

    A product goes through the data set, and evaluates the function for each batch that is not kept. Derivatives go
    through it again.
    """

    maker: Maker[Any]
    data: DataSet
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        length = self.data.length
        size = "a data set" if length is None or length[1] is None else f"{length[1]} samples"
        return f"{self._facts.name} over {size}"

    @property
    def domain(self) -> Space:
        return self._facts.domain

    @property
    def codomain(self) -> Space:
        return self._facts.codomain

    @property
    def symmetric(self) -> bool:
        return self._facts.symmetric

    @property
    def positive(self) -> bool:
        return self._facts.positive

    @property
    def cost(self) -> float:
        kept: KeptParts | None = self.__dict__.get("_kept")
        # To record a batch takes about a gradient.
        return self._facts.cost + (kept is None or not kept.complete)

    @traced_inline_only
    def multiply(self, vectors: Leaves, *, adjoint: bool = False, count: int | None = None) -> Leaves:
        checks.untraced_data(self.data.name)
        given = [i for i, vector in enumerate(vectors) if vector is not None]
        if not given:
            return [None] * len((self.domain if adjoint else self.codomain).leaves)
        term, constant = self._product_terms(given, len(vectors), adjoint=adjoint, count=count)
        return self._sum(term, constant, [vectors[i] for i in given], "product")

    @property
    def value(self) -> Any:
        """The value of the function over the data set, where the operators of batches have one."""
        return self._first_order("value")

    @property
    def gradient(self) -> Any:
        """The gradient of the function over the data set, where the operators of batches have one."""
        return self._first_order("gradient")

    # The operator of a batch.

    @lazy
    def _facts(self) -> Facts:
        # At another number of arguments, or of samples in a transform, they may differ.
        with self.data.repeated_random_numbers(), closing(self.data.batches()) as batches:
            batch = next(batches)
        options = self.maker.options
        taken = _differentiated_in_batch(options.func, options.argnums, self.args, self.kwargs, batch)
        checks.differentiated_outside_of_batches(self.data.name, taken)
        with self.data.naming(batch.number), torch.no_grad():
            part = self.maker.for_batch(batch.number).unprepared(*self.args, *batch.args, **self.kwargs)
            return Facts(part.domain, part.codomain, part.symmetric, part.positive, part.name, part.cost)

    def _part(self, batch: Batch, tensors: Sequence[Tensor]) -> Operator:
        """The operator at a batch, with these tensors in the arguments."""
        leaves, spec, where = self._tensors
        args, kwargs = trees.unflatten(spec, refilled(leaves, where, tensors[: len(where)], None))
        part: Operator = self.maker.for_batch(batch.number)(*args, *batch.args, **kwargs)
        return part

    @lazy
    def _tensors(self) -> tuple[list[Any], trees.Spec, list[int]]:
        leaves, spec = trees.flatten((self.args, self.kwargs))
        return leaves, spec, [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def _term(self, read: Callable[[Operator, Sequence[Tensor]], Leaves]) -> Term:
        """What ``read`` takes from the operator of a batch and vectors, which come after the arguments' tensors."""
        count = len(self._tensors[2])
        return lambda batch, tensors: read(self._part(batch, tensors), tensors[count:])

    def _product_terms(
        self, given: list[int], total: int, *, adjoint: bool, count: int | None
    ) -> tuple[Term, Term]:
        """The products of batches: from tensors that may be differentiated, and at constants."""
        image = self.domain if adjoint else self.codomain

        def multiply(part: Operator, vectors: Sequence[Tensor]) -> Leaves:
            product = part.multiply(spread(vectors, given, total), adjoint=adjoint, count=count)
            return image.dense(product, count)

        term = self._term(multiply)
        kept: KeptParts | None = self.__dict__.get("_kept")
        if kept is None or functorch_active():
            return term, term
        where = len(self._tensors[2])

        def constant(batch: Batch, tensors: Sequence[Tensor]) -> Leaves:
            make = partial(self._part, batch, tensors)
            return kept.product(batch, make, partial(multiply, vectors=tensors[where:]))

        return term, constant

    def _sum(self, term: Term, constant: Term, vectors: Sequence[Any], what: str) -> list[Tensor | None]:
        leaves, _, where = self._tensors
        before = self.__dict__.get("_written")
        if before is not None:
            checks.unwritten_arguments(
                self.data.name, before, inplace_counts([*leaves, *self.data.tensors()])
            )
        kept: KeptParts | None = self.__dict__.get("_kept")
        bar = f"{self.name}: {what}"
        through = None if kept is None or constant is term else partial(kept.through, bar)
        tensors = [*(leaves[i] for i in where), *vectors]
        return BatchSum(self.data, term, bar).at(tensors, constant, through)

    @traced_inline_only
    def _first_order(self, which: str) -> Any:
        checks.untraced_data(self.data.name)
        names = [name for name in ("value", "gradient") if hasattr(self.maker.kind, name)]
        if which not in names:
            raise AttributeError(
                f"{self.name} has no {which}: {self.maker.kind.__name__} has none at a batch"
            )
        found: dict[str, Any] | None = self.__dict__.get("_values")
        if found is not None:
            return found[which]
        specs: list[trees.Spec] = []

        def read(part: Operator, _: Sequence[Tensor]) -> Leaves:
            values = [trees.flatten(getattr(part, name)) for name in names]
            specs[:] = [spec for _, spec in values]
            return [leaf for leaves, _ in values for leaf in leaves]

        term = self._term(read)
        leaves = iter(self._sum(term, term, [], ", ".join(names)))
        trees_of = [trees.unflatten(spec, [next(leaves) for _ in range(spec.num_leaves)]) for spec in specs]
        found = dict(zip(names, trees_of, strict=True))
        if not functorch_active() and not any(
            is_tracked(leaf) for leaf in trees.leaves(trees_of) if isinstance(leaf, Tensor)
        ):
            self.__dict__["_values"] = found
        return found[which]


def _differentiated_in_batch(
    func: Callable[..., Any], argnums: Any, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Batch
) -> list[str]:
    """Those of argnums, as written, that select an argument of the batch."""
    known, total = parameter_names(func), len(args) + len(batch.args)
    found = []
    for pick in argnums if isinstance(argnums, tuple) else (argnums,):
        if isinstance(pick, str):
            place = known.index(pick) if pick in known and pick not in kwargs else -1
        else:
            place = pick % total if -total <= pick < total else -1
        if len(args) <= place < total:
            found.append(repr(pick))
    return found


# What is done when an operator is made.


def _constant_products(operator: OverData) -> tuple[Term, list[Tensor]]:
    """A product with a generic vector as a term, with the norm of each batch's product last; and its tensors."""
    leaves, _, where = operator._tensors  # noqa: SLF001  its own file
    vectors = [generic_vector(spec) for spec in operator.domain.leaves]
    term, _ = operator._product_terms(list(range(len(vectors))), len(vectors), adjoint=False, count=None)  # noqa: SLF001

    def with_norm(batch: Batch, tensors: Sequence[Tensor]) -> Leaves:
        with torch.no_grad():
            product = term(batch, tensors)
            return [*product, torch.linalg.vector_norm(operator.codomain.joined(product))]

    return with_norm, [*(leaves[i].detach() for i in where), *vectors]


def _check_repeats(operator: OverData) -> None:
    """One product is computed twice, with other random numbers, and has to be the same up to rounding."""
    data, drawn = operator.data, False
    name = data.name
    term, tensors = _constant_products(operator)
    means: set[bool | None] = set()

    def watched(batch: Batch, tensors: Sequence[Tensor]) -> Leaves:
        nonlocal drawn
        before = randomness.random_state()
        values = term(batch, tensors)
        drawn = drawn or randomness.has_drawn(before)
        return values

    with torch.no_grad(), randomness.random_numbers_from(data.state):
        data.draws = False  # else the second pass would draw what the first one did
        try:
            with closing(data.batches()) as batches:
                for batch in batches:
                    if batch.number == 0:
                        _check_writes(data, batch, term, tensors)
                    if not data.mean:
                        break
                    means.add(_is_mean(operator, batch, term, tensors))
            if {True, False} <= means:
                checks.raise_mean_of_other_samples(name)
            randomness.set_random_state(data.state)
            first, second = (BatchSum(data, watched, f"{name}: check").at(tensors) for _ in range(2))
        finally:
            data.draws = True
        if _differ(operator.codomain, first, second, exactly=drawn):
            checks.raise_varying(name, draws=drawn)
        data.draws = randomness.has_drawn(data.state)


def _check_writes(data: DataSet, batch: Batch, term: Term, tensors: Sequence[Tensor]) -> None:
    """The function writes to no tensor that it did not make."""
    writes = OutsideWrites()
    try:
        with data.naming(batch.number), writes:
            term(batch, tensors)
    finally:
        writes.put_back()
    if writes.written:
        checks.raise_writes(data.name, [tensor.shape for tensor, _ in writes.written.values()])


def _is_mean(operator: OverData, batch: Batch, term: Term, tensors: Sequence[Tensor]) -> bool | None:
    """Whether the function is a mean over the samples of a batch, of which two parts are taken; None: not known.

    It must not be a sum. That it is neither is nothing wrong: its samples may depend on each other.
    """
    count = batch.samples or 0
    cuts = (slice(0, count), slice(0, count // 3), slice(count // 3, count))
    if count < _DIVISIBLE_SAMPLES:
        return None
    try:
        parts = [Batch(0, narrowed(batch.args, cut), cut.stop - cut.start) for cut in cuts]
        products = [(operator.codomain.joined(term(part, tensors)[:-1]), part.samples or 0) for part in parts]
    except Exception:  # noqa: BLE001  what the function refuses says nothing about whole batches
        return None
    (whole, _), (one, few), (other, many) = products
    scale = sum(torch.linalg.vector_norm(product) for product in (whole, one, other))
    tolerance = 4 * torch.finfo(whole.dtype).eps ** _ROUNDING * scale
    is_sum = torch.linalg.vector_norm(whole - one - other) <= tolerance
    is_mean = torch.linalg.vector_norm(whole - (few * one + many * other) / count) <= tolerance
    if fully_unwrapped(is_sum & ~is_mean).any():
        checks.raise_not_a_mean(operator.data.name)
    return bool(fully_unwrapped(is_mean).all())


def _differ(space: Space, first: Leaves, second: Leaves, *, exactly: bool) -> bool:
    """Whether two products differ by more than rounding; their last entries are the sums of the batches' norms."""
    eps = torch.finfo(space.dtype).eps
    share = 16 * eps if exactly else 4 * eps**_ROUNDING
    scale = first[-1]
    assert scale is not None
    one, other = (space.joined(leaves[:-1]) for leaves in (first, second))
    # Where both are NaN, they are the same.
    error = torch.linalg.vector_norm((one - other).nan_to_num(0.0))
    alike = one.isfinite() == other.isfinite()
    differ = (error > share * scale) | ~alike.all()
    return bool(fully_unwrapped(differ).any())


def _size_that_fits(operator: OverData, limit: int | None) -> int:
    """How many samples a batch may hold: what a product takes is linear in it, and two are measured."""
    data = operator.data
    total = data.total()
    device = memory.device_of(trees.leaves((operator.args, operator.kwargs)))
    budget = limit or int(memory.SHARE * memory.free_bytes(device))
    measured = []
    for count in (min(total, _MEASURED_SAMPLES), min(total, 4 * _MEASURED_SAMPLES)):
        batch = Batch(0, data.piece(0, count), count)
        data.size = count
        term, tensors = _constant_products(operator)
        with data.repeated_random_numbers(), data.naming(0), memory.Meter(device) as meter:
            term(batch, tensors)
        measured.append((count, meter.peak))
    (few, less), (many, more) = measured
    if few == many:
        return total
    by_sample = max((more - less) / (many - few), 1)
    room = _BUDGET_FRACTION * budget - (less - few * by_sample)
    if device.type == "cpu":
        room = min(room, _MAX_CPU_BATCH)
    size = min(total, max(1, int(room / by_sample)))
    return ceil(total / ceil(total / size))
