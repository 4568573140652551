"""The way back through a function that was run once: the outputs, the inputs, and pulls between them.

Works on flat lists of tensors. Never sees a tree.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from autodiff import _torch
from autodiff.core import graph, hooks
from autodiff.core.call import Lift
from autodiff.core.captures import reaches_tracked_tensor
from autodiff.core.rules import Rules, attach
from autodiff.errors import BatchedPullError, MissingRuleError

if TYPE_CHECKING:
    from autodiff.core.hooks import NodePullback, NodeTranspose, PullPolicy

# From the inputs, and what to do with every other tensor among the arguments, to the outputs and the leaves of aux.
FlatFunction: TypeAlias = Callable[[Sequence[Tensor], Lift | None], tuple[list[Any], list[Any]]]
# From a tape to what pulls through it give, and the leaves of aux.
TapeFunction: TypeAlias = Callable[["Tape"], tuple[list[Any], list[Any]]]

ALL = slice(None)
ONE_BY_ONE: PullPolicy = "one cotangent at a time"


class _Checkpoints:
    """Whether the process has used `checkpoint`: then a pull may run functions again, inside torch's hooks."""

    used = False


checkpoints = _Checkpoints()


class _Thread(threading.local):
    """How many functions this thread is recording, each inside the one before."""

    recording = 0


_thread = _Thread()


