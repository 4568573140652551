"""What the operator matrix runs: PyTorch's own samples of each operator, fifteen checks, three sides.

Hands on `operators`, `CHECKS` and `verdict`. The sides are autodiff, torch.func, and plain
torch.autograd without any transform, which judges the other two; where both contradict it, finite
differences decide. Knows nothing of the tables in known.py.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import optree
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

import autodiff

if TYPE_CHECKING:
    from types import ModuleType

    from torch.testing._internal.opinfo.core import OpInfo, SampleInput

SAMPLES = 8  # of each operator, spread over the first POOL that PyTorch's generator gives
POOL = 300
LARGEST = 20_000  # numbers in a sample's differentiable inputs

DOUBLE = (torch.float64, torch.complex128)
# Agreement is to about 1e-12 where both sides do the same arithmetic, and to 1e-9 where they do not.
TOLERANCE = 1e-7
TOLERANCES = {
    "cholesky_inverse": 1e-3,  # its samples have condition numbers around 1e8
    "cov": 1e-4,  # it keeps its weights in float32
    "logcumsumexp": 1e-4,  # its pullback takes logarithms of the cotangents
}
# Finite differences only say which of two sides is wrong that differ in their first digits.
STEP, CLOSE_TO_DIFFERENCES = 1e-5, 1e-3
# Those of sixth order, of second derivatives, judge third ones.
WIDE = 1e-3

Tensors: TypeAlias = Sequence[Tensor]


# By name, those that PyTorch says have derivatives in float64 on the CPU.
OPERATORS: dict[str, OpInfo] = {
    op.full_name: op for op in op_db if op.supports_autograd and torch.float64 in op.supported_dtypes("cpu")
}


# A case: an operator on one of its samples, as a function from tensors to tensors.


class Case(NamedTuple):
    """``func`` takes the sample's differentiable tensors to the operator's double precision outputs."""

    func: Callable[..., tuple[Tensor, ...]]
    primals: list[Tensor]
    tangents: list[Tensor]
    cotangents: list[Tensor]
    tolerance: float


@functools.lru_cache(maxsize=1)
def cases(name: str) -> list[Case]:
    """A few samples of the operator, always the same ones."""
    op = OPERATORS[name]
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  the generator that PyTorch's samples draw from
    pool = itertools.islice(op.sample_inputs("cpu", torch.float64, requires_grad=True), POOL)
    usable = [case for case in (_case(op, sample) for sample in pool) if case is not None]
    return usable[:: max(1, len(usable) // SAMPLES)][:SAMPLES]


def _case(op: OpInfo, sample: SampleInput) -> Case | None:
    """The sample as a case; None where nothing in it can be differentiated, or where torch ends the process."""
    if sample.kwargs.get("dropout_p"):
        return None  # attention with dropout in a batch of batches, in torch.func as well
    leaves, spec = optree.tree_flatten((sample.input, sample.args, sample.kwargs), none_is_leaf=True)
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    primals = [leaves[i].detach().clone() for i in where]
    if not 0 < sum(primal.numel() for primal in primals) <= LARGEST:
        return None

    def func(*inputs: Tensor) -> tuple[Tensor, ...]:
        # A clone, since some operators write into their arguments (running statistics, for one).
        filled = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for position, tensor in zip(where, inputs, strict=True):
            filled[position] = tensor
        first, args, kwargs = optree.tree_unflatten(spec, filled)
        # PyTorch's wrapper keeps to the operator's domain: symmetric or triangular matrices, masks.
        output = op.gradcheck_wrapper(op.get_op(), first, *args, **kwargs)
        outputs = optree.tree_leaves(sample.output_process_fn_grad(output))
        return tuple(leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.dtype in DOUBLE)

    outputs = _seeded(func, *[primal.clone().requires_grad_() for primal in primals])
    if not any(output.requires_grad for output in outputs):
        return None
    generator = torch.Generator().manual_seed(1)
    return Case(
        func,
        primals,
        [_normal(primal, generator) for primal in primals],
        [_normal(output, generator) for output in outputs],
        TOLERANCES.get(op.full_name, TOLERANCE),
    )


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, generator=generator)


def _seeded(func: Callable[..., Any], *args: Any) -> Any:
    """The function's value, with the same random numbers each time."""
    torch.manual_seed(2)
    return func(*args)


