"""Attention in forward mode and at second order, against torch's derivatives of the plain formula."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from scenarios import assert_close, difference
from table.row import Section
from torch_fixes.test_attention import (
    T,
    X,
    attending,
    attention_module,
    by_hand,
    cubed,
    expected_of,
    layer,
    multihead,
)

ATTENTION = Section("Attention")
REFUSED = "(NotImplementedError: .*forward AD|RuntimeError: .*_backward is not implemented)"
ATTENDING, BY_HAND = attending(scaled_dot_product_attention), attending(by_hand)
SUM = cubed(ATTENDING)
WAYS = {
    "jvp": ("Jt", lambda library: library.jvp(ATTENDING, (X,), (T,))[1]),
    "hvp": ("Ht", lambda library: library.hvp(SUM, (X,), (T,))[1]),
    "hessian": ("H", lambda library: library.hessian(SUM)(X)),
    "vmap(hessian)": ("H", lambda library: library.vmap(library.hessian(SUM))(X[None])[0]),
    "vjp(grad)": ("Ht", lambda library: library.vjp(library.grad(SUM), X)[1](T)[0]),
    "functional.vhp": ("Ht", lambda library: library.functional.vhp(SUM, X, T)[1]),
}


@ATTENTION.row(
    "`scaled_dot_product_attention` in `jvp`, `hvp`, `hessian`, `vmap(hessian)`, `vjp(grad)`, `functional.vhp`",
    torch="NotImplementedError or RuntimeError: the fused kernels have a gradient and no more",
    fails=REFUSED,
    ours="right: the plain formula runs where more than a gradient is needed",
    over=WAYS,
    issue="pytorch#116350",
)
def derivatives_of_attention(library: Any, case: tuple[str, Any]) -> None:
    kind, compute = case
    assert_close(compute(library).detach(), expected_of(kind, BY_HAND))


@ATTENTION.row(
    "`hessian` of `MultiheadAttention`, `TransformerEncoderLayer`",
    torch="NotImplementedError",
    fails=REFUSED,
    ours="right",
    over={
        "MultiheadAttention": attention_module(need_weights=False)(multihead()),
        "TransformerEncoderLayer": layer(),
    },
    issue="pytorch#128971",
)
def hessians_of_attention_modules(library: Any, func: Any) -> None:
    x, t = torch.randn(2, 1, 3, 4, dtype=torch.float64).unbind(0)
    slope = partial(torch.autograd.functional.jacobian, cubed(func))
    product = torch.tensordot(library.hessian(cubed(func))(x).detach(), t, 3)
    torch.testing.assert_close(product, difference(slope, x, t, 1e-3), rtol=1e-6, atol=1e-6)


@ATTENTION.row(
    "`vmap(jacfwd(f))` of attention with dropout",
    torch="the process ends: segmentation fault",
    fails="the process ends by signal",
    ours="right",
    alone=(),
)
def attention_with_dropout_per_sample(library: Any) -> None:
    """One token attends to itself with weight 1: every head's output is its input, dropped or doubled."""
    torch.manual_seed(0)
    samples, heads, width = 2, 24, 2
    x = torch.randn(samples, 1, heads, 1, width, dtype=torch.float64)

    def func(x: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    jacobian = library.vmap(library.jacfwd(func, randomness="same"), randomness="same")(x)
    # J: [sample, 1, head, 1, width, 1, head, 1, width]
    factors = jacobian.sum((5, 6, 7, 8))[:1, :, :, :, :1].round()
    entries = heads * width
    expected = torch.diag((factors * torch.ones_like(x[:1])).flatten()).expand(samples, entries, entries)
    assert set(factors.unique().tolist()) == {0.0, 2.0}, "no entry is dropped, or none is kept"
    assert_close(jacobian.reshape(samples, entries, entries), expected)


@ATTENTION.row(
    "the same of a `TransformerEncoderLayer` in training mode",
    torch="the process ends: segmentation fault",
    fails="the process ends by signal",
    ours="right",
    alone=(),
)
def attention_with_dropout_in_an_encoder_layer(library: Any) -> None:
    """With the masks that plain autograd draws from the same seed: one for all samples and columns."""
    torch.manual_seed(0)
    module = nn.TransformerEncoderLayer(8, 4, 8, dropout=0.5, batch_first=True).double()
    x = torch.randn(3, 1, 2, 8, dtype=torch.float64)

    def seeded(compute: Any, x: Tensor) -> Any:
        torch.manual_seed(1)
        return compute(x)

    jacobians = seeded(library.vmap(library.jacfwd(module, randomness="same"), randomness="same"), x)
    expected = [torch.autograd.functional.jacobian(partial(seeded, module), one) for one in x]
    assert_close(jacobians.detach(), torch.stack(expected))
