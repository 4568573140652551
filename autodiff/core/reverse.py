"""Floor 1: reverse mode. Record a function once, pull cotangents back many times.

Works on flat lists of tensors and hands on `record`, whose tape gives None for an input that the
output does not depend on, and transposes of tapes and linear functions. Never sees a tree; imports
`_torch`, `attention`, `graph` and `errors`.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from autodiff import _torch
from autodiff.core import graph
from autodiff.errors import BatchedPullError, InPlaceError
from autodiff.torch_fixes import attention

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from autodiff.core.call import Lift

    # From the inputs, and what to do with every other tensor among the arguments, to the outputs and
    # the leaves of aux.
    Recordable: TypeAlias = Callable[[Sequence[Tensor], Lift | None], tuple[list[Any], list[Any]]]
    # From a tape to what its pulls give and the leaves of aux.
    Pulling: TypeAlias = Callable[["Tape"], tuple[list[Any], list[Any]]]

_ALL = slice(None)


class _Here(threading.local):
    """How many functions this thread is recording, each inside the one before."""

    recording = 0


_here = _Here()


class Tape(ABC):
    """What one run of a function left: its outputs, and the way back to its inputs.

    ``outputs`` and ``aux`` are what the caller may show; ``ends`` and ``inputs`` are the same tensors
    and the primals as the graph knows them, and nobody outside.
    """

    __slots__ = ("__weakref__", "_kinds", "_nodes", "_unfused", "aux", "ends", "inputs", "outputs")

    outputs: list[Any]
    aux: list[Any]
    ends: list[Any]
    inputs: list[Tensor]

    def __init__(self) -> None:
        self._nodes: set[Any] | None = None
        self._kinds: set[str] | None = None

    def kinds(self) -> set[str]:
        """The names of the graph's nodes."""
        if self._kinds is None:
            self._kinds = graph.kinds(graph.walk(self.ends)[1] if self._nodes is None else self._nodes)
            self._nodes = None
        return self._kinds

    def _run(self, func: Recordable, lift: Lift, twice: bool, then: Pulling | None = None) -> list[Any]:
        """Run the function on the inputs, keep its outputs as ends; the leaves of aux.

        ``twice`` says that somebody may pull back what a pull of this tape gives. ``then`` is shown the tape
        as it is after that, and gives the ends and the leaves of aux that it is to have instead.
        """
        # The thread's own dict: attributes of a threading.local take three times as long.
        here = _here.__dict__
        outside = here.get("recording", 0)
        self._unfused = False
        here["recording"] = outside + 1
        try:
            if twice:
                with attention.unfused:
                    self.ends, aux = func(self.inputs, lift)
                    if then is not None:
                        self.outputs, self.aux = self.ends, aux
                        self.ends, aux = then(self)
            else:
                self.ends, aux = func(self.inputs, lift)
        finally:
            here["recording"] = outside
        # A pull runs again what stands in torch.utils.checkpoint, and has to find attention as it was here.
        # What a nested tape recorded runs again outside of it too, where nothing can be done for it.
        self._unfused = twice and outside == 0
        return aux

    def pull(
        self,
        cotangents: Sequence[Tensor | None],
        *,
        only: slice = _ALL,
        retain_graph: bool = False,
        create_graph: bool | None = None,
    ) -> list[Tensor | None]:
        """A cotangent for each input, None where no output depends on it.

        ``only`` says which inputs are asked for; nothing is computed for the others alone.
        ``create_graph=None`` makes a graph only when somebody outside can watch the result. A pull
        that makes a graph keeps the one that it reads, since the two share saved tensors.
        """
        inputs = self.inputs if only is _ALL else self.inputs[only]
        if _torch.is_nested() and graph.is_wrong_in_batches(self.kinds()) and self._unbatched(cotangents):
            raise BatchedPullError(
                "a batch of cotangents of cdist, or of masked_select, is pulled back wrongly by torch, without a word. "
                "Expected one at a time: pull them in a loop, or take jacrev, which does."
            )
        ends, seeds = [], []
        for end, cotangent in zip(self.ends, cotangents, strict=True):
            if cotangent is not None and end.requires_grad:
                ends.append(end)
                seeds.append(cotangent)
        if not ends:
            return [None] * len(inputs)
        forced = False
        if create_graph is None:
            create_graph = torch.is_grad_enabled() and (
                self._watched() or any(map(_torch.requires_grad_at_any_depth, seeds))
            )
            if not create_graph and self._needs_grad_mode():
                create_graph = True
                # A push detaches what it gives when it is through.
                forced = not torch.is_grad_enabled() and not _torch.forward_level_active()
        if create_graph and any(map(torch.is_inference, seeds)):
            with _torch.NormalMode():
                seeds = [_torch.outside_inference(seed) for seed in seeds]
        arguments = ends, seeds, inputs, retain_graph or create_graph, create_graph
        if self._unfused:
            with attention.unfused:
                pulled = _torch.backward(*arguments)
        else:
            pulled = _torch.backward(*arguments)
        return [_torch.detached(one) for one in pulled] if forced else pulled

    def _unbatched(self, cotangents: Sequence[Tensor | None]) -> bool:
        """Whether the cotangents are a batch of which the inputs know nothing."""
        given = [cotangent for cotangent in cotangents if cotangent is not None]
        return not _torch.batch_levels(given) <= _torch.batch_levels(self.inputs)

    def _needs_grad_mode(self) -> bool:
        """Whether some backward formula is right only where a graph is made, though nobody watches."""
        return False

    @abstractmethod
    def _watched(self) -> bool:
        """Whether somebody outside can see a derivative of what this tape gives."""