# The checks. A library computes each; plain autograd computes the same, or a number that follows.


class Check(NamedTuple):
    """``by_autograd`` gives what ``by_library`` gives, after ``seen`` where that is not None.

    ``by_differences`` gives the same once more, to a few digits.
    """

    by_library: Callable[[ModuleType, Case], Tensors]
    by_autograd: Callable[[Case], Tensors]
    seen: Callable[[Case, Tensors], Tensors] | None = None
    by_differences: Callable[[Case], Tensors] | None = None
    # What takes long is run on the first few samples; what is judged by differences agrees to fewer digits.
    samples: int = SAMPLES
    tolerance: float = 0.0


def _vjp(library: ModuleType, case: Case) -> Tensors:
    _, pullback = library.vjp(case.func, *case.primals)
    return pullback(tuple(case.cotangents))


def _vjp_by_autograd(case: Case) -> Tensors:
    return _gradients(case, create_graph=False)[1]


def _jvp(library: ModuleType, case: Case) -> Tensors:
    return library.jvp(case.func, tuple(case.primals), tuple(case.tangents))[1]


def _slope_by_autograd(case: Case) -> Tensors:
    """Re <cotangents, J tangents>, by the pullback."""
    return [_dot(case.tangents, _vjp_by_autograd(case))]


def _slope(case: Case, pushed: Tensors) -> Tensors:
    """The same, by the pushforward."""
    return [_dot(case.cotangents, pushed)]


def _projection(case: Case) -> Tensors:
    return [_dot(case.cotangents, case.func(*case.primals))]


def _grad_of_vjp(library: ModuleType, case: Case) -> Tensors:
    def slope(*primals: Tensor) -> Tensor:
        return _dot(case.tangents, _vjp(library, case._replace(primals=list(primals))))

    return library.grad(slope, argnums=tuple(range(len(case.primals))))(*case.primals)


def _grad_of_vjp_by_autograd(case: Case) -> Tensors:
    leaves, gradients = _gradients(case, create_graph=True)
    slope = _dot(case.tangents, gradients)
    if not slope.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return torch.autograd.grad(slope, leaves, materialize_grads=True)


def _jvp_of_vjp(library: ModuleType, case: Case) -> Tensors:
    def pulled(*primals: Tensor) -> Tensors:
        return _vjp(library, case._replace(primals=list(primals)))

    return library.jvp(pulled, tuple(case.primals), tuple(case.tangents))[1]


def _jvp_of_jvp(library: ModuleType, case: Case) -> Tensors:
    def pushed(*primals: Tensor) -> Tensors:
        return _jvp(library, case._replace(primals=list(primals)))

    return library.jvp(pushed, tuple(case.primals), tuple(case.tangents))[1]


def _grad_of_jvp(library: ModuleType, case: Case) -> Tensors:
    def slope(*primals: Tensor) -> Tensor:
        return _dot(case.cotangents, _jvp(library, case._replace(primals=list(primals))))

    return library.grad(slope, argnums=tuple(range(len(case.primals))))(*case.primals)


def _linearized(library: ModuleType, case: Case) -> Tensors:
    """The pullback of the pullback; torch.func's linearize gives garbage inside a transform, so its jvp."""
    if library is autodiff:
        return autodiff.linearize(case.func, *case.primals)[1](*case.tangents)
    return _jvp(library, case)


def _grad_of_linearize(library: ModuleType, case: Case) -> Tensors:
    def slope(*primals: Tensor) -> Tensor:
        return _dot(case.cotangents, _linearized(library, case._replace(primals=list(primals))))

    return library.grad(slope, argnums=tuple(range(len(case.primals))))(*case.primals)


