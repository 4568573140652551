"""Functions with hand-derived Jacobians and Hessians, and references made without differentiation.

A `Scenario` is a function of one tree; disguises.py makes more cases of each. Nothing here calls
autodiff, torch.func or autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

Tree = Any

# Trees of dicts, lists and tuples, handled without the library under test.


def map_tree(func: Callable[..., Any], shape: Tree, *trees: Tree) -> Tree:
    """``func`` at every leaf of ``shape``, given what stands there in each of ``trees``."""
    if isinstance(shape, dict):
        return {key: map_tree(func, shape[key], *(tree[key] for tree in trees)) for key in shape}
    if isinstance(shape, list | tuple):
        parts = (map_tree(func, *each) for each in zip(shape, *trees, strict=True))
        return type(shape)(*parts) if hasattr(shape, "_fields") else type(shape)(parts)
    return func(*trees)


def leaves_of(tree: Tree) -> list[Any]:
    """The leaves in order."""
    found: list[Any] = []
    map_tree(found.append, tree, tree)
    return found


def stacked(trees: list[Tree]) -> Tree:
    """Trees of tensors as one tree of stacks."""
    return map_tree(lambda *leaves: torch.stack(leaves), trees[0], *trees)


def random_like(tree: Tree, seed: int = 0) -> Tree:
    """A tree of normal random tensors of the same shapes and dtypes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(leaf: Tensor) -> Tensor:
        return torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator)

    return map_tree(draw, tree, tree)


def assert_close(actual: Tree, expected: Tree, *, loose: bool = False) -> None:
    """The same structure and types of containers, dtypes, shapes and nearly the same numbers.

    Where the closed form holds None, so must the result.
    """
    assert type(actual) is type(expected), f"{type(actual)} instead of {type(expected)}"
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_close(actual[key], expected[key], loose=loose)
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other, loose=loose)
    elif isinstance(expected, Tensor):
        tolerance = {"rtol": 1e-5, "atol": 1e-6} if loose else {}
        torch.testing.assert_close(actual, expected, **tolerance)
    else:
        assert actual == expected


# Closed forms.


@dataclass(frozen=True)
class Scenario:
    """``func`` of one tree, its argument, and the closed forms.

    ``jacobian(x)`` is a tree like the output that holds trees like x, ``hessian(x)`` holds trees like
    x in those again; blocks have shape ``(*out, *in)`` and ``(*out, *in, *in)``.
    """

    name: str
    primal: Tree
    func: Callable[[Tree], Tree]
    jacobian: Callable[[Tree], Tree]
    hessian: Callable[[Tree], Tree]
    scalar: bool = False


