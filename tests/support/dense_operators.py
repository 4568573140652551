"""Operators and the dense matrices that they are, made by plain torch.autograd, row by row.

`ENTRIES` is what the tests of tests/operators are parametrised over: an operator more is an `Entry` more. Nothing but
``make`` calls autodiff.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from autodiff import operators

if TYPE_CHECKING:
    from collections.abc import Callable

    Params = dict[str, Any]

F32, F64, C128 = torch.float32, torch.float64, torch.complex128
MIXED = "mixed"


def random(*shape: int, seed: int, dtype: torch.dtype = F64) -> Tensor:
    """Normal random numbers, the same each time."""
    wide = C128 if dtype.is_complex else F64
    return torch.randn(shape, dtype=wide, generator=torch.Generator().manual_seed(seed)).to(dtype)


def params(kind: Any) -> Params:
    """What operators are made at: leaves of three shapes in dtype ``kind``, or of two dtypes, and what is no tensor."""
    dtype = F64 if kind == MIXED else kind
    return {
        "w": 0.5 * random(2, 3, seed=1, dtype=F32 if kind == MIXED else dtype),
        "nothing": None,
        "b": random(3, seed=2, dtype=dtype),
        "inner": (random(seed=3, dtype=dtype), 2),
    }


def numbers(tree: Any) -> list[Tensor]:
    """The leaves that have numbers to differentiate."""
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point() or leaf.is_complex()]


def flat(tree: Any) -> Tensor:
    """All numbers of a tree in one vector."""
    leaves = numbers(tree)
    wide = leaves[0].dtype
    for leaf in leaves:
        wide = torch.promote_types(wide, leaf.dtype)
    return torch.cat([leaf.reshape(-1).to(wide) for leaf in leaves])


def rows_of(outputs: Tensor, leaves: list[Tensor], *, more: bool) -> Tensor:
    """The Jacobian of the outputs in the leaves: a backward pass for each row, conjugated as the engine's are."""
    rows = [
        flat(
            torch.autograd.grad(
                one,
                leaves,
                torch.ones_like(one),
                retain_graph=True,
                create_graph=more,
                materialize_grads=True,
            )
        )
        for one in outputs
    ]
    return torch.stack(rows).conj().resolve_conj()


def tracked(tree: Any) -> list[Tensor]:
    return [leaf.requires_grad_() for leaf in numbers(tree)]


def dense_jacobian(func: Callable[[Any], Any], tree: Any, *, more: bool = False) -> Tensor:
    """The Jacobian of a function of a tree, whose leaves it tracks."""
    leaves = tracked(tree)
    return rows_of(flat(func(tree)), leaves, more=more)


def dense_hessian(func: Callable[[Any], Tensor], tree: Any, *, more: bool = False) -> Tensor:
    """The Hessian of a scalar function of a tree, whose leaves it tracks."""
    leaves = tracked(tree)
    value = func(tree)
    slope = torch.autograd.grad(
        value, leaves, torch.ones_like(value), create_graph=True, materialize_grads=True
    )
    # Of the holomorphic derivative, which is the conjugate of the engine's.
    return rows_of(flat(slope).conj().resolve_conj(), leaves, more=more)


POINTS = random(4, 2, seed=4)


def scalar(p: Params) -> Tensor:
    """A scalar function of all leaves, holomorphic where they are complex; its Hessian has no zero block."""
    s, power = p["inner"]
    b = p["b"]
    x = POINTS.to(p["w"].dtype)
    return ((x @ p["w"]).to(b.dtype).sin() * (b * s).exp()).pow(power).sum() + (b**3).sum() * s


def vector(p: Params) -> dict[str, Any]:
    """A function of all leaves to seven numbers; its Jacobian is not square."""
    s, _ = p["inner"]
    x = POINTS[:1].to(p["w"].dtype)
    return {"y": (x @ p["w"]).to(p["b"].dtype).sin() * p["b"], "none": None, "z": (p["b"] * s.exp(), s**2)}


