"""The state of the random number generators: remembered, put back, drawn from once more."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import TypeAlias

    from torch import Tensor

    # By device for the default generators, by themselves for others.
    RandomState: TypeAlias = Mapping[Any, Tensor]


def random_state(generators: Iterable[torch.Generator] = ()) -> dict[Any, Tensor]:
    """The state of the default generators, that of the CPU and those of CUDA once it is in use, and of others."""
    states: dict[Any, Tensor] = {one: one.get_state() for one in generators}
    states["cpu"] = torch.get_rng_state()
    if torch.cuda.is_initialized():
        states |= {f"cuda:{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
    return states


def set_random_state(states: RandomState) -> None:
    """Take the generators back to where they were."""
    for source, state in states.items():
        if isinstance(source, torch.Generator):
            source.set_state(state)
        elif source == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, source)


def has_drawn(since: RandomState) -> bool:
    """Whether random numbers were drawn since the generators were in these states."""
    now = _now(since)
    return any(not torch.equal(state, now[source]) for source, state in since.items())


def _now(states: RandomState) -> RandomState:
    """The state of the same generators as it is now."""
    return random_state(source for source in states if isinstance(source, torch.Generator))


@contextmanager
def random_numbers_from(states: RandomState) -> Iterator[None]:
    """Draw once more what was drawn from these states on; afterwards the generators go on where they were."""
    before = _now(states)
    set_random_state(states)
    try:
        yield
    finally:
        set_random_state(before)


def remember_randomness() -> Callable[[], None]:
    """A function that takes the generators back to where they are now."""
    return partial(set_random_state, random_state())