def _jvp_of_grad_of_linearize(library: ModuleType, case: Case) -> Tensors:
    def second(*primals: Tensor) -> Tensors:
        return _grad_of_linearize(library, case._replace(primals=list(primals)))

    return library.jvp(second, tuple(case.primals), tuple(case.tangents))[1]


def _grad_of_grad_of_linearize(library: ModuleType, case: Case) -> Tensors:
    def curvature(*primals: Tensor) -> Tensor:
        return _dot(case.tangents, _grad_of_linearize(library, case._replace(primals=list(primals))))

    return library.grad(curvature, argnums=tuple(range(len(case.primals))))(*case.primals)


def _third_by_differences(case: Case) -> Tensors:
    """The third derivative along the tangents: of the second one by autograd, differences of sixth order."""

    def moved(step: float) -> Tensor:
        pairs = zip(case.primals, case.tangents, strict=True)
        shifted = case._replace(primals=[primal + step * tangent for primal, tangent in pairs])
        (value,) = _seeded(_curvature_by_autograd, shifted)
        return value

    weights = {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}
    return [sum(w * (moved(k * WIDE) - moved(-k * WIDE)) / WIDE for k, w in weights.items())]


def _jvp_of_pullback(library: ModuleType, case: Case) -> Tensors:
    """Of a pullback made outside: it is linear, so that its tangent is what it gives of the tangent."""
    _, pullback = library.vjp(case.func, *case.primals)
    seeds = tuple(case.cotangents)
    return library.jvp(lambda *seeds: pullback(seeds), seeds, tuple(1 - seed for seed in seeds))[1]


def _pulled_tangents_by_autograd(case: Case) -> Tensors:
    return _vjp_by_autograd(case._replace(cotangents=[1 - seed for seed in case.cotangents]))


def _curvature_by_autograd(case: Case) -> Tensors:
    """The second derivative of Re <cotangents, f> along the tangents, by double backward."""
    return [_dot(case.tangents, _grad_of_vjp_by_autograd(case))]


def _curvature(case: Case, pushed: Tensors) -> Tensors:
    return [_dot(case.tangents, pushed)]


def _differences_of(number: Callable[[Case], Tensors]) -> Callable[[Case], Tensors]:
    """The derivative of a number along the tangents, by central differences."""

    def moved(case: Case, step: float) -> Tensor:
        primals = [
            primal + step * tangent for primal, tangent in zip(case.primals, case.tangents, strict=True)
        ]
        (value,) = _seeded(number, case._replace(primals=primals))
        return value

    return lambda case: [(moved(case, STEP) - moved(case, -STEP)) / (2 * STEP)]


def _vmap_of(compute: Callable[[ModuleType, Case], Tensors]) -> Callable[[ModuleType, Case], Tensors]:
    """The check under vmap, with primals, tangents and cotangents of their own for each sample."""

    def batched(library: ModuleType, case: Case) -> Tensors:
        def single(*parts: list[Tensor]) -> Tensors:
            primals, tangents, cotangents = parts
            return compute(library, case._replace(primals=primals, tangents=tangents, cotangents=cotangents))

        samples = _batch(case)
        stacked = [
            [torch.stack(column) for column in zip(*rows, strict=True)]
            for rows in (
                [sample.primals for sample in samples],
                [sample.tangents for sample in samples],
                [sample.cotangents for sample in samples],
            )
        ]
        return library.vmap(single, randomness="same")(*stacked)

    return batched


def _rows_of(
    compute: Callable[[ModuleType, Case], Tensors],
) -> Callable[[ModuleType, Case], Tensors]:
    """The check along two tangents at once, as a Jacobian pushes its columns; their sum, by linearity."""

    def batched(library: ModuleType, case: Case) -> Tensors:
        def along(*tangents: Tensor) -> Tensors:
            return compute(library, case._replace(tangents=list(tangents)))

        both = [torch.stack([2 * tangent, -tangent]) for tangent in case.tangents]
        return [rows.sum(0) for rows in library.vmap(along, randomness="same")(*both)]

    return batched