@dataclass(frozen=True)
class Entry:
    """``make(p)`` is an operator, ``dense(p, more=)`` its matrix, differentiable in p with ``more``.

    ``symmetric`` and ``positive`` are what the operator must know of itself where it is real. ``depends`` says whether
    it depends on the numbers in p.
    """

    name: str
    make: Callable[[Params], Any]
    dense: Callable[..., Tensor]
    kinds: tuple[Any, ...] = (F32, F64, C128, MIXED)
    symmetric: bool = False
    positive: bool = False
    depends: bool = True


def is_complex(p: Params) -> bool:
    return bool(p["b"].is_complex())


def jac(p: Params) -> Any:
    return operators.jacobian(vector, holomorphic=is_complex(p))(p)


def hess(p: Params) -> Any:
    return operators.hessian(scalar, holomorphic=is_complex(p))(p)


def dense_jac(p: Params, *, more: bool = False) -> Tensor:
    return dense_jacobian(vector, p, more=more)


def dense_hess(p: Params, *, more: bool = False) -> Tensor:
    return dense_hessian(scalar, p, more=more)


def eye(p: Params) -> Tensor:
    return torch.eye(10, dtype=flat(p).dtype)


GIVEN = random(5, 10, seed=5)
UP, DOWN = 0.75, -1.25


def given(p: Params) -> Tensor:
    """A matrix that depends on p."""
    return GIVEN.to(flat(p).dtype) * flat(p)


def of_function(p: Params, **options: Any) -> Any:
    matrix = given(p)
    return operators.from_matvec(lambda v: matrix @ v, flat(p).detach(), matrix[:, 0].detach(), **options)


def adjoint_of_function(p: Params) -> Any:
    matrix = given(p)
    return of_function(p, rmatvec=lambda u: matrix.mH @ u)


def gram_of_function(p: Params) -> Any:
    matrix = given(p)
    return operators.from_matvec(lambda v: matrix.mH @ (matrix @ v), flat(p).detach(), positive=True)


def tree_function(p: Params) -> Any:
    """w is transposed, and multiplied by b."""

    def multiply(v: Params) -> dict[str, Tensor]:
        return {"t": v["w"].T * p["b"][:, None].to(v["w"].dtype), "s": v["inner"][0] + v["b"][0]}

    codomain = {"t": p["w"].T, "s": p["b"][0]}
    return operators.from_matvec(multiply, p, codomain)


def dense_tree_function(p: Params, *, more: bool = False) -> Tensor:
    matrix = torch.zeros(7, 10, dtype=flat(p).dtype)
    b = p["b"].to(p["w"].dtype)
    rows = [
        [b[j] if (k, j) == divmod(i, 3) else b.new_zeros(()) for i in range(6)]
        for j in range(3)
        for k in range(2)
    ]
    top = torch.stack([torch.stack(row) for row in rows]).to(matrix.dtype)
    matrix = torch.cat([torch.cat([top, matrix[:6, 6:]], 1), matrix[6:]])
    matrix[6, [6, 9]] = 1
    return matrix


def without(func: Callable[[Any], Any], p: Params, name: str) -> Callable[[Any], Any]:
    return lambda part: func({**p, **part})


