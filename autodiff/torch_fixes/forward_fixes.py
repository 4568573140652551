"""Fixes of forward mode: the rows of the table that override an operation there.

See `table` for what a row is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from autodiff import _torch
from autodiff.core import hooks
from autodiff.torch_fixes import formulas, node_pullbacks
from autodiff.torch_fixes.by_pullback import by_pullback
from autodiff.torch_fixes.fix import Fix
from autodiff.torch_fixes.functions import with_nesting_jvp
from autodiff.torch_fixes.overrides import (
    OVERLOAD,
    PACKET,
    body_in_forward_mode,
    by_formula,
    by_pullback_inside,
    chunked_by_pullback,
    custom_by_pullback,
    formula_inside,
    forward_overrides,
    in_place,
    inside_transforms,
    products_by_pullback,
    where_rule_is_missing,
)

_BOTH = "cpu", "cuda"
_cumprod = inside_transforms(by_formula(formulas.cumprod, ("cuda",)))

FORWARD_FIXES = (
    Fix(
        "solvers",
        "det, slogdet, logdet, linalg.solve, linalg.tensorsolve",
        "wrong numbers in forward mode inside vmap and inside forward mode",
        "the pullback of the pullback, inside other transforms",
        (
            "jacfwd_of_solvers_per_sample",
            "hessians_of_solvers_per_sample",
            "jvp_of_jvp_of_solvers",
        ),
        (
            forward_overrides(
                by_pullback_inside,
                *(Tensor.det, torch.det, torch.linalg.det),
                *(Tensor.slogdet, torch.slogdet, torch.linalg.slogdet),
                *(Tensor.logdet, torch.logdet),
                *(torch.linalg.solve, torch.linalg.solve_ex, torch.linalg.tensorsolve),
            ),
        ),
        fixed_in="2.15",
    ),
    Fix(
        "factors",
        "cholesky_inverse, linalg.householder_product",
        "wrong numbers in forward mode, of householder_product in forward mode inside forward mode",
        "the pullback of the pullback, of householder_product inside other transforms",
        (
            "jvp_of_cholesky_inverse",
            "jvp_of_jvp_of_other_operations-cholesky_inverse",
            "jvp_of_jvp_of_other_operations-householder_product",
        ),
        (
            forward_overrides(by_pullback, Tensor.cholesky_inverse, torch.cholesky_inverse),
            forward_overrides(
                by_pullback_inside, Tensor.orgqr, torch.orgqr, torch.linalg.householder_product
            ),
        ),
    ),
    Fix(
        "cumprod",
        "cumprod",
        "wrong numbers in forward mode inside forward mode; time and memory square in reverse mode inside transforms",
        "a formula, inside other transforms",
        ("jvp_of_jvp_of_other_operations-cumprod",),
        (
            forward_overrides(_cumprod, Tensor.cumprod, torch.cumprod),
            forward_overrides(in_place(_cumprod, Tensor.cumprod), Tensor.cumprod_),
        ),
    ),
    Fix(
        "eig",
        "linalg.eig, linalg.eigvals",
        "wrong numbers in forward mode inside vmap and inside forward mode",
        "the pullback of the pullback, inside other transforms",
        ("forward_over_reverse_of_eigenvalues_per_sample",),
        (forward_overrides(by_pullback_inside, torch.linalg.eig, torch.linalg.eigvals),),
        fixed_in="2.15",
    ),
    Fix(
        "losses",
        "mse_loss, huber_loss, glu",
        "forward over reverse: an error, or no rule",
        "a formula, inside other transforms",
        (
            "forward_over_reverse_of_mse_loss",
            "both_combinations_of_losses_and_activations-huber_loss",
            "reverse_over_forward_of_glu",
        ),
        (
            formula_inside(formulas.mse_loss, functional.mse_loss),
            formula_inside(formulas.huber_loss, functional.huber_loss),
            formula_inside(formulas.glu, functional.glu),
        ),
        issue="pytorch PR#197723",
    ),
    Fix(
        "triangular_solve",
        "triangular_solve",
        "forward mode takes the wrong triangle",
        "the pullback of the pullback",
        ("jvp_of_jvp_of_other_operations-triangular_solve",),
        (forward_overrides(by_pullback, Tensor.triangular_solve, torch.triangular_solve),),
    ),
    Fix(
        "scatter_reduce",
        'scatter_reduce(..., "prod")',
        "zero in forward mode",
        "the pullback of the pullback",
        ("jvp_of_scatter_reduce_prod",),
        (
            forward_overrides(products_by_pullback, Tensor.scatter_reduce, torch.scatter_reduce),
            forward_overrides(in_place(products_by_pullback, Tensor.scatter_reduce), Tensor.scatter_reduce_),
        ),
    ),
    Fix(
        "custom_operators",
        "operators of torch.library",
        "zero in forward mode",
        "the pullback of the pullback",
        ("jvp_of_a_custom_op",),
        ((hooks.forward_overrides_by_type, dict.fromkeys((OVERLOAD, PACKET), custom_by_pullback)),),
    ),
    Fix(
        "linear_cross_entropy",
        "linear_cross_entropy in chunks",
        "zero in forward mode: it is made of an operator of torch.library",
        "the pullback of the pullback",
        ("jvp_of_linear_cross_entropy",),
        (forward_overrides(chunked_by_pullback, getattr(functional, "linear_cross_entropy", None)),),
        needed_since="2.13",
    ),
    Fix(
        "missing_rules",
        "whatever raises for want of a forward rule",
        "NotImplementedError in forward mode",
        "the pullback of the pullback; of the same draw, where it is random",
        (
            "jvp_of_operations_without_forward_mode-index_reduce",
            "jvp_of_operations_without_forward_mode-cholesky",
            "jvp_of_grid_sample <2.15",
            "forward_mode_of_random_draws",
        ),
        ((hooks.missing_forward_rule, {"override": where_rule_is_missing}),),
    ),
    Fix(
        "functions",
        "autograd Functions with a jvp",
        "zeros, where an outer forward mode differentiates the jvp",
        "the jvp runs with forward mode on, on tensors without this level's tangents",
        ("jacfwd_of_jacfwd_of_a_function",),
        (forward_overrides(with_nesting_jvp, _torch.custom_function_call),),
        issue="pytorch#197867",
    ),
    Fix(
        "distances",
        "cdist, pdist",
        "no rule in forward mode, nor for a second derivative",
        "a formula",
        (
            "jvp_of_cdist <2.15",
            "hessian_of_cdist",
            "another_order_of_modes-hessian-cdist <2.15",
            "another_order_of_modes-hvp-cdist <2.15",
            "jvp_of_operations_without_forward_mode-pdist <2.15",
        ),
        (
            forward_overrides(by_formula(formulas.cdist, _BOTH), torch.cdist),
            forward_overrides(by_formula(formulas.pdist, ("cuda",)), functional.pdist),
        ),
    ),
    Fix(
        "norms",
        "layer_norm, batch_norm, instance_norm",
        "mean and deviation are taken for constants in forward mode inside forward mode",
        "a formula, inside other transforms",
        ("jvp_of_jvp_of_normalisations", "jvp_of_jvp_inside_a_triplet_loss"),
        (
            forward_overrides(
                inside_transforms(by_formula(formulas.layer_norm, ("cuda",))),
                functional.layer_norm,
                torch.layer_norm,
            ),
            formula_inside(formulas.batch_norm, functional.batch_norm),
            formula_inside(formulas.instance_norm, functional.instance_norm),
        ),
    ),
    Fix(
        "third_derivatives_of_norms",
        "third derivatives of layer_norm, batch_norm, instance_norm",
        "mean and deviation are taken for constants, in pure reverse mode",
        "the pullback of the pullback's node is a formula, where it makes a graph",
        ("third_derivatives_of_normalisations",),
        (
            (
                hooks.node_pullbacks,
                {
                    "NativeLayerNormBackwardBackward0": node_pullbacks.of_layer_norm,
                    "NativeBatchNormBackwardBackward0": node_pullbacks.of_batch_norm,
                },
            ),
        ),
    ),
    Fix(
        "activations",
        "hardsigmoid, soft_margin_loss",
        "no rule in forward mode over reverse mode",
        "a formula, inside other transforms",
        (
            "both_combinations_of_losses_and_activations-hardsigmoid",
            "both_combinations_of_losses_and_activations-soft_margin_loss",
            "another_order_of_modes-hessian-hardsigmoid",
        ),
        (
            formula_inside(formulas.hardsigmoid, functional.hardsigmoid),
            formula_inside(formulas.soft_margin_loss, functional.soft_margin_loss, in_float32=_BOTH),
        ),
    ),
    Fix(
        "writes_in_place",
        "mvlgamma, hinge_embedding_loss",
        "an error in vmap of vmap of forward mode: torch writes in place to a tensor that has fewer batches",
        "a formula, inside other transforms",
        ("hessians_by_columns_per_sample",),
        (
            formula_inside(formulas.mvlgamma, Tensor.mvlgamma, torch.mvlgamma, torch.special.multigammaln),
            formula_inside(
                formulas.hinge_embedding_loss,
                functional.hinge_embedding_loss,
                in_float32=_BOTH,
            ),
        ),
    ),
    Fix(
        "attention_with_dropout",
        "scaled_dot_product_attention with dropout",
        "a segmentation fault in vmap of forward mode",
        "a formula, inside other transforms",
        ("attention_with_dropout_per_sample",),
        (formula_inside(formulas.attention, functional.scaled_dot_product_attention),),
    ),
    Fix(
        "functions_in_python",
        "multi_head_attention_forward, triplet_margin_with_distance_loss",
        "torch hands them to a function mode as a whole: overrides of what they call are not seen",
        "their bodies run inside forward mode's function mode",
        ("attention_with_dropout_in_an_encoder_layer", "jvp_of_jvp_inside_a_triplet_loss"),
        (
            forward_overrides(
                body_in_forward_mode,
                functional.multi_head_attention_forward,
                functional.triplet_margin_with_distance_loss,
            ),
        ),
    ),
)
