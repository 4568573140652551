"""The table of fixes: a row for each thing that torch does wrongly, slowly or not at all, and that is mended here.

A row is active where the installed torch needs it. `nox -s unneeded_fixes` says which rows the newest torch has made
unnecessary; such a row gets the version as ``fixed_in``, and goes when that is the lower bound. The versions were
measured on torch 2.11, 2.13 and 2.15. What is guarded inside the seam itself, and cannot be switched off, is listed in
docs/architecture.md; messages that are recognised by their text are in `autodiff/_torch/messages.py`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from autodiff import _torch
from autodiff.core import hooks
from autodiff.torch_fixes import control_flow, formulas, node_pullbacks, node_transposes, recurrent
from autodiff.torch_fixes.attention import plain_attention
from autodiff.torch_fixes.by_pullback import by_pullback
from autodiff.torch_fixes.fix import Fix
from autodiff.torch_fixes.forward_fixes import FORWARD_FIXES
from autodiff.torch_fixes.overrides import (
    batch_overrides,
    forward_overrides,
    zeros_with_memory,
)

FIXES = (
    *FORWARD_FIXES,
    Fix(
        "fused_attention",
        "scaled_dot_product_attention, MultiheadAttention, TransformerEncoderLayer",
        "the fused kernels have a gradient, but neither a second derivative nor forward mode",
        "torch's plain formula, wherever more than a gradient may be asked for",
        (
            "derivatives_of_attention",
            "hessians_of_attention_modules",
        ),
        (
            (hooks.higher_order, {"attention": plain_attention.around}),
            (hooks.higher_order_traced, {"make": partial(sdpa_kernel, SDPBackend.MATH)}),
        ),
        issue="pytorch#128971",
    ),
    Fix(
        "compiled_functions",
        "functions made by torch.compile, called inside a transform",
        "no second derivative, or zeros; in forward mode the fixes of this table are not seen",
        "they run uncompiled, wherever more than a gradient may be asked for, in this thread alone",
        ("compiled_functions_inside",),
        ((hooks.higher_order, {"compiled": _torch.uncompiled.around}),),
    ),
    Fix(
        "control_flow",
        "torch.cond, while_loop, scan, map, associative_scan, flex_attention",
        "zeros in forward mode and for second derivatives, or an error",
        "the branch and the loop themselves, inside transforms",
        ("derivatives_of_control_flow",),
        ((hooks.control_flow, control_flow.FORMULAS),),
    ),
    Fix(
        "compiled_pullbacks",
        "Jacobians of functions made by torch.compile",
        "an error: a compiled pullback cannot be batched",
        "Jacobians pull their rows one by one; another batch of cotangents is an error",
        ("jacrev_of_a_compiled_function",),
        (
            (
                hooks.pull_policies["one cotangent at a time"],
                {"CompiledFunctionBackward": "a function made by torch.compile"},
            ),
        ),
    ),
    Fix(
        "recurrent_layers",
        "LSTM, GRU, RNN and their cells",
        "no batching rule, or a write in place to a state without a batch",
        "a formula under vmap: steps in time, one after the other",
        ("gradients_of_recurrent_layers_per_sample",),
        (batch_overrides(recurrent.FORMULAS),),
    ),
    Fix(
        "batched_pulls",
        "cdist, masked_select, sparse.mm",
        "a batch of cotangents is pulled back wrongly, or not at all",
        "Jacobians pull their rows one by one; another batch of cotangents is an error",
        (
            "jacrev_of_cdist",
            "jacrev_of_masked_select",
            "jacrev_of_sparse_mm",
            "another_order_of_modes-hessian-cdist >=2.15",
        ),
        (
            (
                hooks.pull_policies["one cotangent at a time"],
                {
                    "CdistBackward": "cdist",
                    "MaskedSelectBackward": "masked_select",
                    "MaskedScatterBackward": "masked_select",
                    "SparseAddmmBackward": "sparse.mm",
                },
            ),
        ),
    ),
    Fix(
        "recomputation",
        "torch.utils.checkpoint with use_reentrant=False",
        "its second run inside vmap or forward mode takes other kernels than the first, and other saved tensors",
        "the second run is outside of all transforms, as the first one was",
        ("batched_pulls_of_checkpoints",),
        ((_torch.around_recomputation, {"outside": _torch.OutsideTransforms}),),
    ),
    Fix(
        "traced_formulas",
        "layer_norm, batch_norm, instance_norm, logcumsumexp, cdist, pdist",
        "while torch.compile traces: wrong numbers where the pullback of the pullback is differentiated, or no rule",
        "a formula, wherever torch.compile traces a transform",
        ("compiled_derivatives_of_norms",),
        (
            (
                hooks.traced_formulas,
                {
                    functional.layer_norm: formulas.layer_norm,
                    torch.layer_norm: formulas.layer_norm,
                    functional.batch_norm: formulas.batch_norm,
                    functional.instance_norm: formulas.instance_norm,
                    torch.logcumsumexp: formulas.logcumsumexp,
                    Tensor.logcumsumexp: formulas.logcumsumexp,
                    torch.cdist: formulas.cdist,
                    functional.pdist: formulas.pdist,
                },
            ),
        ),
    ),
    Fix(
        "norms_per_sample",
        "second derivatives of layer_norm, batch_norm, instance_norm",
        "an error under vmap: the pullback writes over a cotangent that has no batch",
        "the cotangent is given its outputs' batch",
        (
            "hessians_of_layer_norm_per_sample",
            "batch_norm_returns_its_buffers_at_second_order",
        ),
        (
            (
                hooks.pull_policies["cotangents batched like outputs"],
                {
                    "NativeLayerNormBackwardBackward": "layer_norm",
                    "NativeBatchNormBackwardBackward": "batch_norm",
                    "CudnnBatchNormBackwardBackward": "batch_norm",
                    "MiopenBatchNormBackwardBackward": "batch_norm",
                },
            ),
        ),
    ),
    Fix(
        "linalg_without_graph",
        "torch.linalg",
        "without grad mode the pullback reuses forward's factors: wrong numbers in vmap(hessian(logdet)), no tangents",
        "the pull makes a graph",
        (
            "hessians_of_solvers_per_sample-jacrev-jacfwd-det",
            "hessians_of_solvers_per_sample-jacrev-jacfwd-solve",
        ),
        ((hooks.pull_policies["with a graph"], {"Linalg": "torch.linalg"}),),
    ),
    Fix(
        "fused_pullbacks",
        "silu, mish, group_norm",
        "without grad mode a fused pullback runs, which carries no tangent",
        "the pull makes a graph where forward mode is active, whatever the operation",
        ("jvp_of_gradients_without_grad_mode",),
        ((hooks.needs_graph_in_forward_mode, dict.fromkeys(("silu", "mish", "group_norm"))),),
    ),
    Fix(
        "logcumsumexp",
        "logcumsumexp",
        "the pullback takes the logarithm of its cotangent, and has no derivative at zero; forward mode adds a "
        "constant to sums of exponentials, and is wrong where these are small",
        "a formula where the pullback makes a graph; the pullback of the pullback in forward mode",
        ("linearize_of_logcumsumexp", "jvp_of_logcumsumexp"),
        (
            (hooks.node_pullbacks, {"LogcumsumexpBackward0": node_pullbacks.of_logcumsumexp}),
            forward_overrides(by_pullback, Tensor.logcumsumexp, torch.logcumsumexp),
        ),
    ),
    Fix(
        "wasteful_transposes",
        "convolutions, layer_norm, batch_norm, instance_norm",
        "the pullback of the pullback computes gradients in input and weight, though nothing needs them",
        "a formula in the pushforward of a recorded function, where what the function was evaluated at is not tracked",
        ("linearize_computes_nothing_else",),
        (
            (
                hooks.node_transposes,
                {
                    "ConvolutionBackward0": node_transposes.of_convolution,
                    "NativeLayerNormBackward0": node_transposes.of_layer_norm,
                    "NativeBatchNormBackward0": node_transposes.of_batch_norm,
                },
            ),
        ),
    ),
    Fix(
        "factorisations_by_mode",
        "cholesky, embedding",
        "the two modes differ, and neither is wrong: one symmetrises, or moves the padding row",
        "functional.jvp goes by reverse mode",
        ("functional_jvp_of_cholesky",),
        (
            (
                hooks.differ_by_mode,
                dict.fromkeys(
                    (
                        *(Tensor.cholesky, torch.cholesky, torch.linalg.cholesky, torch.linalg.cholesky_ex),
                        *(torch.linalg.eigh, torch.linalg.eigvalsh, functional.embedding),
                    )
                ),
            ),
        ),
    ),
    Fix(
        "measured_zeros",
        "tangents that are zeros without memory",
        "inside a dispatch mode, multiplying one by a number ends the process",
        "zeros with memory, where memory is measured",
        ("measured_zeros",),
        ((hooks.dispatch_overrides, {torch.ops.aten.mul.Scalar: zeros_with_memory}),),
    ),
)

for _fix in FIXES:
    if _fix.is_needed:
        _fix.install()
