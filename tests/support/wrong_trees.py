"""Calls with wrong trees: structures, shapes, dtypes and leaves, and what their errors must say.

A row names the call, the expected class, and what the text must hold: the public name and path, what
was expected, what came, the way out; and the same misuse of torch.func, where it has it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import autodiff as ad
from autodiff import errors

if TYPE_CHECKING:
    from collections.abc import Callable

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
Z = torch.ones(2, dtype=torch.complex128)
P = {"w": X, "b": [torch.ones(2)]}


class Unregistered:
    """A class that nobody registered."""


class Wrong(NamedTuple):
    id: str
    call: Callable[[], Any]
    error: type[Exception]
    beats: list[str]
    torch_func: Callable[[], Any] | None = None


def total(p: dict[str, Any]) -> Tensor:
    return p["w"].sum() + p["b"][0].sum()


def pull(ct: Any, library: Any = ad, func: Any = lambda x: {"y": x * 2, "z": x.sum()}) -> Any:
    return library.vjp(func, X)[1](ct)


def push(tangents: Any, library: Any = ad, func: Any = total, primals: Any = (P,)) -> Any:
    return library.jvp(func, primals, tangents)


def both(name: str, *args: Any, call: tuple[Any, ...] = (X,), **options: Any) -> dict[str, Any]:
    """The same call of autodiff and of torch.func."""
    return {
        "call": lambda: getattr(ad, name)(*args, **options)(*call),
        "torch_func": lambda: getattr(torch.func, name)(*args, **options)(*call),
    }


STRUCTURE = [
    Wrong(
        "cotangents of another structure",
        lambda: pull(X),
        errors.StructureError,
        ["vjp: Expected pytree structure of cotangents", "primal output", "'y'", "'z'", "Give one"],
        lambda: pull(X, torch.func),
    ),
    Wrong(
        "tangents of another structure",
        lambda: push(({"w": X},)),
        errors.StructureError,
        ["jvp: Expected", "the same python structure", "tangents:", "'w'", "Give one"],
        lambda: push(({"w": X},), torch.func),
    ),
    Wrong(
        "tangents that are no tuple",
        lambda: push(X, primals=(X,), func=torch.sin),
        errors.StructureError,
        ["jvp: Expected", "tangents"],
        lambda: push(X, torch.func, torch.sin, (X,)),
    ),
    Wrong(
        "primals that are no tuple",
        lambda: ad.jvp(torch.sin, X, X),
        errors.StructureError,
        ["jvp: Expected primals to be a tuple", "Tensor", "(x,)"],
        lambda: torch.func.jvp(torch.sin, X, X),
    ),
    Wrong(
        "primals of hvp that are no tuple",
        lambda: ad.hvp(torch.sum, X, X),
        errors.StructureError,
        ["hvp: Expected primals to be a tuple", "(x,)"],
    ),
    Wrong(
        "tangents of linearize",
        lambda: ad.linearize(total, P)[1]({"w": X}),
        errors.StructureError,
        ["linearize: Expected", "tangents", "'w'"],
    ),
    Wrong(
        "matrix of other inputs",
        lambda: ad.pytree.to_matrix(ad.jacrev(total)(P), (X, X)),
        errors.StructureError,
        ["to_matrix: jacobian", "inputs", "Pass"],
    ),
]
SHAPES = [
    Wrong(
        "shape of a cotangent",
        lambda: pull({"y": X[:2], "z": X[0]}),
        errors.ShapeError,
        ["vjp: ", "cotangents['y'] has shape (2,)", "output['y'] has shape (3,)", "must match"],
        lambda: pull({"y": X[:2], "z": X[0]}, torch.func),
    ),
    Wrong(
        "shape of a tangent",
        lambda: push(({"w": X[:2], "b": P["b"]},)),
        errors.ShapeError,
        ["jvp: tangents[0]['w'] has shape (2,)", "primals[0]['w'] has shape (3,)", "A tangent must match"],
        lambda: push(({"w": X[:2], "b": P["b"]},), torch.func),
    ),
    Wrong(
        "shape of a tangent of hvp",
        lambda: ad.hvp(torch.sum, (X,), (X[:2],)),
        errors.ShapeError,
        ["hvp: tangents[0] has shape (2,)", "primals[0] has shape (3,)", "A tangent must match"],
    ),
    Wrong(
        "shape for unravel",
        lambda: ad.pytree.ravel(P)[1](X),
        errors.ShapeError,
        ["unravel: vector has shape (3,)", "(5,)", "one number for each", "Reshape"],
    ),
    Wrong(
        "shape of a matrix",
        lambda: ad.pytree.from_matrix(torch.ones(2, 3), X, X),
        errors.ShapeError,
        ["from_matrix: matrix has shape (2, 3)", "(3, 3)", "a row for each"],
    ),
    Wrong(
        "block of other inputs",
        lambda: ad.pytree.to_matrix(ad.jacrev(torch.sin)(X), X[:2]),
        errors.ShapeError,
        ["to_matrix: row 0 of jacobian has shape (3, 3)", "(2,)", "Pass the inputs"],
    ),
]
DTYPES = [
    Wrong(
        "dtype of a tangent",
        lambda: push(({"w": X.float(), "b": P["b"]},)),
        errors.DtypeError,
        ["jvp: tangents[0]['w'] has dtype torch.float32", "primals[0]['w'] has dtype torch.float64", ".to("],
    ),
    Wrong(
        "complex cotangent of a real output",
        lambda: pull({"y": X + 0j, "z": X[0]}),
        errors.DtypeError,
        ["vjp: cotangents['y'] has dtype torch.complex128", "output['y'] has dtype torch.float64", ".to("],
    ),
    Wrong(
        "complex input of jacrev",
        **both("jacrev", lambda z: z, call=(Z,)),
        error=errors.DtypeError,
        beats=["jacrev: Expected all inputs to be real", "complex", "holomorphic=True"],
    ),
    Wrong(
        "complex input of jacfwd",
        **both("jacfwd", lambda z: z, call=(Z,)),
        error=errors.DtypeError,
        beats=["jacfwd: Expected all inputs to be real", "complex", "holomorphic=True"],
    ),
    Wrong(
        "complex input of hessian",
        call=lambda: ad.hessian(lambda z: z.abs().sum())(Z),
        error=errors.DtypeError,
        beats=["hessian: Expected all inputs to be real", "complex", "holomorphic=True"],
    ),
    *[
        Wrong(
            f"complex input of {name}",
            lambda name=name, k=k: getattr(ad, name)(lambda p: p[1].abs().sum(), *k)([X, Z]),
            errors.DtypeError,
            [f"{name}: expected real tensors", "args[0][1] of dtype torch.complex128", "view_as_real"],
        )
        for name, k in [
            ("hessian_diagonal", ()),
            ("hessian_block_diagonal", ()),
            ("hessian_trace", ()),
            ("hessian_eigenvalues", (1,)),
        ]
    ],
    Wrong(
        "complex output of jacrev",
        **both("jacrev", lambda x: x + 1j),
        error=errors.DtypeError,
        beats=["jacrev: Expected all outputs to be real", "complex", "holomorphic=True"],
    ),
    Wrong(
        "complex output of jacfwd",
        **both("jacfwd", lambda x: x + 1j),
        error=errors.DtypeError,
        beats=["jacfwd: Expected all outputs to be real", "complex", "holomorphic=True"],
    ),
    Wrong(
        "real input of a holomorphic jacrev",
        lambda: ad.jacrev(torch.sin, holomorphic=True)(X),
        errors.DtypeError,
        ["jacrev: holomorphic=True expects all inputs to be complex", "torch.float64", "Convert"],
    ),
    Wrong(
        "real output of a holomorphic jacfwd",
        lambda: ad.jacfwd(torch.abs, holomorphic=True)(Z),
        errors.DtypeError,
        ["jacfwd: holomorphic=True expects all outputs to be complex", "torch.float64", "Convert"],
    ),
]
LEAVES = [
    *[
        Wrong(
            f"unregistered class in {name}",
            **both(name, torch.sum, call=({"p": [Unregistered()]},)),
            error=errors.LeafError,
            beats=[
                f"{name}: args[0]['p'][0] is of class Unregistered",
                "must be Tensor",
                "autodiff.pytree.register_dataclass(Unregistered)",
                "autodiff.pytree.register(",
            ],
        )
        for name in ("grad", "jacrev")
    ],
    Wrong(
        "unregistered class in jacfwd",
        lambda: ad.jacfwd(torch.sum)(Unregistered()),
        errors.LeafError,
        ["jacfwd: args[0] is of class Unregistered", "autodiff.pytree.register("],
    ),
    Wrong(
        "unregistered class in vjp",
        lambda: ad.vjp(torch.sum, Unregistered()),
        errors.LeafError,
        ["vjp: primals[0] is of class Unregistered", "autodiff.pytree.register"],
        lambda: torch.func.vjp(torch.sum, Unregistered()),
    ),
    Wrong(
        "unregistered class as a tangent",
        lambda: push((Unregistered(),), primals=(X,), func=torch.sin),
        errors.LeafError,
        ["jvp: tangents[0] is of class Unregistered", "autodiff.pytree.register"],
    ),
    Wrong(
        "unregistered class as a cotangent",
        lambda: pull({"y": X, "z": Unregistered()}),
        errors.LeafError,
        ["vjp: cotangents['z'] is of class Unregistered", "autodiff.pytree.register"],
    ),
    Wrong(
        "number as a tangent",
        lambda: push(({"w": 1.0, "b": P["b"]},)),
        errors.LeafError,
        [
            "jvp: tangents[0]['w'] is of type float",
            "primals[0]['w'] is a tensor of shape (3,)",
            "torch.zeros_like",
        ],
    ),
    Wrong(
        "None as a cotangent",
        lambda: pull({"y": X, "z": None}),
        errors.LeafError,
        [
            "vjp: cotangents['z'] is of type NoneType",
            "output['z'] is a tensor of shape ()",
            "torch.zeros_like",
        ],
    ),
    Wrong(
        "int tensor",
        **both("grad", torch.sum, call=(torch.tensor([1, 2]),)),
        error=errors.LeafError,
        beats=[
            "grad: args[0] has no leaf to differentiate",
            "torch.int64",
            "floating point",
            "args[0].float()",
        ],
    ),
    Wrong(
        "number",
        **both("grad", torch.sum, call=(3.0,)),
        error=errors.LeafError,
        beats=["grad: args[0] has no leaf", "float", "only contain Tensors", "torch.tensor(3.0)"],
    ),
    Wrong(
        "tree without a differentiable leaf",
        lambda: ad.hessian(total)({"w": 3, "b": [None]}),
        errors.LeafError,
        ["hessian: args[0] has no leaf to differentiate", "args[0]['w'] of type int", "torch.tensor(3)"],
    ),
    Wrong(
        "empty tree",
        lambda: ad.jacrev(total)({}),
        errors.LeafError,
        ["jacrev: args[0] has no leaf to differentiate", "an empty dict", "argnums"],
    ),
    Wrong(
        "no argument",
        lambda: ad.vjp(lambda: X),
        errors.LeafError,
        ["vjp: primals has no leaf", "empty tuple"],
    ),
    Wrong(
        "ravel of nothing", lambda: ad.pytree.ravel({"n": 3}), errors.LeafError, ["ravel: tree has no leaf"]
    ),
    Wrong(
        "second of the argnums",
        lambda: ad.grad(total, argnums="name")(P, name="x"),
        errors.LeafError,
        ["grad: name has no leaf", "str"],
    ),
]