def _f64(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def like(constant: Tensor, x: Tensor) -> Tensor:
    """A constant in the dtype of the argument."""
    return constant.to(x.dtype)


def cubic_of_number() -> Scenario:
    """f(x) = x^3 + sin 2x."""
    return Scenario(
        "number to number",
        torch.tensor(0.7, dtype=torch.float64),
        lambda x: x**3 + torch.sin(2 * x),
        jacobian=lambda x: 3 * x**2 + 2 * torch.cos(2 * x),
        hessian=lambda x: 6 * x - 4 * torch.sin(2 * x),
        scalar=True,
    )


def exponential_of_vector() -> Scenario:
    """f(x) = exp(a.x) + x.B x with B not symmetric."""
    a, b = _f64(3, seed=1) / 2, _f64(3, 3, seed=2)
    return Scenario(
        "vector to number",
        _f64(3, seed=3),
        lambda x: torch.exp(like(a, x) @ x) + x @ like(b, x) @ x,
        jacobian=lambda x: like(a, x) * torch.exp(like(a, x) @ x) + like(b + b.T, x) @ x,
        hessian=lambda x: like(torch.outer(a, a), x) * torch.exp(like(a, x) @ x) + like(b + b.T, x),
        scalar=True,
    )


def cubic_of_matrix() -> Scenario:
    """f(X) = sum(A X^3) + (sum X)^2 for X of shape (2, 3)."""
    a = _f64(2, 3, seed=4)

    def hessian(x: Tensor) -> Tensor:
        block = torch.full((2, 3, 2, 3), 2.0, dtype=x.dtype)
        for i in range(2):
            for j in range(3):
                block[i, j, i, j] += 6 * like(a, x)[i, j] * x[i, j]
        return block

    return Scenario(
        "matrix to number",
        _f64(2, 3, seed=5),
        lambda x: (like(a, x) * x**3).sum() + x.sum() ** 2,
        jacobian=lambda x: 3 * like(a, x) * x**2 + 2 * x.sum(),
        hessian=hessian,
        scalar=True,
    )


def product_of_tree() -> Scenario:
    """f(w, {b}) = exp(c.w) * b.b."""
    c = _f64(2, seed=6)

    def parts(p: Tree) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        w, b = p[0], p[1]["b"]
        return w, b, like(c, w), torch.exp(like(c, w) @ w)

    def jacobian(p: Tree) -> Tree:
        _, b, d, e = parts(p)
        return d * e * (b @ b), {"b": 2 * b * e}

    def hessian(p: Tree) -> Tree:
        _, b, d, e = parts(p)
        ww, wb = torch.outer(d, d) * e * (b @ b), torch.outer(d, 2 * b) * e
        return (ww, {"b": wb}), {"b": (wb.T, {"b": 2 * e * torch.eye(4, dtype=b.dtype)})}

    return Scenario(
        "tree to number",
        (_f64(2, seed=7), {"b": _f64(4, seed=8)}),
        lambda p: torch.exp(like(c, p[0]) @ p[0]) * (p[1]["b"] @ p[1]["b"]),
        jacobian=jacobian,
        hessian=hessian,
        scalar=True,
    )


def powers_of_number() -> Scenario:
    """f(t) = (t, t^2, t^3)."""
    return Scenario(
        "number to vector",
        torch.tensor(1.3, dtype=torch.float64),
        lambda t: torch.stack([t, t**2, t**3]),
        jacobian=lambda t: torch.stack([torch.ones_like(t), 2 * t, 3 * t**2]),
        hessian=lambda t: torch.stack([torch.zeros_like(t), torch.full_like(t, 2.0), 6 * t]),
    )


def sines_of_vector() -> Scenario:
    """f_k(x) = sum_j W_kj sin x_j + d_k x_0 x_2, from R^3 to R^2."""
    w, d = _f64(2, 3, seed=9), _f64(2, seed=10)

    def jacobian(x: Tensor) -> Tensor:
        cross = torch.stack([x[2], torch.zeros_like(x[0]), x[0]])
        return like(w, x) * x.cos() + torch.outer(like(d, x), cross)

    def hessian(x: Tensor) -> Tensor:
        swap = torch.tensor([[0.0, 0, 1], [0, 0, 0], [1, 0, 0]], dtype=x.dtype)
        return torch.diag_embed(-like(w, x) * x.sin()) + like(d, x)[:, None, None] * swap

    return Scenario(
        "vector to vector",
        _f64(3, seed=11),
        lambda x: like(w, x) @ x.sin() + like(d, x) * x[0] * x[2],
        jacobian=jacobian,
        hessian=hessian,
    )


def outer_of_vector() -> Scenario:
    """F(x) = x_0^2 x_1 U + exp(x_1) V, from R^2 to 3 x 4 matrices."""
    u, v = _f64(3, 4, seed=12), _f64(3, 4, seed=13)

    def jacobian(x: Tensor) -> Tensor:
        first, second = 2 * x[0] * x[1] * like(u, x), x[0] ** 2 * like(u, x) + x[1].exp() * like(v, x)
        return torch.stack([first, second], -1)

    def hessian(x: Tensor) -> Tensor:
        mixed = 2 * x[0] * like(u, x)
        rows = [
            torch.stack([2 * x[1] * like(u, x), mixed], -1),
            torch.stack([mixed, x[1].exp() * like(v, x)], -1),
        ]
        return torch.stack(rows, -2)

    return Scenario(
        "vector to matrix",
        _f64(2, seed=14),
        lambda x: x[0] ** 2 * x[1] * like(u, x) + x[1].exp() * like(v, x),
        jacobian=jacobian,
        hessian=hessian,
    )


def squares_of_matrix() -> Scenario:
    """F(X) = A X^2 (elementwise square) for X of shape (2, 3), A of shape (4, 2)."""
    a = _f64(4, 2, seed=15)

    def jacobian(x: Tensor) -> Tensor:
        eye = torch.eye(3, dtype=x.dtype)
        return torch.einsum("ik,kl,jl->ijkl", like(a, x), 2 * x, eye)

    def hessian(x: Tensor) -> Tensor:
        two, three = torch.eye(2, dtype=x.dtype), torch.eye(3, dtype=x.dtype)
        return torch.einsum("ik,jl,km,ln->ijklmn", 2 * like(a, x), three, two, three)

    return Scenario(
        "matrix to matrix",
        _f64(2, 3, seed=16),
        lambda x: like(a, x) @ x**2,
        jacobian=jacobian,
        hessian=hessian,
    )


def tree_of_tree() -> Scenario:
    """out = D w b^2 and norm = b sum w^3, for {w: (3,), b: ()}; out has shape (2,)."""
    d = _f64(2, 3, seed=17)

    def func(p: Tree) -> Tree:
        return {"out": like(d, p["w"]) @ p["w"] * p["b"] ** 2, "norm": (p["w"] ** 3).sum() * p["b"]}

    def jacobian(p: Tree) -> Tree:
        w, b, e = p["w"], p["b"], like(d, p["w"])
        return {"out": {"w": e * b**2, "b": 2 * b * (e @ w)}, "norm": {"w": 3 * w**2 * b, "b": (w**3).sum()}}

    def hessian(p: Tree) -> Tree:
        w, b, e = p["w"], p["b"], like(d, p["w"])
        zeros = torch.zeros(2, 3, 3, dtype=w.dtype)
        return {
            "out": {"w": {"w": zeros, "b": 2 * b * e}, "b": {"w": 2 * b * e, "b": 2 * (e @ w)}},
            "norm": {
                "w": {"w": torch.diag(6 * w * b), "b": 3 * w**2},
                "b": {"w": 3 * w**2, "b": torch.zeros_like(b)},
            },
        }

    primal = {"w": _f64(3, seed=18), "b": torch.tensor(1.1, dtype=torch.float64)}
    return Scenario("tree to tree", primal, func, jacobian=jacobian, hessian=hessian)


SCALAR = [cubic_of_number(), exponential_of_vector(), cubic_of_matrix(), product_of_tree()]
SCENARIOS = [
    *SCALAR,
    powers_of_number(),
    sines_of_vector(),
    outer_of_vector(),
    squares_of_matrix(),
    tree_of_tree(),
]


# Independent references.


def pulled(jacobian: Tree, outputs: Tree, cotangents: Tree, primal: Tree) -> Tree:
    """v^T J: the sum over outputs of blocks contracted with cotangents."""
    total: Tree = map_tree(torch.zeros_like, primal, primal)
    flat: list[tuple[Tensor, Tree]] = []
    map_tree(lambda ct, row: flat.append((ct, row)), outputs, cotangents, jacobian)
    for cotangent, row in flat:
        total = map_tree(
            lambda sum_, block, ct=cotangent: sum_ + torch.tensordot(ct, block, ct.dim()), primal, total, row
        )
    return total


def pushed(jacobian: Tree, outputs: Tree, tangents: Tree, primal: Tree) -> Tree:
    """J t: for each output the sum over inputs of blocks contracted with tangents."""

    def along(output: Tensor, row: Tree) -> Tensor:
        parts: list[Tensor] = []
        map_tree(lambda t, block: parts.append(torch.tensordot(block, t, t.dim())), primal, tangents, row)
        return sum(parts, torch.zeros_like(output))

    return map_tree(along, outputs, outputs, jacobian)


def difference(func: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor, step: float = 1e-2) -> Tensor:
    """The directional derivative by central differences of sixth order: error about step^6."""
    weights = {1: 3 / 4, 2: -3 / 20, 3: 1 / 60}
    return sum(
        w * (func(x + k * step * direction) - func(x - k * step * direction)) / step
        for k, w in weights.items()
    )