@_torch.whole
def record(
    func: Recordable,
    primals: Sequence[Tensor],
    *,
    private: Sequence[Tensor] = (),
    twice: bool = False,
    inner: bool = False,
) -> Tape:
    """Run ``func`` once on the primals, and keep the way back.

    ``private`` are inputs of other tapes that belong to the same transform: a graph that ends in one
    of them is watched by nobody. ``twice`` says that a pull of the tape will be pulled back itself.
    ``inner`` says that the primals are the inputs of another tape of the same transform, which ``func`` has
    no other way to: then they need no view to be told apart by.
    """
    if _torch.compiling():
        return _TracedTape(func, primals, twice or inner)
    if _torch.on_ground():
        return _GroundTape(func, primals, private, twice, inner)
    return _LevelTape(func, primals, twice)


@_torch.whole
def record_pull(func: Recordable, primals: Sequence[Tensor], pull: Pulling) -> Tape:
    """The tape of ``pull``, which pulls cotangents through the tape of ``func``.

    On the ground both are one and the same, which takes 0.85 x as long as a tape inside a tape.
    """
    if _torch.compiling() or not _torch.on_ground():
        return record(lambda leaves, lift: pull(record(lifted_by(lift, func), leaves, inner=True)), primals)
    return _GroundTape(func, primals, then=pull)


def lifted_by(outer: Lift | None, func: Recordable) -> Recordable:
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
        _here.recording > 0 or any(map(_torch.requires_grad_at_any_depth, leaves))
    )


