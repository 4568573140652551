"""Reverse mode: record a function once, pull cotangents back many times.

Works on flat lists of tensors and provides `record`, whose tape gives None for an input that no output depends on.
Never sees a tree.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from autodiff import _torch
from autodiff.core import graph, hooks
from autodiff.core.call import Lift
from autodiff.errors import BatchedPullError, InPlaceError

if TYPE_CHECKING:
    from autodiff.core.hooks import PullPolicy

# From the inputs, and what to do with every other tensor among the arguments, to the outputs and the leaves of aux.
FlatFunction: TypeAlias = Callable[[Sequence[Tensor], Lift | None], tuple[list[Any], list[Any]]]
# From a tape to what pulls through it give, and the leaves of aux.
TapeFunction: TypeAlias = Callable[["Tape"], tuple[list[Any], list[Any]]]

ALL = slice(None)
ONE_BY_ONE: PullPolicy = "one cotangent at a time"


class _Thread(threading.local):
    """How many functions this thread is recording, each inside the one before."""

    recording = 0


_thread = _Thread()


@contextmanager
def recording_once() -> Iterator[None]:
    """Set the recording depth to one, so that a second run takes the same branches as the first."""
    before, _thread.recording = _thread.recording, 1
    try:
        yield
    finally:
        _thread.recording = before


class Tape(ABC):
    """The result of one run of a function: its outputs, and the way back to its inputs.

    ``outputs`` and ``aux`` are what the caller may show; ``graph_outputs`` and ``inputs`` are the outputs and the
    primals as the graph knows them, which nobody outside sees.
    """

    __slots__ = (
        "__weakref__",
        "_higher_order",
        "_nodes",
        "_policies",
        "aux",
        "graph_outputs",
        "inputs",
        "outputs",
    )

    outputs: list[Any]
    aux: list[Any]
    graph_outputs: list[Any]
    inputs: list[Tensor]

    def __init__(self) -> None:
        self._nodes: set[Any] | None = None
        self._policies: dict[PullPolicy, set[str]] | None = None

    def policies(self) -> dict[PullPolicy, set[str]]:
        """How the graph is to be pulled back, with the operations that ask for it."""
        if self._policies is None:
            nodes = graph.walk(self.graph_outputs)[1] if self._nodes is None else self._nodes
            self._policies, self._nodes = graph.policies_of(nodes), None
        return self._policies

    def _run(
        self, func: FlatFunction, lift: Lift, higher_order: bool, differentiate: TapeFunction | None = None
    ) -> list[Any]:
        """Run the function on the inputs, keep its outputs; the leaves of aux.

        ``higher_order`` says that what a pull gives may be differentiated in turn. ``differentiate`` maps the finished
        tape to the outputs and the leaves of aux that replace its own.
        """
        # The thread's own dict: attributes of a threading.local take three times as long.
        thread = _thread.__dict__
        depth = thread.get("recording", 0)
        self._higher_order = False
        thread["recording"] = depth + 1
        try:
            if higher_order:
                with (
                    hooks.higher_order.get("attention", hooks.NOTHING),
                    hooks.higher_order.get("compiled", hooks.NOTHING),
                ):
                    self.graph_outputs, aux = func(self.inputs, lift)
                    if differentiate is not None:
                        self.outputs, self.aux = self.graph_outputs, aux
                        self.graph_outputs, aux = differentiate(self)
            else:  # without a context that does nothing: a gradient of four numbers takes 1 % longer in it
                self.graph_outputs, aux = func(self.inputs, lift)
        finally:
            thread["recording"] = depth
        # A pull runs again what is in torch.utils.checkpoint, and has to do so under the same hook. It does not reach
        # what a nested tape recorded, which runs again after this one is left.
        self._higher_order = higher_order and depth == 0
        return aux

    def pull(
        self,
        cotangents: Sequence[Tensor | None],
        *,
        wanted: slice = ALL,
        retain_graph: bool = False,
        create_graph: bool | None = None,
    ) -> list[Tensor | None]:
        """A cotangent for each input, None where no output depends on it.

        ``wanted`` says which inputs are asked for; nothing is computed for the others alone.
        ``create_graph=None`` makes a graph only where the result can be differentiated from outside. A pull
        that makes a graph keeps the one that it reads, since the two share saved tensors.
        """
        inputs = self.inputs if wanted is ALL else self.inputs[wanted]
        if (
            _torch.functorch_active()
            and (wrong := self.policies().get(ONE_BY_ONE))
            and self._is_batch(cotangents)
        ):
            raise BatchedPullError(
                f"torch pulls a batch of cotangents of {' or '.join(sorted(wrong))} back wrongly. Expected one "
                f"cotangent at a time: pull them back in a loop."
            )
        roots, grad_outputs = [], []
        for root, cotangent in zip(self.graph_outputs, cotangents, strict=True):
            if cotangent is not None and root.requires_grad:
                roots.append(root)
                grad_outputs.append(cotangent)
        if not roots:
            return [None] * len(inputs)
        detach_result = False
        if create_graph is None:
            create_graph = torch.is_grad_enabled() and (
                self._is_tracked() or any(map(_torch.requires_grad_at_any_depth, grad_outputs))
            )
            if not create_graph and self._needs_graph():
                create_graph = True
                # A push detaches what it gives when it is done.
                detach_result = not torch.is_grad_enabled() and not _torch.forward_level_active()
        if create_graph and any(map(torch.is_inference, grad_outputs)):
            with _torch.OutsideInferenceMode():
                grad_outputs = [_torch.outside_inference_mode(seed) for seed in grad_outputs]
        arguments = roots, grad_outputs, inputs, retain_graph or create_graph, create_graph
        if self._higher_order:
            with (
                hooks.higher_order.get("attention", hooks.NOTHING),
                hooks.higher_order.get("compiled", hooks.NOTHING),
            ):
                pulled = _torch.backward(*arguments)
        else:
            pulled = _torch.backward(*arguments)
        return [_torch.detached(one) for one in pulled] if detach_result else pulled

    def _is_batch(self, cotangents: Sequence[Tensor | None]) -> bool:
        """Whether the cotangents carry a batch that the inputs do not."""
        given = [cotangent for cotangent in cotangents if cotangent is not None]
        return not _torch.batch_levels(given) <= _torch.batch_levels(self.inputs)

    def _needs_graph(self) -> bool:
        """Whether the pull makes a graph though nothing tracks its result."""
        return False

    @abstractmethod
    def _is_tracked(self) -> bool:
        """Whether what this tape gives can be differentiated from outside."""


@_torch.traced_inline_only
def record(
    func: FlatFunction,
    primals: Sequence[Tensor],
    *,
    internal_leaves: Sequence[Tensor] = (),
    higher_order: bool = False,
    inputs_recorded: bool = False,
) -> Tape:
    """Run ``func`` once on the primals, and keep the way back.

    ``internal_leaves`` are inputs of other tapes of the same transform: what depends on them alone is not tracked from
    outside. ``higher_order`` says that a pull of the tape will be differentiated in turn. ``inputs_recorded`` says that
    the primals are the inputs of another tape of the same transform, and need no views of their own.
    """
    if _torch.compiling():
        return _TracedTape(func, primals, higher_order or inputs_recorded)
    if _torch.is_eager():
        return _EagerTape(func, primals, internal_leaves, higher_order, inputs_recorded)
    return _LevelTape(func, primals, higher_order)


@_torch.traced_inline_only
def record_derivative(func: FlatFunction, primals: Sequence[Tensor], differentiate: TapeFunction) -> Tape:
    """The tape of what ``differentiate`` makes of the tape of ``func``, such as its gradient.

    Eagerly both are one tape, which takes 0.85 x as long as a tape inside a tape.
    """
    if _torch.compiling() or not _torch.is_eager():
        return record(differentiated(func, differentiate), primals)
    return _EagerTape(func, primals, differentiate=differentiate)


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


def conjugated(pulled: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What the engine pulled by the conjugate transpose, as the transpose gives it.

    A lazy conjugate has no ``numpy()``.
    """
    return [None if one is None else one.conj().resolve_conj() for one in pulled]


