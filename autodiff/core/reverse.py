"""Reverse mode: record a function once, pull cotangents back many times.

Works on flat lists of tensors and provides `record`, whose tape gives None for an input that no output depends on.
Never sees a tree.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from autodiff import _torch
from autodiff.core import graph, history, hooks
from autodiff.core.call import is_differentiable, refilled
from autodiff.core.randomness import remember_randomness
from autodiff.core.tape import ALL, FlatFunction, Tape, TapeFunction, checkpoints, recorded_outside
from autodiff.errors import IndependenceError, InPlaceError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TypeAlias

    from autodiff.core.call import Lift

    # From all tensors that an operation depends on to the leaves of its result.
    Flat: TypeAlias = Callable[[Sequence[Tensor]], list[Any]]


@_torch.traced_inline_only
def record(
    func: FlatFunction,
    primals: Sequence[Tensor],
    *,
    internal_leaves: Sequence[Tensor] = (),
    higher_order: bool = False,
    inputs_recorded: bool = False,
    origin: Callable[..., Any] | None = None,
    at_level: bool = False,
) -> Tape:
    """Run ``func`` once on the primals, and keep the way back.

    ``internal_leaves`` are inputs of other tapes of the same transform: what depends on them alone is not tracked from
    outside. ``higher_order`` says that a pull of the tape will be differentiated in turn. ``inputs_recorded`` says that
    the primals are the inputs of another tape of the same transform, and need no views of their own. ``origin`` is the
    user's function inside, by which it is known whether a level pays off; ``at_level`` asks for one.
    """
    if _torch.compiling():
        return _TracedTape(func, primals, higher_order or inputs_recorded)
    if torch.is_inference_mode_enabled():
        return _torch.without_inference_mode(
            record,
            func,
            primals,
            internal_leaves=internal_leaves,
            higher_order=higher_order,
            inputs_recorded=inputs_recorded,
            origin=origin,
            at_level=at_level,
        )
    if at_level or not _torch.is_eager():
        return _torch.under_guard(_LevelTape, func, primals, higher_order)
    if _is_better_at_level(origin):
        rewind = remember_randomness()
        try:
            tape = _torch.under_guard(_LevelTape, func, primals, higher_order)
        except RuntimeError as error:
            if not (isinstance(error, IndependenceError) or _torch.says(error, "a level cannot run it")):
                raise
            history.forget(origin, for_good=True)
            rewind()
        else:
            if not tape.is_tracked():
                history.forget(origin)
            return tape
    return _EagerTape(func, primals, internal_leaves, higher_order, inputs_recorded, origin=origin)


@_torch.traced_inline_only
def record_derivative(
    func: FlatFunction,
    primals: Sequence[Tensor],
    differentiate: TapeFunction,
    *,
    origin: Callable[..., Any] | None = None,
) -> Tape:
    """The tape of what ``differentiate`` makes of the tape of ``func``, such as its gradient.

    Eagerly both are one tape, which takes 0.85 x as long as a tape inside a tape.
    """
    if _torch.compiling() or not _torch.is_eager() or _is_better_at_level(origin):
        return record(differentiated(func, differentiate), primals, origin=origin)
    if torch.is_inference_mode_enabled():
        return _torch.without_inference_mode(record_derivative, func, primals, differentiate, origin=origin)
    return _EagerTape(func, primals, differentiate=differentiate, origin=origin)


def _is_better_at_level(origin: Callable[..., Any] | None) -> bool:
    """Whether a level pays off. Not where the process uses `checkpoint`: a second run would be outside of the level."""
    return not checkpoints.used and history.reaches_far(origin)


def differentiated(func: FlatFunction, differentiate: TapeFunction) -> FlatFunction:
    """What ``differentiate`` makes of the tape of ``func``, as a function of the primals."""

    def derivative(leaves: Sequence[Tensor], lift: Lift | None) -> tuple[list[Any], list[Any]]:
        return differentiate(record(lifted_by(lift, func), leaves, inputs_recorded=True))

    return derivative


def lifted_by(outer: Lift | None, func: FlatFunction) -> FlatFunction:
    """``func`` inside two levels: what the outer lifts, the inner one lifts on."""
    if outer is None:
        return func
    return lambda leaves, inner: func(leaves, lambda t: outer(t) if inner is None else inner(outer(t)))


def rerecord(
    func: Flat,
    tensors: Sequence[Tensor],
    wanted: Sequence[bool],
    *,
    higher_order: bool = False,
) -> tuple[Tape, list[int]]:
    """Run ``func`` once more, recorded; the tape, and which of the tensors are its inputs: of those that are wanted.

    What is not wanted costs a pull its time all the same, and under vmap a cotangent for every sample.
    """
    pairs = enumerate(zip(tensors, wanted, strict=True))
    where = [i for i, (tensor, is_wanted) in pairs if is_wanted and is_differentiable(tensor)]

    def recordable(primals: Sequence[Tensor], lift: Lift | None) -> tuple[list[Any], list[Any]]:
        return [leaf for leaf in func(refilled(tensors, where, primals, lift)) if is_differentiable(leaf)], []

    return record(recordable, [tensors[i] for i in where], higher_order=higher_order), where


def conjugated(pulled: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What the engine pulled by the conjugate transpose, as the transpose gives it.

    A lazy conjugate has no ``numpy()``.
    """
    return [None if one is None else one.conj().resolve_conj() for one in pulled]