class _GroundTape(Tape):
    """Plain autograd, where no transform is active around this one."""

    __slots__ = ("_known", "_private")

    def __init__(
        self,
        func: Recordable,
        primals: Sequence[Tensor],
        private: Sequence[Tensor] = (),
        twice: bool = False,
        inner: bool = False,
        then: Pulling | None = None,
    ) -> None:
        super().__init__()
        recording = torch.is_grad_enabled()
        with _torch.Recording():
            self.inputs, views, watched = [], [], False
            me = weakref.ref(self)
            for primal in primals:
                if inner:
                    entered = primal
                    watched = watched or primal.requires_grad
                elif primal.requires_grad:
                    # Connected where somebody outside watches it. A sparse tensor has no views.
                    entered = primal.view_as(primal) if primal.layout is torch.strided else primal.clone()
                    watched = True
                else:
                    entered = _torch.outside_inference(primal).detach().requires_grad_()
                    entered.autodiff_tape = me  # type: ignore[attr-defined]
                self.inputs.append(entered)
                # torch refuses writes to a leaf and to a view of one.
                if not primal.is_leaf:
                    views.append(entered)
            self._private = private
            versions = _torch.versions(views) if views else []
            # While ``then`` pulls, the graph that it makes is watched: by this tape.
            self._known: bool | None = True
            twice = twice or then is not None or (recording and (watched or _here.recording > 0))
            aux = self._run(func, _torch.outside_inference, twice, then)
            self._known = watched or None
            if views:
                _refuse_written(views, versions)
        if recording and self._watched():
            self.outputs, self.aux = self.ends, aux
        else:
            self.outputs = [_torch.detached(end) for end in self.ends]
            self.aux = [
                leaf if recording and self._foreign([leaf]) else _torch.detached(leaf) for leaf in aux
            ]

    def _watched(self) -> bool:
        if self._known is None:
            self._known = self._foreign(self.ends)
        return self._known

    def _foreign(self, ends: Sequence[Any]) -> bool:
        """Whether the graph of ``ends`` ends in a leaf that is not this tape's own.

        The walk costs 1 to 5 % of a gradient (chains of 1 to 1000 operations, a transformer layer).
        """
        stops, self._nodes = graph.walk(ends)
        # Only the node that accumulates into a leaf has a variable.
        leaves = [leaf for leaf in (getattr(node, "variable", None) for node in stops) if leaf is not None]
        leaves += [end for end in ends if isinstance(end, Tensor) and end.is_leaf and end.requires_grad]
        own = {id(leaf) for leaf in (*self.inputs, *self._private)}
        for leaf in leaves:
            if id(leaf) not in own:
                # The leaf of a tape that is gone, as of a transform inside this one, is nobody's either.
                tape = getattr(leaf, "autodiff_tape", None)
                if tape is None or tape() is not None:
                    return True
        return False


class _LevelTape(Tape):
    """A functorch level, where other transforms are active and have to nest with this one.

    The pull happens after the level is left, so that the backward's operations pass through one
    interpreter less than they do in torch.func.grad.
    """

    __slots__ = ()

    def __init__(self, func: Recordable, primals: Sequence[Tensor], twice: bool) -> None:
        super().__init__()
        twice = (
            twice or recorded_outside(primals) or _torch.grad_level_active() or _torch.forward_level_active()
        )
        with _torch.grad_level() as level:
            self.inputs = [_torch.wrap_watched(primal, level) for primal in primals]
            aux = self._run(func, lambda tensor: _torch.wrap(tensor, level), twice)
            self.outputs = [_torch.unwrap(end, level) for end in self.ends]
            self.aux = [_torch.unwrap(leaf, level) for leaf in aux]

    def pull(self, cotangents: Sequence[Tensor | None], **options: Any) -> list[Tensor | None]:
        if graph.writes_over_cotangents(self.kinds()):
            # vmap refuses where what is written to is not batched and what is written is.
            pairs = zip(cotangents, self.outputs, strict=True)
            cotangents = [None if c is None else c + torch.zeros_like(output) for c, output in pairs]
        return super().pull(cotangents, **options)

    def _needs_grad_mode(self) -> bool:
        # Without grad mode, linalg's formulas reuse the factors that forward saved, and silu, mish and
        # group_norm use a fused backward. Neither carries a tangent; and with factors of the outer of two
        # batches and a right-hand side of the inner one torch's solve is silently wrong, as in
        # vmap(hessian(logdet)).
        return _torch.forward_level_active() or graph.has_linalg(self.kinds())

    def _watched(self) -> bool:
        return _torch.grad_level_active() or any(
            isinstance(output, Tensor) and _torch.requires_grad_at_any_depth(output)
            for output in self.outputs
        )