def recording_once(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``func`` at a recording depth of one, so that a second run takes the same branches as the first."""
    before = _thread.recording
    try:
        _thread.recording = 1
        return func(*args, **kwargs)
    finally:
        _thread.recording = before


def recorded_outside(leaves: Sequence[Tensor]) -> bool:
    """Whether an outer tape of this thread, or a graph that a leaf belongs to, records what happens here."""
    return torch.is_grad_enabled() and (
        _thread.recording > 0 or any(map(_torch.requires_grad_at_any_depth, leaves))
    )


def inside_derivative() -> bool:
    """Whether a transform that differentiates is at work around what happens here."""
    if recorded_outside(()):
        return True
    return not _torch.is_eager() and (_torch.grad_level_active() or _torch.forward_level_active())


class Tape(ABC):
    """The result of one run of a function: its outputs, and the way back to its inputs.

    ``outputs`` and ``aux`` are what the caller may show; ``graph_outputs`` and ``inputs`` are the outputs and the
    primals as the graph knows them, which nobody outside sees.
    """

    at_level = False

    __slots__ = (
        "__weakref__",
        "_functions",
        "_higher_order",
        "_nodes",
        "_policies",
        "_replaced",
        "_without_tangents",
        "aux",
        "graph_outputs",
        "has_hooks",
        "inputs",
        "outputs",
    )

    outputs: list[Any]
    aux: list[Any]
    graph_outputs: list[Any]
    inputs: list[Tensor]

    def __init__(self) -> None:
        self._nodes: set[Any] | None = None
        self._functions: list[Any] | None = None
        self.has_hooks = False
        self._policies: dict[PullPolicy, set[str]] | None = None
        self._replaced: list[tuple[Any, NodePullback]] | None = None
        # What is recorded outside of all forward modes is a constant inside of them.
        self._without_tangents = True

    def nodes(self) -> set[Any]:
        """The nodes of the graph between the outputs and the inputs."""
        return graph.walk(self.graph_outputs, self.inputs)[1]

    def functions(self) -> list[Any]:
        """The nodes of autograd Functions: what these give need not be the gradient of anything."""
        if self._functions is None:
            self._functions = graph.functions(self._known_nodes())
        return self._functions

    def _replaced_pullbacks(self) -> list[tuple[Any, NodePullback]]:
        """The nodes that a fix pulls back otherwise where the pull makes a graph."""
        if self._replaced is None:
            self._replaced = graph.registered(hooks.node_pullbacks, self._known_nodes())
        return self._replaced

    def transposable(self) -> list[tuple[Any, NodeTranspose]]:
        """The nodes whose pullbacks a fix transposes, where what they have saved is constant."""
        return graph.registered(hooks.node_transposes, self._known_nodes())

    def _known_nodes(self) -> set[Any]:
        if self._nodes is None:
            self._nodes = self.nodes()
        return self._nodes

    def policies(self) -> dict[PullPolicy, set[str]]:
        """How the graph is to be pulled back, with the operations that ask for it."""
        if self._policies is None:
            nodes = self.nodes() if self._nodes is None else self._nodes
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
            aux: list[Any]
            if higher_order:
                aux = hooks.around_higher_order(self._run_inside, func, lift, differentiate)
            else:
                aux = self._run_inside(func, lift, differentiate)
        finally:
            thread["recording"] = depth
        # A pull runs again what is in torch.utils.checkpoint, and has to do so under the same hook. It does not reach
        # what a nested tape recorded, which runs again after this one is left.
        self._higher_order = higher_order and depth == 0
        return aux

    def _run_inside(self, func: FlatFunction, lift: Lift, differentiate: TapeFunction | None) -> list[Any]:
        hook_count = graph.hooks_of_others()
        self.graph_outputs, aux = func(self.inputs, lift)
        self.has_hooks = graph.hooks_of_others() != hook_count
        self.refuse_written()
        if differentiate is not None:
            self.outputs, self.aux = self.graph_outputs, aux
            self.graph_outputs, aux = differentiate(self)
            self._nodes = self._functions = self._policies = self._replaced = None  # those of another graph
        return aux

    @_torch.traced_inline_only
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
        if self._without_tangents and not _torch.is_eager() and _torch.forward_level_active():
            primals, tangents = zip(*map(_split, cotangents), strict=True)
            if any(tangent is not None for tangent in tangents):
                # Linear in its cotangents. Torch's pullbacks need not have a rule for forward mode.
                one = self.pull(primals, wanted=wanted, retain_graph=True, create_graph=create_graph)
                other = self.pull(
                    tangents, wanted=wanted, retain_graph=retain_graph, create_graph=create_graph
                )
                return [_joined(p, t) for p, t in zip(one, other, strict=True)]
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
        cut: Callable[[list[Tensor | None]], list[Tensor | None]] | None = None
        if create_graph is None:
            create_graph, cut = self._makes_graph(grad_outputs)
        if create_graph and any(map(torch.is_inference, grad_outputs)):
            leave = _torch.without_inference_mode
            grad_outputs = [leave(_torch.outside_inference_mode, seed) for seed in grad_outputs]
        arguments = roots, grad_outputs, inputs, retain_graph or create_graph, create_graph
        replaced = self._replaced_pullbacks() if create_graph else ()
        run = partial(graph.backward_with, replaced) if replaced else _torch.backward
        if self._higher_order:
            run = partial(hooks.around_higher_order, run)
        pulled = _torch.under_guard(run, *arguments) if checkpoints.used else run(*arguments)
        if cut is not None:
            pulled = cut(pulled)
        return self._refusing_more(pulled, inputs, grad_outputs) if create_graph else pulled

    def _makes_graph(
        self, grad_outputs: Sequence[Tensor]
    ) -> tuple[bool, Callable[[list[Tensor | None]], list[Tensor | None]] | None]:
        """Whether a pull makes a graph, and what cuts its result off where that is not tracked from outside."""
        if torch.is_grad_enabled():
            if self.is_tracked() or any(map(_torch.requires_grad_at_any_depth, grad_outputs)):
                return True, None
            if self.has_hooks or any(map(reaches_tracked_tensor, self.functions())):
                return True, self._cut_where_untracked
        if not self._needs_graph():
            return False, None
        # A push detaches what it gives when it is done.
        detach = not torch.is_grad_enabled() and not _torch.forward_level_active()
        return True, (lambda pulled: [_torch.detached(one) for one in pulled]) if detach else None

    def _cut_where_untracked(self, pulled: list[Tensor | None]) -> list[Tensor | None]:
        """Cut off what no tensor outside tracks, where a hook or a backward might have made it depend on one."""
        return pulled

    def _refusing_more(
        self, pulled: list[Tensor | None], inputs: Sequence[Tensor], grad_outputs: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """``pulled``, whose derivative is an error where a backward is marked by once_differentiable."""
        once = [node for node in self.functions() if _torch.is_differentiable_once(node)]
        if not once:
            return pulled
        depends_on = [*map(_torch.unwrapped_if_dead, inputs), *grad_outputs]
        if any(type(node).__name__ == "Error" for node in graph.walk(pulled, inputs)[1]):
            # torch cut off what this backward was given, which may depend on all that the outputs depend on.
            depends_on += self.outputs if self.at_level else self.graph_outputs
        return attach(_NotTwice(once[0]), pulled, depends_on, constant=False)

    def _is_batch(self, cotangents: Sequence[Tensor | None]) -> bool:
        """Whether the cotangents carry a batch that the inputs do not."""
        given = [cotangent for cotangent in cotangents if cotangent is not None]
        return not _torch.batch_levels(given) <= _torch.batch_levels(self.inputs)

    def _needs_graph(self) -> bool:
        """Whether the pull makes a graph though nothing tracks its result."""
        return False

    def refuse_written(self) -> None:  # noqa: B027  levels have no views to be written
        """Refuse a function that has written to its inputs."""

    @abstractmethod
    def is_tracked(self) -> bool:
        """Whether what this tape gives can be differentiated from outside."""


def _split(cotangent: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if cotangent is None else _torch.unpack_dual(cotangent)


def _joined(primal: Tensor | None, tangent: Tensor | None) -> Tensor | None:
    return primal if primal is None or tangent is None else _torch.make_dual(primal, tangent)


class _NotTwice(Rules):
    """The second derivative of a backward that is marked by once_differentiable: an error, where torch gives zero."""

    def __init__(self, node: Any) -> None:
        self._name = _torch.user_function(node).__name__

    def pull(self, *_: Any, **options: Any) -> NoReturn:
        del options
        raise MissingRuleError(
            f"the backward of {self._name} is marked with @once_differentiable, but would be differentiated: for a "
            f"second derivative, or as the pullback of a pullback, by which linearize finds a first one. Expected a "
            f"backward made of differentiable operations and without the mark, or a first derivative by grad or vjp."
        )

    push = pull
