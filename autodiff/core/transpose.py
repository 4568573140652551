"""Transposes: of a recorded function's pullback, which is its derivative, and of any linear function.

Works on flat lists of tensors. Never sees a tree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from autodiff import _torch
from autodiff.core.reverse import record

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from autodiff.core.tape import Tape


def transpose(
    tape: Tape,
    inspect: Callable[[list[Tensor | None]], None] = lambda _: None,
    *,
    at: Callable[[Tensor], Tensor] | None = None,
) -> Callable[[Sequence[Tensor | None]], list[Tensor | None]]:
    """The tape's derivative as a function of tangents: the pullback of its pullback.

    It is the conjugate transpose of a conjugate transpose. ``inspect`` is shown what the first pullback gives, None
    where no output depends on an input. ``at`` makes the cotangent at which the pullback is transposed: zeros, where
    every pullback is defined, unless a policy says ones. While a function is traced there is no graph to ask, and it
    is ones.
    """
    if at is None:
        ones = _torch.compiling() or "transposed at ones" in tape.policies()
        at = torch.ones_like if ones else torch.zeros_like

    def pull(cotangents: Sequence[Tensor]) -> list[Tensor | None]:
        pulled = tape.pull(cotangents, retain_graph=True)
        inspect(pulled)
        return pulled

    return transposed(
        pull, [at(output) for output in tape.outputs], internal_leaves=tape.inputs, at_level=tape.at_level
    )


def transposed(
    linear: Callable[[Sequence[Tensor]], Sequence[Tensor | None]],
    point: Sequence[Tensor],
    *,
    internal_leaves: Sequence[Tensor] = (),
    at_level: bool = False,
) -> Callable[[Sequence[Tensor | None]], list[Tensor | None]]:
    """The conjugate transpose of a linear function; None stands for zero, before and after.

    ``point`` are vectors to record it at: its derivative is the same everywhere.
    """
    reached: list[int] = []

    def apply(vectors: Sequence[Tensor], _: Any) -> tuple[list[Tensor | None], list[Any]]:
        images = linear(vectors)
        reached[:] = [i for i, image in enumerate(images) if image is not None]
        return [images[i] for i in reached], []

    tape = record(apply, point, internal_leaves=internal_leaves, at_level=at_level)
    return lambda vectors: tape.pull([vectors[i] for i in reached], retain_graph=True)
