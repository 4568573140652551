"""The state of the random number generators: remembered, put back, drawn from once more."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor


def random_state() -> dict[str, Tensor]:
    """The state of the default generators: that of the CPU, and those of CUDA once it is in use."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {f"cuda:{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
    return states


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Take the generators back to where they were."""
    for device, state in states.items():
        if device == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


def has_drawn(since: Mapping[str, Tensor]) -> bool:
    """Whether random numbers were drawn since the generators were in these states."""
    now = random_state()
    return any(not torch.equal(state, now[device]) for device, state in since.items())


@contextmanager
def random_numbers_from(states: Mapping[str, Tensor]) -> Iterator[None]:
    """Draw once more what was drawn from these states on; afterwards the generators go on where they were."""
    before = random_state()
    set_random_state(states)
    try:
        yield
    finally:
        set_random_state(before)


def remember_randomness() -> Callable[[], None]:
    """A function that takes the generators back to where they are now."""
    return partial(set_random_state, random_state())