ENTRIES = [
    Entry("jacobian", jac, dense_jac),
    Entry("hessian", hess, dense_hess, symmetric=True),
    Entry("adjoint", lambda p: jac(p).H, lambda p, more=False: dense_jac(p, more=more).mH),
    Entry("transpose", lambda p: jac(p).T, lambda p, more=False: dense_jac(p, more=more).mT),
    Entry("conjugate", lambda p: jac(p).conj(), lambda p, more=False: dense_jac(p, more=more).conj()),
    Entry("scaled", lambda p: UP * jac(p) / 2, lambda p, more=False: UP / 2 * dense_jac(p, more=more)),
    Entry(
        "scaled Hessian", lambda p: -hess(p), lambda p, more=False: -dense_hess(p, more=more), symmetric=True
    ),
    Entry(
        "scaled by a tensor",
        lambda p: p["b"][0] * jac(p),
        lambda p, more=False: p["b"][0] * dense_jac(p, more=more),
    ),
    Entry(
        "scaled by a complex number",
        lambda p: (1 + 2j) * jac(p),
        lambda p, more=False: (1 + 2j) * dense_jac(p, more=more),
        kinds=(C128,),
    ),
    Entry(
        "sum",
        lambda p: hess(p) + UP * hess(p),
        lambda p, more=False: 1.75 * dense_hess(p, more=more),
        symmetric=True,
    ),
    Entry(
        "difference",
        lambda p: operators.diagonal(p) - hess(p),
        lambda p, more=False: flat(p).diag() - dense_hess(p, more=more),
        symmetric=True,
    ),
    Entry(
        "damped",
        lambda p: hess(p) + UP,
        lambda p, more=False: dense_hess(p, more=more) + UP * eye(p),
        symmetric=True,
    ),
    Entry(
        "subtracted",
        lambda p: DOWN - hess(p),
        lambda p, more=False: DOWN * eye(p) - dense_hess(p, more=more),
        symmetric=True,
    ),
    Entry(
        "damped by a tensor",
        lambda p: hess(p) - p["b"][1],
        lambda p, more=False: dense_hess(p, more=more) - p["b"][1] * eye(p),
        symmetric=True,
    ),
    Entry(
        "product",
        lambda p: jac(p) @ hess(p),
        lambda p, more=False: dense_jac(p, more=more) @ dense_hess(p, more=more),
    ),
    Entry(
        "Gram matrix",
        lambda p: (j := jac(p)).H @ j,
        lambda p, more=False: dense_jac(p, more=more).mH @ dense_jac(p, more=more),
        symmetric=True,
        positive=True,
    ),
    Entry(
        "Gram matrix on the left, damped",
        lambda p: 2 * ((j := jac(p)) @ j.H) + UP,
        lambda p, more=False: (
            2 * dense_jac(p, more=more) @ dense_jac(p, more=more).mH + UP * torch.eye(7, dtype=flat(p).dtype)
        ),
        symmetric=True,
        positive=True,
    ),
    Entry(
        "congruence",
        lambda p: (j := jac(p)) @ hess(p) @ j.H,
        lambda p, more=False: dense_jac(p, more=more) @ dense_hess(p, more=more) @ dense_jac(p, more=more).mH,
        symmetric=True,
    ),
    Entry(
        "block",
        lambda p: hess(p)["w", ("b", "inner.*")],
        lambda p, more=False: dense_hess(p, more=more)[:6, 6:],
    ),
    Entry(
        "diagonal block",
        lambda p: hess(p)["b", "b"],
        lambda p, more=False: dense_hess(p, more=more)[6:9, 6:9],
        symmetric=True,
    ),
    Entry(
        "block of a Jacobian",
        lambda p: jac(p)["z*", "[wb]"],
        lambda p, more=False: dense_jac(p, more=more)[3:, :9],
    ),
    Entry("diagonal", operators.diagonal, lambda p, more=False: flat(p).diag(), symmetric=True),
    Entry(
        "identity",
        lambda p: operators.identity_like(operators.diagonal(p)),
        lambda p, more=False: eye(p),
        symmetric=True,
        positive=True,
        depends=False,
    ),
    Entry("from_matrix", lambda p: operators.from_matrix(given(p)), lambda p, more=False: given(p)),
    Entry(
        "from_matrix of trees",
        lambda p: operators.from_matrix(given(p), p, {"y": p["w"][:, :2], "z": p["b"][0]}),
        lambda p, more=False: given(p),
    ),
    Entry("from_matvec", of_function, lambda p, more=False: given(p)),
    Entry("from_matvec, batched", lambda p: of_function(p, batched=True), lambda p, more=False: given(p)),
    Entry("from_matvec with rmatvec", adjoint_of_function, lambda p, more=False: given(p)),
    Entry(
        "from_matvec, positive",
        gram_of_function,
        lambda p, more=False: given(p).mH @ given(p),
        symmetric=True,
        positive=True,
    ),
    Entry("from_matvec of trees", tree_function, dense_tree_function),
    Entry(
        "wrt",
        lambda p: operators.hessian(scalar, wrt=("inner.*", "w"), holomorphic=is_complex(p))(p),
        lambda p, more=False: dense_hess(p, more=more)[[*range(6), 9]][:, [*range(6), 9]],
        symmetric=True,
    ),
]
