"""Whether a side's result is right: against the one by hand in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import optree
import torch

if TYPE_CHECKING:
    from torch import Tensor

# Of the norm over all leaves. A float32 sum of a thousand terms may lose three digits of seven.
TOLERANCE = 1e-4


def leaves_of(result: Any) -> list[Tensor]:
    """The tensors of a tree, in order; dicts keep theirs."""
    return [leaf for leaf in optree.tree_leaves(result, namespace="torch") if isinstance(leaf, torch.Tensor)]


def check(name: str, result: Any, reference: Any) -> None:
    """Raise unless the result's tensors are the reference's, up to rounding."""
    found, expected = (
        torch.cat([leaf.detach().cpu().double().flatten() for leaf in leaves_of(of)])
        for of in (result, reference)
    )
    if found.shape != expected.shape:
        raise AssertionError(f"{name}: {len(found)} numbers, but float64 gives {len(expected)}")
    error = (found - expected).norm() / expected.norm()
    if not error < TOLERANCE:
        raise AssertionError(f"{name}: {error:.1e} off the result in float64")