def _each(compute: Callable[[Case], Tensors]) -> Callable[[Case], Tensors]:
    """What vmap gives, by a loop."""

    def looped(case: Case) -> Tensors:
        rows = [_seeded(compute, sample) for sample in _batch(case)]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    return looped


def _seen_in_each(seen: Callable[[Case, Tensors], Tensors]) -> Callable[[Case, Tensors], Tensors]:
    def looped(case: Case, values: Tensors) -> Tensors:
        rows = [seen(sample, [value[i] for value in values]) for i, sample in enumerate(_batch(case))]
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    return looped


def _batch(case: Case) -> list[Case]:
    """The case, and beside it another, at which the operator is defined as well."""
    # A smaller matrix is still positive definite, a smaller probability still below one.
    other = case._replace(
        primals=[0.99 * primal for primal in case.primals],
        tangents=[1 - tangent for tangent in case.tangents],
        cotangents=[1 - cotangent for cotangent in case.cotangents],
    )
    return [case, other]


def _gradients(case: Case, *, create_graph: bool) -> tuple[list[Tensor], Tensors]:
    """Leaves with the primals' values, and their gradients by plain autograd."""
    leaves = [primal.detach().clone().requires_grad_() for primal in case.primals]
    # A clone, as some operators refuse to write into a leaf, and sparse tensors have no views.
    outputs = case.func(*[leaf.clone() for leaf in leaves])
    pairs = [(out, seed) for out, seed in zip(outputs, case.cotangents, strict=True) if out.requires_grad]
    ends, seeds = zip(*pairs, strict=True)
    return leaves, torch.autograd.grad(ends, leaves, seeds, create_graph=create_graph, materialize_grads=True)


def _dot(left: Tensors, right: Tensors) -> Tensor:
    """The real inner product of two lists of tensors."""
    return torch.stack(
        [(_dense(a).conj() * _dense(b)).sum().real for a, b in zip(left, right, strict=True)]
    ).sum()


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


_SLOPE_BY_DIFFERENCES = _differences_of(_projection)
_CURVATURE_BY_DIFFERENCES = _differences_of(_slope_by_autograd)

CHECKS = {
    "vjp": Check(_vjp, _vjp_by_autograd),
    "jvp": Check(_jvp, _slope_by_autograd, _slope, _SLOPE_BY_DIFFERENCES),
    "grad of vjp": Check(_grad_of_vjp, _grad_of_vjp_by_autograd),
    "jvp of vjp": Check(_jvp_of_vjp, _curvature_by_autograd, _curvature, _CURVATURE_BY_DIFFERENCES),
    "jvp of jvp": Check(_jvp_of_jvp, _curvature_by_autograd, _slope, _CURVATURE_BY_DIFFERENCES),
    "grad of jvp": Check(_grad_of_jvp, _grad_of_vjp_by_autograd),
    "vmap of vjp": Check(_vmap_of(_vjp), _each(_vjp_by_autograd)),
    "vmap of jvp": Check(
        _vmap_of(_jvp), _each(_slope_by_autograd), _seen_in_each(_slope), _each(_SLOPE_BY_DIFFERENCES)
    ),
    "vmap of jacfwd": Check(
        _vmap_of(_rows_of(_jvp)),
        _each(_slope_by_autograd),
        _seen_in_each(_slope),
        _each(_SLOPE_BY_DIFFERENCES),
    ),
    "vmap of jacfwd of vjp": Check(
        _vmap_of(_rows_of(_jvp_of_vjp)),
        _each(_curvature_by_autograd),
        _seen_in_each(_curvature),
        _each(_CURVATURE_BY_DIFFERENCES),
    ),
    "grad of linearize": Check(_grad_of_linearize, _grad_of_vjp_by_autograd, samples=3),
    "jvp of grad of linearize": Check(
        _jvp_of_grad_of_linearize, _third_by_differences, _curvature, samples=2, tolerance=1e-5
    ),
    "grad of grad of linearize": Check(
        _grad_of_grad_of_linearize, _third_by_differences, _curvature, samples=2, tolerance=1e-5
    ),
    "jvp of a pullback": Check(_jvp_of_pullback, _pulled_tangents_by_autograd, samples=3),
    "vmap of grad of vjp": Check(_vmap_of(_grad_of_vjp), _each(_grad_of_vjp_by_autograd)),
}