def recorded_outside(leaves: Sequence[Tensor]) -> bool:
    """Whether an outer tape of this thread, or a graph that a leaf belongs to, records what happens here."""
    return torch.is_grad_enabled() and (
        _thread.recording > 0 or any(map(_torch.requires_grad_at_any_depth, leaves))
    )


class _EagerTape(Tape):
    """Plain autograd, where no transform is active around this one."""

    __slots__ = ("_own_leaves", "_tracked")

    def __init__(
        self,
        func: FlatFunction,
        primals: Sequence[Tensor],
        internal_leaves: Sequence[Tensor] = (),
        higher_order: bool = False,
        inputs_recorded: bool = False,
        differentiate: TapeFunction | None = None,
    ) -> None:
        super().__init__()
        recording = torch.is_grad_enabled()
        with _torch.GradMode():
            self.inputs, views, requires_grad = [], [], False
            this = weakref.ref(self)
            for primal in primals:
                if inputs_recorded:
                    entered = primal
                    requires_grad = requires_grad or primal.requires_grad
                elif primal.requires_grad:
                    # Connected to the graph outside. A sparse tensor has no views.
                    entered = primal.view_as(primal) if primal.layout is torch.strided else primal.clone()
                    requires_grad = True
                else:
                    entered = _torch.outside_inference_mode(primal).detach().requires_grad_()
                    entered.autodiff_tape = this  # type: ignore[attr-defined]
                self.inputs.append(entered)
                # torch refuses writes to a leaf and to a view of one.
                if not primal.is_leaf:
                    views.append(entered)
            self._own_leaves = internal_leaves
            versions = _torch.versions(views) if views else []
            # While ``differentiate`` runs, the graph that it makes is tracked: by this tape.
            self._tracked: bool | None = True
            higher_order = (
                higher_order
                or differentiate is not None
                or (recording and (requires_grad or _thread.recording > 0))
            )
            aux = self._run(func, _torch.outside_inference_mode, higher_order, differentiate)
            self._tracked = requires_grad or None
            if views:
                _refuse_written(views, versions)
        if recording and self._tracked is None:
            # One walk for all of it: mostly nothing is tracked from outside.
            of_aux = [leaf for leaf in aux if isinstance(leaf, Tensor) and leaf.requires_grad]
            tracked, nodes = self._depends_on_outer_leaf([*self.graph_outputs, *of_aux])
            if not tracked:
                self._tracked, recording = False, False
            if not of_aux:
                self._tracked, self._nodes = tracked, nodes
        if recording and self._is_tracked():
            self.outputs, self.aux = self.graph_outputs, aux
        else:
            self.outputs = [_torch.detached(output) for output in self.graph_outputs]
            self.aux = [
                leaf if recording and self._depends_on_outer_leaf([leaf])[0] else _torch.detached(leaf)
                for leaf in aux
            ]

    def _is_tracked(self) -> bool:
        if self._tracked is None:
            self._tracked, self._nodes = self._depends_on_outer_leaf(self.graph_outputs)
        return self._tracked

    def _depends_on_outer_leaf(self, outputs: Sequence[Any]) -> tuple[bool, set[Any]]:
        """Whether the outputs depend on a leaf that requires grad and is not this tape's own; the nodes behind them.

        The walk costs 1 to 5 % of a gradient (chains of 1 to 1000 operations, a transformer layer).
        """
        leaf_nodes, nodes = graph.walk(outputs)
        # Only the node that accumulates into a leaf has a variable.
        leaves = [
            leaf for leaf in (getattr(node, "variable", None) for node in leaf_nodes) if leaf is not None
        ]
        leaves += [one for one in outputs if isinstance(one, Tensor) and one.is_leaf and one.requires_grad]
        own = {id(leaf) for leaf in (*self.inputs, *self._own_leaves)}
        for leaf in leaves:
            if id(leaf) not in own:
                # The leaf of a tape that is gone, as of a transform inside this one, is not tracked either.
                tape = getattr(leaf, "autodiff_tape", None)
                if tape is None or tape() is not None:
                    return True, nodes
        return False, nodes


class _LevelTape(Tape):
    """A functorch level, where other transforms are active and have to nest with this one.

    The pull happens after the level is left, so that the backward's operations pass through one
    interpreter less than they do in torch.func.grad.
    """

    __slots__ = ()

    def __init__(self, func: FlatFunction, primals: Sequence[Tensor], higher_order: bool) -> None:
        super().__init__()
        higher_order = (
            higher_order
            or recorded_outside(primals)
            or _torch.grad_level_active()
            or _torch.forward_level_active()
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

    def _is_tracked(self) -> bool:
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

    def _is_tracked(self) -> bool:
        return True


def _refuse_written(views: Sequence[Tensor], versions: Sequence[int]) -> None:
    """After an in-place write to a view, the gradient would be that of the written view."""
    if _torch.versions(views) != versions:
        raise InPlaceError(
            "the function wrote in place to an argument that is differentiated, of shape "
            f"{[tuple(view.shape) for view in views]}: a leaf Variable that requires grad is being used in "
            "an in-place operation. Expected a function that leaves its inputs as they are; write to a clone."
        )