class _EagerTape(Tape):
    """Plain autograd, where no transform is active around this one."""

    __slots__ = ("_origin", "_own_leaves", "_start", "_tracked", "_versions", "_viewed")

    def __init__(
        self,
        func: FlatFunction,
        primals: Sequence[Tensor],
        internal_leaves: Sequence[Tensor] = (),
        higher_order: bool = False,
        inputs_recorded: bool = False,
        differentiate: TapeFunction | None = None,
        origin: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        recording = torch.is_grad_enabled()
        self._origin, self._start = origin, _torch.next_sequence_number()
        try:  # a context manager takes 1 % of a gradient, and an interrupt may leave it
            _torch.set_grad_enabled(True)
            self.inputs, viewed, requires_grad = [], [], False
            this = weakref.ref(self)
            for primal in primals:
                if inputs_recorded:
                    entered = primal
                    requires_grad = requires_grad or primal.requires_grad
                elif primal.requires_grad:
                    # Connected to the graph outside. A sparse tensor has no views.
                    entered = primal.view_as(primal) if primal.layout is torch.strided else primal.clone()
                    viewed.append(primal)
                    requires_grad = True
                else:
                    entered = _torch.outside_inference_mode(primal).detach().requires_grad_()
                    entered.autodiff_tape = this  # type: ignore[attr-defined]
                self.inputs.append(entered)
            self._own_leaves = internal_leaves
            # A view that was written has another place in the graph, where no pull ends.
            self._viewed, self._versions = viewed, _torch.versions(viewed) if viewed else []
            # While ``differentiate`` runs, the graph that it makes is tracked: by this tape.
            self._tracked: bool | None = True
            higher_order = (
                higher_order
                or differentiate is not None
                or (recording and (requires_grad or recorded_outside(())))
            )
            aux = self._run(func, _torch.outside_inference_mode, higher_order, differentiate)
            self._tracked = requires_grad or None
        finally:
            _torch.set_grad_enabled(recording)
        if recording and self._tracked is None:
            # One walk for all of it: mostly nothing is tracked from outside.
            of_aux = [leaf for leaf in aux if isinstance(leaf, Tensor) and leaf.requires_grad]
            tracked, nodes = self._depends_on_outer_leaf([*self.graph_outputs, *of_aux])
            if not tracked:
                self._tracked, recording = False, False
            if not graph.functions(nodes):
                self._functions = []  # nor are there any behind the outputs alone
            if not of_aux:
                self._tracked, self._nodes = tracked, nodes
        if recording and self.is_tracked():
            self.outputs = self.graph_outputs
        else:
            self.outputs = [_torch.detached(output) for output in self.graph_outputs]
        # Through primals that require grad everything is tracked; aux by what it depends on.
        self.aux = [
            leaf
            if recording and (requires_grad or self._depends_on_outer_leaf([leaf])[0])
            else _torch.detached(leaf)
            for leaf in aux
        ]

    def refuse_written(self) -> None:
        """After an in-place write to a view, the gradient would be that of the written view.

        torch refuses writes to a leaf and to a view of one, apart from those without grad mode, as of an embedding with
        ``max_norm``. These are right where nothing has used the view before.
        """
        if not self._viewed or (versions := _torch.versions(self._viewed)) == self._versions:
            return
        both = zip(self._viewed, self._versions, versions, strict=True)
        written = [primal for primal, before, after in both if before != after]
        if not all(primal.is_leaf for primal in written) or self._reaches_by_other_views(written):
            raise InPlaceError(
                "the function wrote in place to an argument that is differentiated, of shape "
                f"{[tuple(primal.shape) for primal in written]}: a leaf Variable that requires grad is being used in "
                "an in-place operation. Expected a function that leaves its inputs as they are; write to a clone."
            )
        self._versions = versions

    def _reaches_by_other_views(self, leaves: Sequence[Tensor]) -> bool:
        """Whether the graph reaches these leaves otherwise than by the place that each input has in it now."""
        places, ids = {one.grad_fn for one in self.inputs}, set(map(id, leaves))
        return any(
            id(getattr(parent, "variable", None)) in ids
            for node in graph.walk(self.graph_outputs)[1] - places
            for parent, _ in node.next_functions
        )

    def pull(self, cotangents: Sequence[Tensor | None], **options: Any) -> list[Tensor | None]:
        pulled = super().pull(cotangents, **options)
        if self._viewed and None in pulled and _torch.versions(self._viewed) != self._versions:
            raise InPlaceError(
                f"an argument was written in place after the function was recorded, of those of shape "
                f"{[tuple(primal.shape) for primal in self._viewed]}. Expected arguments that stay as they are for as "
                f"long as products are taken; record the function anew, or pass clones."
            )
        return pulled

    def is_tracked(self) -> bool:
        if self._tracked is None:
            self._tracked, self._nodes = self._depends_on_outer_leaf(self.graph_outputs)
        return self._tracked

    def _depends_on_outer_leaf(self, outputs: Sequence[Any]) -> tuple[bool, set[Any]]:
        """Whether the outputs depend on a leaf that requires grad and is not this tape's own; the nodes behind them.

        The walk costs 1 to 5 % of a gradient (chains of 1 to 1000 operations, a transformer layer).
        """
        inputs = (*self.inputs, *self._own_leaves)
        leaf_nodes, nodes = graph.walk(outputs, inputs)
        # An input that is no leaf is connected to the graph outside.
        if not {one.grad_fn for one in inputs}.isdisjoint(leaf_nodes):
            return True, nodes
        # Only the node that accumulates into a leaf has a variable.
        leaves = [
            leaf for leaf in (getattr(node, "variable", None) for node in leaf_nodes) if leaf is not None
        ]
        leaves += [one for one in outputs if isinstance(one, Tensor) and one.is_leaf and one.requires_grad]
        own = set(map(id, inputs))
        for leaf in leaves:
            if id(leaf) not in own:
                # The leaf of a tape that is gone, as of a transform inside this one, is not tracked either.
                tape = getattr(leaf, "autodiff_tape", None)
                if tape is None or tape() is not None:
                    history.remember(self._origin, nodes, self._start)
                    return True, nodes
        return False, nodes

    def _cut_where_untracked(self, pulled: list[Tensor | None]) -> list[Tensor | None]:
        def is_tracked(one: Tensor | None) -> bool:
            # A batched tensor's graph is that of the tensor under it.
            return one is not None and self._depends_on_outer_leaf([_torch.fully_unwrapped(one)])[0]

        return [one if is_tracked(one) else _torch.detached(one) for one in pulled]

    def nodes(self) -> set[Any]:
        nodes = super().nodes()
        if self._tracked:
            history.remember(self._origin, nodes, self._start)
        return nodes


class _LevelTape(Tape):
    """A functorch level, where other transforms are active and have to nest with this one.

    The pull happens after the level is left, so that the backward's operations pass through one
    interpreter less than they do in torch.func.grad.
    """

    at_level = True

    __slots__ = ()

    def __init__(self, func: FlatFunction, primals: Sequence[Tensor], higher_order: bool) -> None:
        super().__init__()
        self._without_tangents = not _torch.forward_level_active()
        higher_order = (
            higher_order
            or recorded_outside(primals)
            or _torch.grad_level_active()
            or not self._without_tangents
        )
        with _torch.grad_level() as level:
            self.inputs = [_torch.wrap_tracked(primal, level) for primal in primals]
            aux = self._run(func, lambda tensor: _torch.wrap(tensor, level), higher_order)
            self.outputs = [_torch.unwrap(output, level) for output in self.graph_outputs]
            self.aux = [_torch.unwrap(leaf, level) for leaf in aux]

    def pull(self, cotangents: Sequence[Tensor | None], **options: Any) -> list[Tensor | None]:
        if "cotangents batched like outputs" in self.policies():
            pairs = zip(cotangents, self.outputs, strict=True)
            cotangents = [None if c is None else c + torch.zeros_like(output) for c, output in pairs]
        return super().pull(cotangents, **options)

    def _needs_graph(self) -> bool:
        return "with a graph" in self.policies() or (
            bool(hooks.needs_graph_in_forward_mode) and _torch.forward_level_active()
        )

    def is_tracked(self) -> bool:
        return _torch.grad_level_active() or any(
            isinstance(output, Tensor) and _torch.requires_grad_at_any_depth(output)
            for output in self.outputs
        )


class _Traced:
    """How many functions are being recorded while torch.compile traces, which cannot see a threading.local."""

    def __init__(self) -> None:
        self.recording = 0


_traced = _Traced()


class _Formulas(TorchFunctionMode):
    """While a function is traced: operations are replaced by their formulas."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return hooks.traced_formulas.get(func, func)(*args, **(kwargs or {}))


class _TracedTape(Tape):
    """torch.func.vjp, which torch.compile's tracer knows."""

    __slots__ = ("_pullback",)

    def __init__(self, func: FlatFunction, primals: Sequence[Tensor], higher_order: bool) -> None:
        inside: list[Any] = []

        def of_inputs(*inputs: Tensor) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
            outputs, inside[:] = func(inputs, None)
            # It takes only tensors for aux.
            return tuple(outputs), tuple(leaf for leaf in inside if isinstance(leaf, Tensor))

        higher_order = higher_order or _traced.recording > 0
        _traced.recording += 1
        try:
            with (
                hooks.higher_order_traced.get("make", nullcontext)() if higher_order else nullcontext(),
                _Formulas(),
            ):
                recorded: Any = torch.func.vjp(of_inputs, *primals, has_aux=True)
        finally:
            _traced.recording -= 1
        outputs, self._pullback, tensors = recorded
        coming = iter(tensors)
        self.outputs, self.graph_outputs, self.inputs = list(outputs), list(outputs), list(primals)
        self.aux = [next(coming) if isinstance(leaf, Tensor) else leaf for leaf in inside]

    def pull(
        self,
        cotangents: Sequence[Tensor | None],
        *,
        wanted: slice = ALL,
        retain_graph: bool = False,
        create_graph: bool | None = None,
    ) -> list[Tensor | None]:
        del retain_graph, create_graph  # the tracer's graph holds what it needs
        filled = [
            torch.zeros_like(output) if cotangent is None else cotangent
            for output, cotangent in zip(self.outputs, cotangents, strict=True)
        ]
        return list(self._pullback(tuple(filled)))[wanted]

    def is_tracked(self) -> bool:
        return True
