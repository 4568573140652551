"""The operators that do not pass a check of matrix.py under torch 2.13, and what is wrong with each.

KNOWN maps a check to verdicts and those to operators. A test fails when an operator's verdict is not
the one listed here: when a listed one starts to work, or fails in another way, and when one that is
not listed fails. `python tests/ops/collect.py` prints what the tables should hold.

The verdicts:
    both raise ...              the operator lacks a rule, in torch.func as here
    torch.func raises ...       autodiff works, and plain torch.autograd agrees with it
    autodiff raises ...         torch.func works: a bug of autodiff
    autodiff is wrong           plain torch.autograd agrees with torch.func: a bug of autodiff
    torch.func is wrong         plain torch.autograd agrees with autodiff
    both are wrong              torch.autograd and finite differences agree against both
    torch.autograd is wrong     the two and finite differences agree against it
    both contradict torch.autograd    and finite differences do not say who is right
"""

from __future__ import annotations

TORCH = "2.13."  # the samples, and what fails on them, change with every minor version

# Not run at all.
LEFT_OUT = {
    "as_strided.partial_views": "its samples are windows into larger storage, which a copy does not have",
    "bfloat16": "it leaves double precision",
    "cfloat": "it leaves double precision",
    "chalf": "it leaves double precision",
    "float": "it leaves double precision",
    "half": "it leaves double precision",
}

# Samples with sparse CSR inputs, which have no strides for a level's wrapper to show.
_SPARSE = "sparse.sampled_addmm sparse.mm.reduce"

# A torch.library.custom_op, which torch runs as an autograd.Function of the old style: autodiff pulls
# through it eagerly, and nothing can inside a level. Its pullback cannot be differentiated.
_CUSTOM_OP = "nn.functional.linear_cross_entropy.chunked nn.functional.linear_cross_entropy.chunked_none"

# No forward-mode rule, and no second derivative that could serve instead; a sparse result.
_NO_FORWARD = """
    _segment_reduce.lengths _segment_reduce.offsets nn.functional.ctc_loss nn.functional.embedding_bag
    nn.functional.multi_margin_loss nn.functional.multilabel_margin_loss to_sparse
"""
# No forward-mode rule in torch; autodiff goes by the pullback of the pullback, or by a formula.
_NO_FORWARD_IN_TORCH = """
    cdist cholesky index_reduce.amax index_reduce.amin index_reduce.mean native_dropout_backward
    nn.functional.pdist ormqr
"""
_GRID_SAMPLE = "grid_sampler_2d nn.functional.grid_sample"
_NO_FORWARD_UNBATCHED = f"{_NO_FORWARD_IN_TORCH} {_GRID_SAMPLE} grid_sampler_3d index_reduce.prod"
# Of these the backward formula has none.
_NO_FORWARD_OVER_REVERSE = """
    nn.functional.hardsigmoid nn.functional.huber_loss nn.functional.soft_margin_loss
"""

# The backward formula has no derivative.
_NO_DOUBLE_BACKWARD = """
    _segment_reduce.lengths _segment_reduce.offsets nn.functional.ctc_loss nn.functional.embedding_bag
    nn.functional.hardsigmoid nn.functional.multi_margin_loss nn.functional.multilabel_margin_loss
"""
_NO_DOUBLE_BACKWARD_OF_DISTANCE = "cdist nn.functional.pdist"

# Fused kernels, with a gradient and no more; autodiff takes torch's plain formula where more is needed.
_ATTENTION = "nn.functional.scaled_dot_product_attention"

# No batching rule, and no fallback to a loop either: the operator branches on its data (cov,
# gaussian_nll_loss, tensor_split), writes unbatched running statistics (the batch norms), draws random
# numbers by batched parameters, asks for a memory format that the batched tensor has not (to, double,
# cdouble), or says that it needs special handling.
_NO_BATCHING = """
    _batch_norm_with_update _native_batch_norm_legit as_strided_scatter bernoulli cdouble cov double
    native_batch_norm nn.functional.batch_norm nn.functional.gaussian_nll_loss nn.functional.instance_norm
    nn.functional.rrelu normal normal.number_mean tensor_split to
"""
# max_unpool2d's pullback asks for a memory format.
_NO_BATCHING_OF_PULLBACK = "nn.functional.max_unpool2d nn.functional.max_unpool2d.grad"

# What the pullback gives is not the transposed derivative where several entries write to one place.
_OVERLAPPING_WRITES = "nn.functional.max_unpool1d nn.functional.max_unpool2d nn.functional.max_unpool3d"

