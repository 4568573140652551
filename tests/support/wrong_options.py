"""Calls with wrong options: argnums, outputs, chunk sizes, modes, dims; see wrong_trees.py for the rows."""

from __future__ import annotations

from functools import partial

import torch

import autodiff as ad
from autodiff import errors
from wrong_trees import P, Wrong, X, both, total

CURVATURE = {
    "hessian_diagonal": ad.hessian_diagonal,
    "hessian_block_diagonal": ad.hessian_block_diagonal,
    "hessian_trace": ad.hessian_trace,
    "hessian_eigenvalues": partial(ad.hessian_eigenvalues, k=1),
}
ARGNUMS = [
    *[
        Wrong(
            f"argnums {argnums!r} of {name}",
            **both(name, torch.sum, argnums, call=(X,)),
            error=errors.ArgnumsError,
            beats=[f"{name}: ", *beats],
        )
        for name in ("grad", "jacrev", "jacfwd", "hessian")
        for argnums, beats in [
            (1, ["Got argnum=1, but only 1 positional inputs", "by its name"]),
            (-2, ["Got argnum=-2, but only 1 positional inputs"]),
            ((), ["argnums must be non-empty", "argnums=0"]),
            ((0, 0), ["argnums elements must be unique", "(0, 0)"]),
            ((0, -1), ["argnums elements must be unique"]),
            ([0], ["argnums must be int", "list", "Write argnums=0"]),
            (0.0, ["argnums must be int", "float"]),
        ]
    ],
    Wrong(
        "unknown name",
        lambda: ad.grad(lambda x, y: x.sum(), "z")(X, y=X),
        errors.ArgnumsError,
        ["grad: argnums='z' names no argument", "'x', 'y'", "correct the name"],
    ),
    Wrong(
        "name of an argument that is not given",
        lambda: ad.grad(lambda x, y=X: x.sum(), "y")(X),
        errors.ArgnumsError,
        ["grad: argnums='y' names no argument of this call", "'x'", "Pass the argument"],
    ),
    Wrong(
        "same argument by name and number",
        lambda: ad.grad(lambda x: x.sum(), ("x", 0))(X),
        errors.ArgnumsError,
        ["grad: argnums elements must be unique", "('x', 0)"],
    ),
    Wrong(
        "bool",
        lambda: ad.grad(torch.sum, True)(X),
        errors.ArgnumsError,
        ["grad: argnums must be int", "bool"],
    ),
]
OUTPUTS = [
    *[
        Wrong(
            f"vector output of {name}",
            **both(name, torch.sin),
            error=errors.OutputError,
            beats=[f"{name}: Expected f(*args) to return a scalar", "1 dims", "(3,)", "jacrev"],
        )
        for name in ("grad", "grad_and_value")
    ],
    Wrong(
        "vector output of value_and_grad",
        lambda: ad.value_and_grad(torch.sin)(X),
        errors.OutputError,
        ["value_and_grad: Expected f(*args) to return a scalar", "(3,)"],
    ),
    Wrong(
        "vector output of hvp",
        lambda: ad.hvp(torch.sin, (X,), (X,)),
        errors.OutputError,
        ["hvp: Expected f(*args) to return a scalar", "(3,)"],
    ),
    *[
        Wrong(
            f"vector output of {name}",
            lambda transform=transform: transform(torch.sin)(X),
            errors.OutputError,
            [f"{name}: Expected f(*args) to return a scalar", "(3,)"],
        )
        for name, transform in CURVATURE.items()
    ],
    Wrong(
        "tuple output of grad",
        **both("grad", lambda x: (x.sum(), x.sum())),
        error=errors.OutputError,
        beats=["grad: Expected f(*args) to return a Tensor", "tuple", "has_aux=True"],
    ),
    Wrong(
        "float output of grad",
        **both("grad", lambda x: 3.0),
        error=errors.OutputError,
        beats=["grad: Expected f(*args) to return a Tensor", "float"],
    ),
    Wrong(
        "None output of grad",
        **both("grad", lambda x: None),
        error=errors.OutputError,
        beats=["grad: Expected f(*args) to return a Tensor", "NoneType"],
    ),
    Wrong(
        "complex output of grad",
        **both("grad", lambda x: (x * 1j).sum()),
        error=errors.OutputError,
        beats=[
            "grad can be implicitly created only for real scalar outputs",
            "torch.complex128",
            "holomorphic",
        ],
    ),
    Wrong(
        "int output of jacrev",
        **both("jacrev", lambda x: {"i": x.long(), "x": x}),
        error=errors.OutputError,
        beats=[
            "jacrev: All outputs of f must be floating-point",
            "torch.int64",
            "output['i']",
            "has_aux=True",
        ],
    ),
    Wrong(
        "int output of jacfwd",
        lambda: ad.jacfwd(lambda x: {"i": x.long(), "x": x})(X),
        errors.OutputError,
        ["jacfwd: All outputs of f must be floating-point or complex", "torch.int64", "output['i']"],
    ),
    Wrong(
        "int output of vjp",
        lambda: ad.vjp(lambda x: x.long(), X),
        errors.OutputError,
        ["vjp(f, *primals): All outputs of f must be", "torch.int64", "at output"],
        lambda: torch.func.vjp(lambda x: x.long(), X)[1](X.long()),
    ),
    Wrong(
        "int output of jvp",
        lambda: ad.jvp(lambda x: x.long(), (X,), (X,)),
        errors.OutputError,
        ["jvp(f, primals, tangents): All outputs of f must be", "torch.int64", "at output"],
    ),
    Wrong(
        "int output of linearize",
        lambda: ad.linearize(lambda x: x.long(), X),
        errors.OutputError,
        ["linearize: All outputs of f must be", "torch.int64"],
    ),
    Wrong(
        "number among the outputs of vjp",
        lambda: ad.vjp(lambda x: [x, 3.0], X),
        errors.OutputError,
        [
            "vjp(f, *primals): expected f(*primals) to return only tensors",
            "float",
            "output[1]",
            "has_aux=True",
        ],
        lambda: torch.func.vjp(lambda x: [x, 3.0], X),
    ),
    Wrong(
        "number as the output of jacfwd",
        **both("jacfwd", lambda x: 3.0),
        error=errors.OutputError,
        beats=["jacfwd: expected f(*primals) to return only tensors", "float"],
    ),
    Wrong(
        "empty output",
        **both("jacrev", lambda x: ()),
        error=errors.OutputError,
        beats=["jacrev: Expected f to be a function that has non-empty output", "Return"],
    ),
    *[
        Wrong(
            f"no pair for has_aux of {name}",
            **both(name, lambda x: x.sum(), has_aux=True),
            error=errors.OutputError,
            beats=[
                f"{name}: output of function f should be a tuple: (output, aux)",
                "Tensor",
                "drop has_aux",
            ],
        )
        for name in ("grad", "jacrev", "jacfwd")
    ],
    Wrong(
        "triple for has_aux of vjp",
        lambda: ad.vjp(lambda x: (x, x, x), X, has_aux=True),
        errors.OutputError,
        ["vjp: output of function f should be a tuple", "a tuple of 3"],
        lambda: torch.func.vjp(lambda x: (x, x, x), X, has_aux=True),
    ),
    Wrong(
        "no pair for has_aux of jvp",
        lambda: ad.jvp(torch.sin, (X,), (X,), has_aux=True),
        errors.OutputError,
        ["jvp: output of function f should be a tuple"],
        lambda: torch.func.jvp(torch.sin, (X,), (X,), has_aux=True),
    ),
    Wrong(
        "no pair for has_aux of hvp",
        lambda: ad.hvp(torch.sum, (X,), (X,), has_aux=True),
        errors.OutputError,
        ["hvp: output of function f should be a tuple"],
    ),
    *[
        Wrong(
            f"no pair for has_aux of {name}",
            lambda transform=transform: transform(torch.sum, has_aux=True)(X),
            errors.OutputError,
            [f"{name}: output of function f should be a tuple"],
        )
        for name, transform in CURVATURE.items()
    ],
    Wrong(
        "no pair for has_aux of hessian",
        lambda: ad.hessian(torch.sum, has_aux=True)(X),
        errors.OutputError,
        ["hessian: output of function f should be a tuple"],
    ),
]
OPTIONS = [
    *[
        Wrong(
            f"chunk_size {size!r} of {name}",
            lambda name=name, size=size: getattr(ad, name)(torch.sin, chunk_size=size),
            errors.OptionError,
            [f"{name}: ", "chunk_size", "greater than 0.", f"(got {size!r})", "None takes"],
            (lambda name=name, size=size: getattr(torch.func, name)(torch.sin, chunk_size=size)(X))
            if name in ("jacrev", "vmap") and size == 0
            else None,
        )
        for name in (
            *("vmap", "jacrev", "jacfwd", "jacobian", "hessian"),
            *("hessian_diagonal", "hessian_block_diagonal", "hessian_trace"),
        )
        for size in (0, -1, True, 2.0, "all")
    ],
    Wrong(
        "mode of hessian",
        lambda: ad.hessian(torch.sum, mode="reverse"),
        errors.OptionError,
        ["hessian: the allowed values for mode are 'auto', 'reverse-over-reverse'", "Got 'reverse'"],
    ),
    Wrong(
        "mode of jacobian",
        lambda: ad.jacobian(torch.sum, mode="rev"),
        errors.OptionError,
        ["jacobian: the allowed values for mode are 'auto', 'reverse', 'forward'", "Got 'rev'"],
    ),
    Wrong(
        "mode of hvp",
        lambda: ad.hvp(torch.sum, (X,), (X,), mode="forward-over-forward"),
        errors.OptionError,
        ["hvp: the allowed values for mode", "Got 'forward-over-forward'"],
    ),
    *[
        Wrong(
            f"k {k!r} of hessian_eigenvalues",
            lambda k=k: ad.hessian_eigenvalues(torch.sum, k),
            errors.OptionError,
            ["hessian_eigenvalues: k is a positive int", f"got {k!r}", "at least one"],
        )
        for k in (0, -1, True, 2.0, None)
    ],
    *[
        Wrong(
            f"iterations {iterations!r} of hessian_eigenvalues",
            lambda iterations=iterations: ad.hessian_eigenvalues(torch.sum, 1, iterations=iterations),
            errors.OptionError,
            ["hessian_eigenvalues: iterations is a positive int", f"got {iterations!r}", "None takes 20"],
        )
        for iterations in (0, True, "auto")
    ],
    Wrong(
        "more eigenvalues than there are",
        lambda: ad.hessian_eigenvalues(lambda p: (p["w"] ** 2).sum(), 4, wrt="w")(P),
        errors.OptionError,
        ["hessian_eigenvalues: k=4 eigenvalues are asked for", "the Hessian has 3", "Pass a smaller k"],
    ),
    Wrong(
        "which of hessian_eigenvalues",
        lambda: ad.hessian_eigenvalues(torch.sum, 1, which="SM"),
        errors.OptionError,
        ["hessian_eigenvalues: the allowed values for which are 'LA', 'SA', 'LM'", "Got 'SM'"],
    ),
    Wrong(
        "randomness of vmap",
        **both("vmap", torch.sin, randomness="all"),
        error=errors.OptionError,
        beats=["vmap: Only allowed values for randomness are 'error', 'different', 'same'", "Got 'all'"],
    ),
    Wrong(
        "randomness of jacfwd",
        **both("jacfwd", torch.sin, randomness="all"),
        error=errors.OptionError,
        beats=["jacfwd: Only allowed values for randomness", "Got 'all'"],
    ),
    Wrong(
        "fallback of vmap",
        lambda: ad.vmap(torch.sin, fallback="slow"),
        errors.OptionError,
        ["vmap: the allowed values for fallback are None, 'loop'", "Got 'slow'"],
    ),
]
BATCHES = [
    Wrong(
        "type of in_dims",
        **both("vmap", torch.sin, "0"),
        error=errors.BatchError,
        beats=["vmap(in_dims=0): expected `in_dims` to be int or a (potentially nested) tuple", "str"],
    ),
    Wrong(
        "in_dims for two",
        **both("vmap", torch.sin, (0, 0)),
        error=errors.BatchError,
        beats=["vmap(in_dims=(0, 0)): in_dims is not compatible with the structure of `inputs`", "Give one"],
    ),
    Wrong(
        "in_dims of another dict",
        **both("vmap", total, ({"w": 0},), call=(P,)),
        error=errors.BatchError,
        beats=["in_dims is not compatible with the structure of `inputs`"],
    ),
    Wrong(
        "in_dim out of range",
        **both("vmap", torch.sin, 1),
        error=errors.BatchError,
        beats=[
            "Got in_dim=1 for some input, but that input is a Tensor of dimensionality 1",
            "-1 <= in_dim < 1",
            "args[0]",
            "(3,)",
        ],
    ),
    Wrong(
        "in_dim of a scalar",
        **both("vmap", torch.sin, call=(X[0],)),
        error=errors.BatchError,
        beats=["Got in_dim=0", "dimensionality 0", "args[0]"],
    ),
    Wrong(
        "in_dim that is no number",
        **both("vmap", torch.sin, ("a",)),
        error=errors.BatchError,
        beats=["Got in_dim=a for an input but in_dim must be either an integer dimension or None"],
    ),
    Wrong(
        "in_dim of a number",
        **both("vmap", torch.mul, call=(X, 2.0)),
        error=errors.BatchError,
        beats=["Got in_dim=0 for an input but the input is of type <class 'float'>", "use None", "args[1]"],
    ),
    Wrong(
        "nothing batched",
        **both("vmap", torch.sin, (None,)),
        error=errors.BatchError,
        beats=["vmap: Expected at least one Tensor to vmap over", "Give an in_dim"],
    ),
    Wrong(
        "sizes that differ",
        **both("vmap", torch.mul, call=(X, X[:2])),
        error=errors.BatchError,
        beats=[
            "vmap: Expected all tensors to have the same size in the mapped dimension",
            "[3, 2]",
            "args[0] has 3",
            "args[1] has 2",
            "None",
        ],
    ),
    Wrong(
        "sizes that differ in trees",
        lambda: ad.vmap(lambda p, q: p)({"a": X}, {"b": [X, X[:2]]}),
        errors.BatchError,
        ["args[0]['a'] has 3", "args[1]['b'][1] has 2"],
    ),
    Wrong(
        "keyword of another size",
        lambda: ad.vmap(lambda x, y: x, {"x": 0, "y": 0})(X, y=X[:2]),
        errors.BatchError,
        ["args[0] has 3", "kwargs['y'] has 2"],
    ),
    Wrong(
        "no inputs",
        **both("vmap", lambda: X, call=()),
        error=errors.BatchError,
        beats=["vmap: got no inputs", "Maybe you forgot"],
    ),
    Wrong(
        "unknown name in in_dims",
        lambda: ad.vmap(lambda x, y: x, {"x": 0, "z": 0})(X, X),
        errors.BatchError,
        ["vmap: in_dims names 'z'", "'x', 'y'", "Correct the name"],
    ),
    Wrong(
        "type of out_dims",
        **both("vmap", torch.sin, out_dims="0"),
        error=errors.BatchError,
        beats=["vmap(out_dims=0): `out_dims` must be an int, None or a python collection of ints"],
    ),
    Wrong(
        "out_dims for two",
        **both("vmap", torch.sin, out_dims=(0, 0)),
        error=errors.BatchError,
        beats=[
            "vmap(out_dims=(0, 0)): out_dims is not compatible with the structure of `outputs`",
            "Give one",
        ],
    ),
    Wrong(
        "out_dim None of a batched output",
        **both("vmap", torch.sin, out_dims=None),
        error=errors.BatchError,
        beats=["vmap: output can not return a BatchedTensor when out_dim is None", "Give it an out_dim"],
    ),
    Wrong(
        "out_dim out of range",
        lambda: ad.vmap(lambda x: {"y": x}, out_dims={"y": 1})(X),
        errors.BatchError,
        ["vmap: Dimension out of range: out_dim=1 for output['y']", "-1 <= out_dim < 1"],
    ),
]
STRICT = [
    *[
        Wrong(
            f"strict {name}",
            lambda name=name: getattr(ad, name)(lambda p: p["w"].sum(), strict=True)(P),
            errors.IndependenceError,
            [f"{name}: with strict=True", "independent of args[0]['b'][0]", "This is not allowed", "drop it"],
        )
        for name in ("grad", "value_and_grad", "grad_and_value", "jacrev", "jacobian", "hessian")
    ],
    Wrong(
        "strict vjp",
        lambda: ad.vjp(lambda p: p["w"].sum(), P, strict=True)[1](torch.ones((), dtype=X.dtype)),
        errors.IndependenceError,
        ["vjp: with strict=True, the output is independent of primals[0]['b'][0]", "drop it"],
    ),
    Wrong(
        "strict jvp",
        lambda: ad.jvp(lambda x: {"y": x, "c": torch.ones(1)}, (X,), (X,), strict=True),
        errors.IndependenceError,
        ["jvp: with strict=True, output['c'] is independent of the primals", "drop it"],
    ),
]
