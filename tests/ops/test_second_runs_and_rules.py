"""Every operator of PyTorch's own database inside checkpoints, and as a custom rule, against itself without."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import autodiff as ad
from known import LEFT_OUT, TORCH

if not torch.__version__.startswith(TORCH):
    pytest.skip(f"the samples are those of torch {TORCH}x", allow_module_level=True)

from matrix import OPERATORS, Case, cases

pytestmark = pytest.mark.filterwarnings("ignore")

CASES = 1
Function: TypeAlias = Callable[..., Sequence[Tensor]]


def _seeded(compute: Callable[..., Any], *args: Any) -> Any:
    torch.manual_seed(2)
    return compute(*args)


RULES = "jvp of a bwd", "linearize of a bwd", "vjp of a rule"
# What does not hold, by operator.
KNOWN: dict[str, tuple[str, ...]] = {
    # torch's checkpoint stops before the noise is written: its result is whatever was in memory.
    "nn.functional.rrelu": ("rows of torch's",),
    # The two modes of torch differ: with several writes to one place, at kinks and infinities, by phases.
    "as_strided_scatter": RULES,
    **dict.fromkeys((f"nn.functional.max_unpool{n}d" for n in (1, 2, 3)), RULES),
    "linalg.eigh": ("vjp of a rule",),
    "linalg.norm.subgradients_at_zero": ("vjp of a rule",),
    "torch.ops.aten._safe_softmax.default": ("vjp of a rule",),
    # A mode that torch does not have, under the transforms that a rule needs.
    **dict.fromkeys(("sparse.sampled_addmm", "sparse.mm.reduce", "tensor_split", "to_sparse"), RULES),
    **dict.fromkeys((f"nn.functional.linear_cross_entropy.chunked{which}" for which in ("", "_none")), RULES),
    **dict.fromkeys(
        (
            *("_segment_reduce.lengths", "_segment_reduce.offsets", "nn.functional.ctc_loss"),
            *("nn.functional.embedding_bag", "nn.functional.multi_margin_loss"),
            "nn.functional.multilabel_margin_loss",
        ),
        RULES,
    ),
}


# A pull in a batch, which runs a checkpointed function again inside vmap.


def _pulled_rows(func: Function, case: Case) -> Sequence[Tensor]:
    _, pullback = ad.vjp(func, *case.primals)
    rows = tuple(torch.stack([cotangent, -2 * cotangent]) for cotangent in case.cotangents)
    return ad.vmap(pullback, randomness="same")(rows)


def _slopes(func: Function, case: Case) -> Sequence[Tensor]:
    return ad.jvp(func, tuple(case.primals), tuple(case.tangents))[1]


def _pulled(func: Function, case: Case) -> Sequence[Tensor]:
    return ad.vjp(func, *case.primals)[1](tuple(case.cotangents))


def _linearized(func: Function, case: Case) -> Sequence[Tensor]:
    return ad.linearize(func, *case.primals)[1](*case.tangents)


def _torchs(func: Function) -> Function:
    return lambda *primals: checkpoint(func, *primals, use_reentrant=False)


def _with_bwd(func: Function) -> Function:
    """The function, whose rule is its own pullback."""
    ruled = ad.custom_vjp(func)
    ruled.defvjp(
        lambda *primals: (func(*primals), primals),
        lambda primals, cotangents: ad.vjp(func, *primals)[1](cotangents),
    )
    return ruled


def _with_rule(func: Function) -> Function:
    """The function, whose rule is its own pushforward."""
    ruled = ad.custom_jvp(func)
    ruled.defjvp(lambda primals, tangents: ad.jvp(func, primals, tangents))
    return ruled


CHECKS: dict[str, tuple[Callable[[Function, Case], Sequence[Tensor]], Callable[[Function], Function]]] = {
    "rows of ours": (_pulled_rows, ad.checkpoint),
    "rows of torch's": (_pulled_rows, _torchs),
    "jvp of a bwd": (_slopes, _with_bwd),
    "linearize of a bwd": (_linearized, _with_bwd),
    "vjp of a rule": (_pulled, _with_rule),
}


@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in LEFT_OUT])
def test_as_without(name: str) -> None:
    for case, (check, (compute, wrap)) in itertools.product(cases(name)[:CASES], CHECKS.items()):
        if check in KNOWN.get(name, ()):
            continue
        try:
            expected = _seeded(compute, case.func, case)
        except Exception:  # noqa: BLE001  the operator lacks a rule, as known.py says
            continue
        given = _seeded(compute, wrap(case.func), case)
        for one, other in zip(given, expected, strict=True):
            scale = 1 + other.abs().max().nan_to_num(posinf=0.0).item() if other.numel() else 1.0
            assert torch.allclose(one, other, rtol=1e-7, atol=case.tolerance * scale, equal_nan=True), check