# Solved with factors that carry no tangent, and wrongly with those of another batch.
_FACTORS = "linalg.det linalg.slogdet linalg.solve linalg.solve_ex linalg.tensorsolve logdet"
# The rule for forward mode is not itself right to differentiate.
_ONCE_ONLY = f"""
    {_FACTORS} cholesky_inverse cumprod linalg.householder_product nn.functional.batch_norm
    nn.functional.instance_norm nn.functional.layer_norm scatter_reduce.prod
"""
# The same below the interface that people call.
_NATIVE_NORMS = "_batch_norm_with_update _native_batch_norm_legit native_batch_norm native_layer_norm"
# At the kink of a norm a subgradient has no derivative to agree about.
_KINK = "linalg.norm.subgradients_at_zero"

_TABLES = {
    "vjp": {
        # tensor_split reads its split points from a tensor that a level hides.
        "torch.func raises RuntimeError": f"tensor_split {_SPARSE} {_CUSTOM_OP}",
    },
    "jvp": {
        "both raise NotImplementedError": _NO_FORWARD,
        # normal gives the tangent of its mean where the standard deviation makes the output larger.
        "both raise RuntimeError": f"normal {_SPARSE}",
        "torch.autograd is wrong": f"as_strided_scatter {_OVERLAPPING_WRITES}",
        # Silent zeros.
        "torch.func is wrong": "scatter_reduce.prod nn.functional.linear_cross_entropy.chunked",
        "torch.func raises NotImplementedError": f"{_ATTENTION} {_NO_FORWARD_UNBATCHED}",
        "torch.func raises RuntimeError": "tensor_split",
        "autodiff raises RuntimeError": _CUSTOM_OP,
    },
    "grad of vjp": {
        "both raise NotImplementedError": _NO_DOUBLE_BACKWARD_OF_DISTANCE,
        "both raise RuntimeError": f"sparse.mm.reduce {_NO_DOUBLE_BACKWARD}",
        "torch.func raises RuntimeError": f"sparse.sampled_addmm tensor_split {_CUSTOM_OP} {_ATTENTION}",
    },
    "jvp of vjp": {
        "both contradict torch.autograd": _KINK,
        "both raise NotImplementedError": _NO_FORWARD,
        "both raise RuntimeError": f"normal tensor_split {_SPARSE} {_CUSTOM_OP}",
        "torch.func raises NotImplementedError": f"{_ATTENTION} {_NO_FORWARD_UNBATCHED} {_NO_FORWARD_OVER_REVERSE}",
        # triangular_solve's pullback loses a tangent, where linalg.solve_triangular's keeps it.
        "torch.func is wrong": "scatter_reduce.prod triangular_solve",
        # NaN from the double backward where the mask leaves only minus infinities.
        "torch.autograd is wrong": "masked.logaddexp",
        "autodiff raises RuntimeError": "nn.functional.linear_cross_entropy.chunked",
    },
    "jvp of jvp": {
        "both are wrong": _NATIVE_NORMS,
        "both contradict torch.autograd": _KINK,
        "both raise NotImplementedError": _NO_FORWARD,
        "both raise RuntimeError": f"nn.functional.alpha_dropout normal tensor_split {_SPARSE}",
        "torch.autograd is wrong": "masked.logaddexp",
        "torch.func is wrong": _ONCE_ONLY,
        "torch.func raises NotImplementedError": f"""
            {_ATTENTION} {_NO_FORWARD_UNBATCHED} {_NO_FORWARD_OVER_REVERSE} nn.functional.glu
        """,
        "autodiff raises RuntimeError": _CUSTOM_OP,
    },
    "grad of jvp": {
        # eigh, like eig, depends on the phases of the eigenvectors, which eig says.
        "both contradict torch.autograd": f"{_NATIVE_NORMS} {_KINK} linalg.eigh torch.ops.aten._safe_softmax.default",
        "both raise NotImplementedError": _NO_FORWARD,
        "both raise RuntimeError": f"normal tensor_split {_SPARSE} {_CUSTOM_OP}",
        "torch.func is wrong": _ONCE_ONLY,
        "torch.func raises NotImplementedError": f"{_ATTENTION} {_NO_FORWARD_UNBATCHED}",
        "torch.func raises RuntimeError": "nn.functional.glu nn.functional.hardsigmoid",
        "autodiff raises RuntimeError": "linalg.eig nn.functional.linear_cross_entropy.chunked",
    },
    # autodiff goes by linearize; of torch.func it is the jvp, as its linearize is wrong inside a transform.
    "grad of linearize": {
        "both raise NotImplementedError": "cdist nn.functional.embedding_bag nn.functional.pdist",
        "both raise NotImplementedError and RuntimeError": """
            _segment_reduce.lengths _segment_reduce.offsets nn.functional.ctc_loss
            nn.functional.embedding_bag nn.functional.multi_margin_loss
            nn.functional.multilabel_margin_loss
        """,
        "both raise RuntimeError": """
            nn.functional.hardsigmoid nn.functional.linear_cross_entropy.chunked_none sparse.mm.reduce
            sparse.sampled_addmm
        """,
        "the two differ": "_batch_norm_with_update",
        "torch.func is wrong": """
            _native_batch_norm_legit cholesky_inverse linalg.det linalg.eig linalg.eigh
            linalg.householder_product linalg.norm.subgradients_at_zero linalg.slogdet linalg.solve
            linalg.solve_ex linalg.tensorsolve logdet native_batch_norm native_layer_norm
            nn.functional.batch_norm nn.functional.instance_norm nn.functional.layer_norm
            scatter_reduce.prod torch.ops.aten._safe_softmax.default
        """,
        "torch.func raises NotImplementedError": """
            cdist cholesky grid_sampler_2d grid_sampler_3d index_reduce.amax index_reduce.amin
            index_reduce.mean index_reduce.prod native_dropout_backward nn.functional.grid_sample ormqr
            to_sparse
        """,
        "torch.func raises RuntimeError": """
            nn.functional.glu nn.functional.linear_cross_entropy.chunked tensor_split
        """,
    },
    # Differences of sixth order judge: not closely where a pole or a kink is near, such as the border of two cells of
    # grid_sample.
    "jvp of grad of linearize": {
        "autodiff raises RuntimeError": "linalg.eig",
        "both contradict torch.autograd": "asin atanh erfinv linalg.norm.subgradients_at_zero logit tan",
        "both raise NotImplementedError": """
            _segment_reduce.lengths _segment_reduce.offsets nn.functional.ctc_loss
            nn.functional.embedding_bag nn.functional.multi_margin_loss
            nn.functional.multilabel_margin_loss to_sparse
        """,
        "both raise RuntimeError": """
            nn.functional.linear_cross_entropy.chunked nn.functional.linear_cross_entropy.chunked_none
            sparse.mm.reduce sparse.sampled_addmm tensor_split
        """,
        "the two differ": "_batch_norm_with_update nn.functional.cosine_embedding_loss",
        "torch.func is wrong": """
            _native_batch_norm_legit cholesky_inverse linalg.det linalg.eigh linalg.householder_product
            linalg.slogdet linalg.solve linalg.solve_ex linalg.tensorsolve logdet native_batch_norm
            native_layer_norm nn.functional.batch_norm nn.functional.instance_norm
            nn.functional.layer_norm torch.ops.aten._safe_softmax.default triangular_solve
        """,
        "torch.func raises NotImplementedError": """
            cdist cholesky grid_sampler_3d index_reduce.amax index_reduce.amin index_reduce.mean
            index_reduce.prod native_dropout_backward nn.functional.glu nn.functional.grid_sample
            nn.functional.hardsigmoid nn.functional.huber_loss nn.functional.pdist
            nn.functional.soft_margin_loss ormqr
        """,
        "torch.func raises NotImplementedError, and autodiff is wrong": """
            grid_sampler_2d grid_sampler_3d nn.functional.grid_sample
        """,
    },
    "grad of grad of linearize": {
        "both contradict torch.autograd": """
            asin atanh erfinv linalg.norm.subgradients_at_zero logit nn.functional.cosine_embedding_loss
            tan
        """,
        "both raise NotImplementedError": "cdist nn.functional.pdist",
        "both raise NotImplementedError and RuntimeError": """
            _segment_reduce.lengths _segment_reduce.offsets nn.functional.ctc_loss
            nn.functional.embedding_bag nn.functional.multi_margin_loss
            nn.functional.multilabel_margin_loss
        """,
        "both raise RuntimeError": """
            nn.functional.hardsigmoid nn.functional.linear_cross_entropy.chunked_none sparse.mm.reduce
            sparse.sampled_addmm
        """,
        "the two differ": "_batch_norm_with_update",
        "torch.func is wrong": """
            _native_batch_norm_legit cholesky_inverse linalg.det linalg.eig linalg.eigh
            linalg.householder_product linalg.slogdet linalg.solve linalg.solve_ex linalg.tensorsolve
            logdet native_batch_norm native_layer_norm nn.functional.batch_norm
            nn.functional.instance_norm nn.functional.layer_norm torch.ops.aten._safe_softmax.default
        """,
        "torch.func raises NotImplementedError": """
            cdist cholesky grid_sampler_3d index_reduce.amax index_reduce.amin index_reduce.mean
            index_reduce.prod native_dropout_backward nn.functional.grid_sample ormqr to_sparse
        """,
        "torch.func raises NotImplementedError, and autodiff is wrong": """
            grid_sampler_2d grid_sampler_3d nn.functional.grid_sample
        """,
        "torch.func raises RuntimeError": """
            nn.functional.glu nn.functional.linear_cross_entropy.chunked tensor_split
        """,
    },
    "jvp of a pullback": {
        "both raise RuntimeError": "sparse.mm.reduce",
        "torch.func raises NotImplementedError": """
            _segment_reduce.lengths _segment_reduce.offsets cdist grid_sampler_2d grid_sampler_3d
            nn.functional.ctc_loss nn.functional.embedding_bag nn.functional.grid_sample
            nn.functional.hardsigmoid nn.functional.huber_loss nn.functional.multi_margin_loss
            nn.functional.multilabel_margin_loss nn.functional.pdist nn.functional.soft_margin_loss
            ormqr to_sparse
        """,
        "torch.func raises RuntimeError": """
            nn.functional.linear_cross_entropy.chunked nn.functional.linear_cross_entropy.chunked_none
            nn.functional.mse_loss sparse.sampled_addmm tensor_split
        """,
    },
    "vmap of vjp": {
        "both raise NotImplementedError": "to_sparse",
        "both raise RuntimeError": f"{_NO_BATCHING} {_NO_BATCHING_OF_PULLBACK} {_SPARSE} {_CUSTOM_OP}",
        # Its differentiable backward formula branches on data; autodiff needs that one only where
        # somebody watches.
        "torch.func raises RuntimeError": "index_reduce.prod scatter_reduce.prod",
    },
    "vmap of jvp": {
        "both raise NotImplementedError": f"{_NO_FORWARD} index_reduce.prod",
        "both raise RuntimeError": f"{_NO_BATCHING} {_SPARSE}",
        "torch.func raises NotImplementedError": f"""
            {_ATTENTION} {_NO_FORWARD_IN_TORCH} {_GRID_SAMPLE} grid_sampler_3d
        """,
        "torch.autograd is wrong": _OVERLAPPING_WRITES,
        # torch.func is wrong.
        "autodiff raises RuntimeError": f"scatter_reduce.prod {_CUSTOM_OP}",
    },
    "vmap of jacfwd": {
        "both raise NotImplementedError": f"{_NO_FORWARD} {_GRID_SAMPLE} grid_sampler_3d index_reduce.prod",
        "both raise RuntimeError": f"{_NO_BATCHING} {_SPARSE}",
        "torch.func is wrong": _FACTORS,
        "torch.func raises NotImplementedError": f"{_ATTENTION} {_NO_FORWARD_IN_TORCH} {_GRID_SAMPLE}",
        "torch.func raises RuntimeError": "cumprod",
        "torch.autograd is wrong": _OVERLAPPING_WRITES,
        # torch.func is wrong.
        "autodiff raises RuntimeError": f"scatter_reduce.prod {_CUSTOM_OP}",
    },
    "vmap of jacfwd of vjp": {
        "both contradict torch.autograd": _KINK,
        "both raise NotImplementedError": f"{_NO_FORWARD} {_GRID_SAMPLE} grid_sampler_3d index_reduce.prod",
        "both raise RuntimeError": f"""
            {_NO_BATCHING} {_NO_BATCHING_OF_PULLBACK} {_SPARSE} {_CUSTOM_OP} scatter_reduce.prod
        """,
        "torch.func is wrong": f"{_FACTORS} linalg.eig linalg.eigvals triangular_solve",
        "torch.func raises NotImplementedError": f"""
            {_ATTENTION} {_NO_FORWARD_IN_TORCH} {_GRID_SAMPLE} {_NO_FORWARD_OVER_REVERSE}
        """,
        "torch.func raises RuntimeError": "cumprod",
        "torch.autograd is wrong": "masked.logaddexp",
        "autodiff raises RuntimeError": "nn.functional.linear_cross_entropy.chunked",
    },
    "vmap of grad of vjp": {
        "both raise NotImplementedError": f"to_sparse {_NO_DOUBLE_BACKWARD_OF_DISTANCE}",
        "both raise RuntimeError": f"""
            {_NO_BATCHING} {_NO_BATCHING_OF_PULLBACK} {_NO_DOUBLE_BACKWARD} {_SPARSE} {_CUSTOM_OP}
            index_reduce.prod scatter_reduce.prod
        """,
        "torch.func raises RuntimeError": _ATTENTION,
    },
}

KNOWN = {
    check: {verdict: names.split() for verdict, names in table.items()} for check, table in _TABLES.items()
}
