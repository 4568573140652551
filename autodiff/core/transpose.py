"""Transposes: of a recorded function's pullback, which is its derivative, and of any linear function.

Works on flat lists of tensors. Never sees a tree.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from autodiff import _torch, checks
from autodiff.core import graph, hooks, randomness
from autodiff.core.call import spread
from autodiff.core.reverse import record
from autodiff.core.rules import Rules, attach, user_code
from autodiff.core.seeds import generic_vector

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from typing import NoReturn, TypeAlias

    from autodiff.core.hooks import NodeTranspose, Transpose
    from autodiff.core.tape import Tape

    Vectors: TypeAlias = Sequence[Tensor | None]
    Linear: TypeAlias = Callable[[Sequence[Tensor]], Vectors]


def transpose(
    tape: Tape, inspect: Callable[[list[Tensor | None]], None] = lambda _: None
) -> Callable[[Vectors], list[Tensor | None]]:
    """The tape's derivative as a function of tangents: the pullback of its pullback.

    It is the conjugate transpose of a conjugate transpose. ``inspect`` is shown what the first pullback gives, None
    where no output depends on an input. The pullback is transposed at a cotangent of zeros, where each of torch's own
    is defined. That of an autograd Function may do anything there, such as not to iterate at all: it is transposed at
    a generic cotangent, and checked. While a function is traced there is no graph to ask, and it is ones.
    """

    def pull(cotangents: Sequence[Tensor]) -> list[Tensor | None]:
        pulled = tape.pull(cotangents, retain_graph=True)
        if torch.is_grad_enabled():  # not once more for a check
            inspect(pulled)
        return pulled

    traced = _torch.compiling()
    check = None
    if not traced and (users := [node for node in tape.functions() if user_code(node)]):
        point = [generic_vector(output) for output in tape.outputs]
        names = sorted({_torch.user_function(node).__name__ for node in users})
        check = LinearityCheck(partial(checks.raise_nonlinear_backward, names), unless_shown=True)
    else:
        at = torch.ones_like if traced else torch.zeros_like
        point = [at(output) for output in tape.outputs]
    with nullcontext() if traced else _by_formulas(tape):
        return transposed(pull, point, check, internal_leaves=tape.inputs, at_level=tape.at_level)


def _by_formulas(tape: Tape) -> AbstractContextManager[None]:
    """While a pullback is recorded: some nodes of its graph become formulas, where what these need is constant.

    So it is on an eager tape that is not tracked from outside. What hooks do to saved tensors is left to them.
    """
    eager = _torch.is_eager() and not tape.at_level and not _torch.saved_tensor_hooks_active()
    if not eager or not hooks.node_transposes or tape.is_tracked() or not (pairs := tape.transposable()):
        return nullcontext()
    return graph.hooked((node, partial(_replaced_graph, formula)) for node, formula in pairs)


def _replaced_graph(
    formula: NodeTranspose, given: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...] | None:
    """What a node gives, as a linear function of its cotangents whose transpose is a formula."""
    made_by = {one.grad_fn for one in given if one is not None}
    needed = formula(made_by.pop()) if len(made_by) == 1 else None
    if needed is None or any(one is None or not one.requires_grad for one in cotangents):
        return None
    constants, transpose = needed
    where = [i for i, one in enumerate(given) if one is not None]
    rules = _Transposed(transpose, where, len(given), len(cotangents))
    return tuple(attach(rules, given, [*cotangents, *(one.detach() for one in constants)]))  # type: ignore[list-item]


class _Transposed(Rules):
    """The pullback of a node, given by its transpose."""

    def __init__(self, transpose: Transpose, where: Sequence[int], inputs: int, outputs: int) -> None:
        self._transpose, self._where, self._inputs, self._outputs = transpose, where, inputs, outputs

    def pull(
        self, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        del wanted
        constants = saved[self._outputs :]
        pulled = self._transpose(constants, spread(cotangents, self._where, self._inputs))
        return [*pulled, *(None for _ in constants)]

    def push(self, *_: Any) -> NoReturn:
        raise AssertionError("recorded outside of forward mode, where a pull takes tangents on their own")


class LinearityCheck(NamedTuple):
    """How it is ensured that a function is linear.

    ``refuse`` raises an error. ``unless_shown``: not where the nodes of its graph show that it is.
    """

    refuse: Callable[[], NoReturn]
    unless_shown: bool


def transposed(
    linear: Linear,
    point: Sequence[Tensor],
    check: LinearityCheck | None = None,
    *,
    internal_leaves: Sequence[Tensor] = (),
    at_level: bool = False,
) -> Callable[[Vectors], list[Tensor | None]]:
    """The conjugate transpose of a linear function; None stands for zero, before and after.

    ``point`` are vectors to record it at: its derivative is the same everywhere. With a ``check``, the first product is
    compared with the function, at the point and elsewhere.
    """
    reached: list[int] = []
    checking = check is not None and _torch.computes_numbers(point)
    state = randomness.random_state() if checking else {}

    def apply(vectors: Sequence[Tensor], _: Any) -> tuple[list[Tensor | None], list[Any]]:
        images = linear(vectors)
        reached[:] = [i for i, image in enumerate(images) if image is not None]
        return [images[i] for i in reached], []

    tape = record(apply, point, internal_leaves=internal_leaves, at_level=at_level)
    if check is None or (check.unless_shown and graph.shows_linear(tape.graph_outputs, tape.inputs)):
        checking = False

    def pull(vectors: Vectors) -> list[Tensor | None]:
        nonlocal checking
        pulled = tape.pull([vectors[i] for i in reached], retain_graph=True)
        if checking:
            checking = False
            other = [generic_vector(vector, elsewhere=True) for vector in point]
            with torch.no_grad():
                with randomness.random_numbers_from(state):
                    images = linear(other)
                here = spread(tape.outputs, reached, len(vectors))
                if _differ((here, vectors), (point, pulled)) or _differ((images, vectors), (other, pulled)):
                    assert check is not None
                    check.refuse()
        return pulled

    return pull


def _differ(one: tuple[Vectors, Vectors], other: tuple[Vectors, Vectors]) -> bool:
    """Whether <L u, v> and <u, L* v> are not the same number, for one of the samples of the batches around.

    They are compared with what sums of random signs would be, and with rounding errors of a function that is zero. NaN
    and infinities are not judged.
    """
    (images, v), (u, pulled) = one, other
    (a, scale_a), (b, scale_b) = _inner(images, v), _inner(u, pulled)
    dtypes = {vector.dtype for vectors in (*one, *other) for vector in vectors if vector is not None}
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)
    tolerance = min(4 * eps ** (1 / 3), 0.25) * (scale_a + scale_b) + eps * _norm(u) * _norm(v)
    differ = abs(a - b) > tolerance
    return bool(_torch.fully_unwrapped(differ).any()) if isinstance(differ, Tensor) else differ


def _inner(ones: Vectors, others: Vectors) -> tuple[Tensor | float, Tensor | float]:
    """The real part of an inner product, and the norm of its terms."""
    total: Tensor | float = 0.0
    scale: Tensor | float = 0.0
    for one, other in zip(ones, others, strict=True):
        if one is None or other is None:
            continue
        terms = _wide((one.conj() * other).real if one.is_complex() else one * other)
        total, scale = total + terms.sum(), scale + torch.linalg.vector_norm(terms)
    return total, scale


def _norm(vectors: Vectors) -> Tensor | float:
    return sum((torch.linalg.vector_norm(_wide(one)) for one in vectors if one is not None), 0.0)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
