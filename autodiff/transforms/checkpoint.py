"""Store the inputs of a function instead of what it computes on the way. Builds on `core` alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from autodiff import _torch
from autodiff.core import randomness, trees
from autodiff.core.call import Lift, is_differentiable, refilled, spread, wraps
from autodiff.core.closures import CapturedTensors, ReplacedTensors
from autodiff.core.forward import push
from autodiff.core.reverse import rerecord
from autodiff.core.rules import Rules, attach, inplace_counts, is_tracked
from autodiff.core.tape import checkpoints, recording_once
from autodiff.errors import CaptureError, InPlaceError
from autodiff.types import P, R


def checkpoint(func: Callable[P, R]) -> Callable[P, R]:
    """The same function, which is run again in the backward pass instead of remembering what it computed.

    Reverse mode keeps every intermediate result. Through a checkpointed function it keeps the arguments and
    the output, and needs the intermediate results of one such function at a time, for one more evaluation of
    it. A chain of n layers in sqrt(n) segments takes the memory of 2 sqrt(n) layers.

    Random numbers repeat in the second run. Tensors that the function captures, such as a module's parameters,
    are found and differentiated as well. Forward mode stores nothing, and runs the function once more.

    >>> import torch
    >>> import autodiff as ad
    >>> layer = checkpoint(lambda x: torch.sin(x).exp())
    >>> ad.grad(lambda x: layer(x).sum())(torch.zeros(2))
    tensor([1., 1.])

    Args:
        func: a function of trees, or a module, that returns a tree. It has to compute the same when it runs again.

    Returns:
        A function of the same arguments with the same output, for every transform and for plain autograd.

    Raises:
        CaptureError: inside other transforms, where ``func`` hands a captured tensor that is differentiated to
            a transform of its own; pass it as an argument.
        InPlaceError: inside other transforms, where ``func`` writes in place to an argument, or to a captured
            tensor that is differentiated.

    A. Griewank and A. Walther, "Algorithm 799: revolve", ACM Transactions on Mathematical Software 26 (2000);
    T. Chen et al., "Training deep nets with sublinear memory cost", arXiv:1604.06174 (2016).
    """

    @wraps(func)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if _torch.compiling():
            # A compiler decides itself what it keeps.
            return func(*args, **kwargs)
        if not _torch.functorch_active():
            if not torch.is_grad_enabled() or _torch.forward_level_active():
                # Nothing is kept; and a second run would find the tangents gone.
                return func(*args, **kwargs)
            # torch's own: what it hooks on sees all tensors, also those that an autograd Function captures.
            # Not stopped early: that is before an operation has written what it saves, such as the noise of rrelu.
            checkpoints.used = True
            run = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False, early_stop=False)
            return _torch.under_guard(run, _call, func, args, kwargs)
        return _torch.under_guard(_on_level, func, args, kwargs)

    return checkpointed


def _call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run in the same way for the second time, which comes inside whatever pulls.

    torch finds what the first run saved by its place in the second one. So the transforms and checkpoints in ``func``
    have to go the same way in both, or another tensor would be taken for it silently.
    """
    return recording_once(func, *args, **kwargs)


def _on_level(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run on constants, and tie the output to the arguments and to what is captured."""
    leaves, spec = trees.flatten((args, kwargs))
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    state = randomness.random_state()
    constants = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    found = CapturedTensors([constant for constant in constants if isinstance(constant, Tensor)])
    versions = inplace_counts(constants)
    with found:
        inner_args, inner_kwargs = trees.unflatten(spec, constants)
        outputs, out_spec = trees.flatten(func(*inner_args, **inner_kwargs))
    if versions != inplace_counts(constants) or found.versions != inplace_counts(found.shown):
        raise _written(func)
    if any(is_tracked(output) for output in outputs if isinstance(output, Tensor)):
        raise _captured_inside(func)

    def rerun(tensors: Sequence[Tensor]) -> list[Any]:
        filled = list(leaves)
        for position, tensor in zip(where, tensors, strict=False):
            filled[position] = tensor
        again, again_kwargs = trees.unflatten(spec, filled)
        replaced = ReplacedTensors(found.tensors, tensors[len(where) :])
        try:
            with randomness.random_numbers_from(state), replaced:
                result = trees.leaves(func(*again, **again_kwargs))
        except RuntimeError as error:
            # A transform inside was handed the captured tensor itself, whose level is gone.
            if _torch.says(error, "a level that is gone"):
                raise _captured_inside(func) from error
            raise
        if not replaced.unused.isdisjoint(found.tracked):
            raise _captured_inside(func)
        return [leaf for leaf in result if is_differentiable(leaf)]

    saved = [*(leaves[i] for i in where), *found.shown]
    return trees.unflatten(out_spec, attach(_Rerun(rerun), outputs, saved))


def _captured_inside(func: Callable[..., Any]) -> CaptureError:
    return CaptureError(
        f"checkpoint: {getattr(func, '__name__', type(func).__name__)} captures a tensor that is differentiated, and "
        f"hands it to a transform of its own, where it cannot be replaced. Expected an argument: pass the tensor to "
        f"the checkpointed function."
    )


def _written(func: Callable[..., Any]) -> InPlaceError:
    return InPlaceError(
        f"checkpoint: {getattr(func, '__name__', type(func).__name__)} wrote in place to an argument or to a captured "
        f"tensor that is differentiated, and would find it written when it runs again. Expected a function that "
        f"leaves them as they are; write to a clone."
    )


class _Rerun(Rules):
    """Both modes by running the function again."""

    def __init__(self, rerun: Callable[[Sequence[Tensor]], list[Any]]) -> None:
        self._rerun = rerun

    def pull(
        self, saved: Sequence[Tensor], cotangents: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        tape, where = rerecord(self._rerun, saved, wanted)
        return spread(tape.pull(cotangents), where, len(saved))

    def push(self, saved: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        where = [i for i, tangent in enumerate(tangents) if tangent is not None]

        def func(primals: Sequence[Tensor], lift: Lift | None) -> tuple[list[Any], list[Any]]:
            return self._rerun(refilled(saved, where, primals, lift)), []

        vectors = [tangent for tangent in tangents if tangent is not None]
        return push(func, [saved[i] for i in where], vectors).tangents