class _TracedTape(Tape):
    """torch.func.vjp, which torch.compile's tracer knows."""

    __slots__ = ("_pullback",)

    def __init__(self, func: Recordable, primals: Sequence[Tensor], twice: bool) -> None:
        inside: list[Any] = []

        def of_inputs(*inputs: Tensor) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
            outputs, inside[:] = func(inputs, None)
            # It takes nothing but tensors for aux.
            return tuple(outputs), tuple(leaf for leaf in inside if isinstance(leaf, Tensor))

        # The tracer knows this switch, and turns it back.
        with sdpa_kernel(SDPBackend.MATH) if twice else nullcontext():
            recorded: Any = torch.func.vjp(of_inputs, *primals, has_aux=True)
        outputs, self._pullback, tensors = recorded
        coming = iter(tensors)
        self.outputs, self.ends, self.inputs = list(outputs), list(outputs), list(primals)
        self.aux = [next(coming) if isinstance(leaf, Tensor) else leaf for leaf in inside]

    def pull(
        self,
        cotangents: Sequence[Tensor | None],
        *,
        only: slice = _ALL,
        retain_graph: bool = False,
        create_graph: bool | None = None,
    ) -> list[Tensor | None]:
        del retain_graph, create_graph  # the tracer's graph holds what it needs
        filled = [
            torch.zeros_like(output) if cotangent is None else cotangent
            for output, cotangent in zip(self.outputs, cotangents, strict=True)
        ]
        return list(self._pullback(tuple(filled)))[only]

    def _watched(self) -> bool:
        return True


def transpose(
    tape: Tape,
    look: Callable[[list[Tensor | None]], None] = lambda _: None,
    origin: Callable[[Tensor], Tensor] | None = None,
) -> Callable[[Sequence[Tensor | None]], list[Tensor | None]]:
    """The tape's derivative as a function of tangents: the pullback of its pullback.

    Conjugate twice: the engine's pullback is the conjugate transpose, and so is its own pullback.
    ``look`` is shown what the first pullback gives, None where no output depends on an input. ``origin`` makes the
    cotangent that this is taken at, which a hook that is not linear tells. It is zero, where every pullback is defined
    (that of eig asks for invariance under phases); but that of logcumsumexp, which takes the logarithm, has no
    derivative there. A tracer's graph does not tell.
    """
    if origin is None:
        at_ones = _torch.compiling() or graph.takes_logarithm(tape.kinds())
        origin = torch.ones_like if at_ones else torch.zeros_like

    def pull(cotangents: Sequence[Tensor]) -> list[Tensor | None]:
        pulled = tape.pull(cotangents, retain_graph=True)
        look(pulled)
        return pulled

    return transposed(pull, [origin(output) for output in tape.outputs], private=tape.inputs)


def transposed(
    linear: Callable[[Sequence[Tensor]], Sequence[Tensor | None]],
    origin: Sequence[Tensor],
    *,
    private: Sequence[Tensor] = (),
) -> Callable[[Sequence[Tensor | None]], list[Tensor | None]]:
    """The conjugate transpose of a linear function; None stands for zero, before and after.

    ``origin`` are vectors to record it at: its derivative is the same everywhere.
    """
    reached: list[int] = []

    def apply(vectors: Sequence[Tensor], _: Any) -> tuple[list[Tensor | None], list[Any]]:
        images = linear(vectors)
        reached[:] = [i for i, image in enumerate(images) if image is not None]
        return [images[i] for i in reached], []

    tape = record(apply, origin, private=private)
    return lambda vectors: tape.pull([vectors[i] for i in reached], retain_graph=True)


def _refuse_written(views: Sequence[Tensor], versions: Sequence[int]) -> None:
    """A view that is written in place becomes another point of the graph than the one it entered as."""
    if _torch.versions(views) != versions:
        raise InPlaceError(
            "the function wrote in place to an argument that is differentiated, of shape "
            f"{[tuple(view.shape) for view in views]}: a leaf Variable that requires grad is being used in "
            "an in-place operation. Expected a function that leaves its inputs as they are; write to a clone."
        )