# The verdict, in the phrases that the tables use.

WORKS = "works"
NO_CASE = "no sample can be differentiated"


def verdict(name: str, check: str) -> str:
    """What is wrong with the operator under the check, over all its cases."""
    run = CHECKS[check]
    chosen = [
        case._replace(tolerance=max(case.tolerance, run.tolerance)) for case in cases(name)[: run.samples]
    ]
    found = {_verdict_on(case, run) for case in chosen}
    return ("; ".join(sorted(found - {WORKS})) or WORKS) if found else NO_CASE


def _verdict_on(case: Case, check: Check) -> str:
    ours = _attempt(check.by_library, autodiff, case)
    theirs = _attempt(check.by_library, torch.func, case)
    judged = _attempt(check.by_autograd, case)
    if isinstance(ours, Exception) and isinstance(theirs, Exception):
        kinds = sorted({type(ours).__name__, type(theirs).__name__})
        return f"both raise {' and '.join(kinds)}"
    if isinstance(ours, Exception):
        return f"autodiff raises {type(ours).__name__}"
    if isinstance(theirs, Exception):
        right = _confirmed(case, check, ours, judged)
        return f"torch.func raises {type(theirs).__name__}" + ("" if right else ", and autodiff is wrong")
    if _close(ours, theirs, case.tolerance):
        return WORKS if _confirmed(case, check, ours, judged) else _who_is_wrong(case, check, ours, judged)
    if _confirmed(case, check, ours, judged):
        return "torch.func is wrong"
    return "autodiff is wrong" if _confirmed(case, check, theirs, judged) else "the two differ"


def _attempt(compute: Callable[..., Tensors], *args: Any) -> list[Tensor] | Exception:
    try:
        return list(_seeded(compute, *args))
    except Exception as error:  # noqa: BLE001  every kind is a finding
        return error


def _confirmed(case: Case, check: Check, values: Tensors, judged: list[Tensor] | Exception) -> bool:
    """Whether plain autograd, where it can compute this at all, says the same."""
    return isinstance(judged, Exception) or _close(_seen(case, check, values), judged, case.tolerance)


def _who_is_wrong(case: Case, check: Check, values: Tensors, judged: list[Tensor] | Exception) -> str:
    """Finite differences between the two libraries, which agree, and plain autograd."""
    if check.by_differences is not None and not isinstance(judged, Exception):
        differences = check.by_differences(case)
        if _close(differences, _seen(case, check, values), CLOSE_TO_DIFFERENCES):
            return "torch.autograd is wrong"
        if _close(differences, judged, CLOSE_TO_DIFFERENCES):
            return "both are wrong"
    return "both contradict torch.autograd"


def _seen(case: Case, check: Check, values: Tensors) -> Tensors:
    return values if check.seen is None else check.seen(case, values)


def _close(left: Tensors, right: Tensors, tolerance: float) -> bool:
    """Whether two lists hold the same numbers, relative to the largest of each tensor."""
    return len(left) == len(right) and all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.allclose(a, b, rtol=0, atol=tolerance * (1 + _largest(b)), equal_nan=True)
        for a, b in zip(map(_dense, left), map(_dense, right), strict=True)
    )


def _largest(tensor: Tensor) -> float:
    finite = tensor[tensor.isfinite()].abs()
    return finite.max().item() if finite.numel() > 0 else 0.0
