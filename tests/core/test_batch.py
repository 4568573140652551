"""The batching level."""

from __future__ import annotations

import torch
from torch import Tensor

import autodiff as ad
from autodiff.core import batch, randomness


def test_run_tells_which_outputs_are_batched() -> None:
    told = []

    def out_dims(outputs: list[Tensor], batched: list[bool]) -> list[int]:
        told.extend(batched)
        return [1, 0]

    x, shared = torch.arange(6.0).reshape(3, 2), torch.ones(4)
    one, other = batch.run(
        lambda leaves: [leaves[0] * 2, leaves[1]], [x, shared], [0, None], 3, "error", out_dims
    )
    assert told == [True, False]
    assert torch.equal(one, 2 * x.T)
    assert torch.equal(other, torch.ones(3, 4))


def test_rewind_repeats_the_same_random_numbers() -> None:
    rewind = randomness.remember_randomness()
    first = torch.rand(3)
    rewind()
    assert torch.equal(torch.rand(3), first)


def test_same_draws_once_for_all_chunks_of_a_jacobian() -> None:
    x = torch.ones(9, dtype=torch.float64)
    jacobian = ad.jacfwd(lambda x: x * torch.rand_like(x), chunk_size=2)(x)
    assert torch.equal(jacobian, torch.diag(jacobian.diagonal()))
    assert len(set(jacobian.diagonal().tolist())) == 9
