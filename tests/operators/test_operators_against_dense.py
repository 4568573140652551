"""Every operator against its dense matrix: in each form of vectors, on both sides, in each dtype, inside transforms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import autodiff as ad
from dense_operators import C128, ENTRIES, F64, Entry, flat, numbers, params, random

if TYPE_CHECKING:
    from collections.abc import Callable

each = pytest.mark.parametrize(
    ("entry", "kind"),
    [pytest.param(entry, kind, id=f"{entry.name}-{kind}") for entry in ENTRIES for kind in entry.kinds],
)
each_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
each_real = pytest.mark.parametrize(
    "entry", [entry for entry in ENTRIES if F64 in entry.kinds], ids=lambda entry: entry.name
)
each_dependent = pytest.mark.parametrize(
    "entry",
    [entry for entry in ENTRIES if F64 in entry.kinds and entry.depends],
    ids=lambda entry: entry.name,
)


def made(entry: Entry, kind: Any) -> tuple[Any, Tensor]:
    """The operator, and its dense matrix."""
    return entry.make(params(kind)), entry.dense(params(kind)).detach().resolve_conj()


def assert_near(actual: Tensor, expected: Tensor, kind: Any) -> None:
    """Up to rounding, in the dtype and shape that are expected."""
    assert actual.shape == expected.shape
    tolerance = 1e-11 if kind in (F64, C128) else 2e-4
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# Products.


@each
@pytest.mark.parametrize("side", ["right", "left"])
def test_product_in_each_form(entry: Entry, kind: Any, side: str) -> None:
    A, dense = made(entry, kind)
    space, image, M = (A.domain, A.codomain, dense) if side == "right" else (A.codomain, A.domain, dense.mT)

    def product(v: Any) -> Any:
        return A @ v if side == "right" else v @ A

    assert A.shape == tuple(dense.shape)
    v = random(space.size, seed=10, dtype=space.dtype)
    expected = (M @ v.to(M.dtype)).to(image.dtype)
    if not space.is_only_leaf(v):
        assert_near(product(v), expected, kind)
    of_tree = product(space.unravel(v))
    assert_near(flat(of_tree), expected, kind)
    assert [(leaf.shape, leaf.dtype) for leaf in numbers(of_tree)] == [
        (s.shape, s.dtype) for s in image.leaves
    ]
    for k in (0, 1, 3):
        columns = random(space.size, k, seed=11, dtype=space.dtype)
        rows = columns if side == "right" else columns.T
        result = product(rows) if side == "right" else product(rows).mT
        assert_near(result, (M @ columns.to(M.dtype)).to(image.dtype), kind)
    apply = A if side == "right" else A.T
    assert_near(apply.matvec(v), expected, kind)
    assert_near(apply.matmat(columns), (M @ columns.to(M.dtype)).to(image.dtype), kind)


@each
def test_transposes_and_conjugates(entry: Entry, kind: Any) -> None:
    A, dense = made(entry, kind)
    for operator, expected in (
        (A, dense),
        (A.H, dense.mH),
        (A.T, dense.mT),
        (A.conj(), dense.conj()),
        (A.H.T, dense.conj()),
        (A.T.T, dense),
        (A.H.H, dense),
        (A.conj().T.H, dense),
        ((2 * A).H, 2 * dense.mH),
        ((A.H @ A).T, (dense.mH @ dense).mT),
    ):
        assert_near(operator.to_matrix(), expected.resolve_conj(), kind)
        assert operator.to_matrix().is_conj() is False


@each
def test_symmetric_and_positive_are_known_where_they_follow(entry: Entry, kind: Any) -> None:
    A, dense = made(entry, kind)
    if not A.dtype.is_complex:
        assert (A.symmetric, A.positive) == (entry.symmetric, entry.positive)
    if A.symmetric:
        assert_near(dense, dense.mH.resolve_conj(), kind)
        u, v = (random(A.shape[0], seed=seed, dtype=A.dtype) for seed in (12, 13))
        assert_near(torch.vdot(u, A.matvec(v)), torch.vdot(A.matvec(u), v), kind)
        assert A.H is A
    if A.positive:
        assert torch.linalg.eigvalsh(dense).min() > -1e-5


# Conversions.


@each
def test_matrix_tree_and_diagonal(entry: Entry, kind: Any) -> None:
    A, dense = made(entry, kind)
    assert_near(A.to_matrix(), dense, kind)
    blocks = numbers(A.to_tree())
    shapes = [(*row.shape, *column.shape) for row in A.codomain.leaves for column in A.domain.leaves]
    assert [tuple(block.shape) for block in blocks] == shapes
    if A.domain == A.codomain:
        assert_near(flat(A.diagonal()), dense.diagonal(), kind)
    else:
        with pytest.raises(
            ad.errors.ShapeError, match=r"A\.diagonal\(\): expected an operator from a space to itself"
        ):
            A.diagonal()


@each
def test_scipys_operator(entry: Entry, kind: Any) -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    A, dense = made(entry, kind)
    S, M = A.to_scipy(), dense.numpy()
    assert isinstance(S, linalg.LinearOperator)
    assert S.shape == M.shape
    assert str(S.dtype) == str(A.dtype).removeprefix("torch.")
    v, u = (random(size, 2, seed=14).numpy() for size in (M.shape[1], M.shape[0]))
    for one, other in (
        (S @ v, M @ v),
        (S @ v[:, 0], M @ v[:, 0]),
        (S.H @ u, M.conj().T @ u),
        (S.H @ u[:, 1], M.conj().T @ u[:, 1]),
    ):
        assert one.shape == other.shape
        assert abs(one - other).max() < 1e-3
    # A complex vector, also where the operator is real.
    assert abs(S @ (1j * v[:, 0]) - M @ (1j * v[:, 0])).max() < 1e-3


@each
def test_repr_says_what_it_is(entry: Entry, kind: Any) -> None:
    A, dense = made(entry, kind)
    shown = repr(A)
    assert f"{list(dense.shape)}" in shown
    assert str(A.dtype) in shown
    assert ("positive" in shown, "symmetric" in shown) == (A.positive, A.symmetric and not A.positive)
    assert str(A.domain.size) in repr(A.domain)


@each
def test_operator_is_a_tree(entry: Entry, kind: Any) -> None:
    A, dense = made(entry, kind)
    leaves, spec = tree_flatten(A)
    again = tree_unflatten(leaves, spec)
    assert type(again) is type(A)
    assert_near(again.to_matrix(), dense, kind)
    assert_near(again.prepared().to_matrix(), dense, kind)
    for one in (again, again.prepared()):
        assert (one.symmetric, one.positive) == (A.symmetric, A.positive)
    assert tree_map(lambda leaf: leaf, A).shape == A.shape


# Inside transforms. The dense matrices are differentiated by plain autograd.


@each_real
def test_batches_of_vectors(entry: Entry) -> None:
    A, dense = made(entry, F64)
    vectors, covectors = (random(3, size, seed=15) for size in (A.shape[1], A.shape[0]))
    assert_near(ad.vmap(A.matvec)(vectors), vectors @ dense.T, F64)
    assert_near(ad.vmap(A.H.matvec)(covectors), covectors @ dense, F64)
    columns = random(3, A.shape[1], 2, seed=16)
    assert_near(ad.vmap(A.matmat)(columns), dense @ columns, F64)


@each_real
def test_derivative_in_the_vector(entry: Entry) -> None:
    A, dense = made(entry, F64)
    v, u = random(A.shape[1], seed=17), random(A.shape[0], seed=18)
    assert_near(ad.grad(lambda v: u @ A.matvec(v))(v), dense.T @ u, F64)
    assert_near(ad.jvp(A.matvec, (v,), (2 * v,))[1], 2 * dense @ v, F64)
    assert_near(ad.jacrev(A.matvec)(v), dense, F64)
    assert_near(ad.jacfwd(A.H.matvec)(u), dense.T, F64)
    v.requires_grad_()
    (slope,) = torch.autograd.grad(u @ A.matvec(v), v)
    assert_near(slope, dense.T @ u, F64)


def contracted(
    entry: Entry, *, adjoint: bool = False
) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """u'Av as a function of p: with the operator, and with the dense matrix."""
    rows, columns = entry.dense(params(F64)).shape
    u, v = random(rows, seed=19), random(columns, seed=20)

    def by_operator(p: Any) -> Tensor:
        A = entry.make(p)
        return A.H.matvec(u) @ v if adjoint else u @ A.matvec(v)

    return by_operator, lambda p: u @ entry.dense(p, more=True) @ v


def slopes_of(func: Callable[[Any], Tensor], p: Any, *, more: bool = False) -> list[Tensor]:
    """The gradient of what was made by autograd itself."""
    leaves = [leaf.requires_grad_() for leaf in numbers(p)]
    return list(torch.autograd.grad(func(p), leaves, create_graph=more, materialize_grads=True))


@each_dependent
@pytest.mark.parametrize("adjoint", [False, True])
def test_derivative_in_what_it_was_made_at(entry: Entry, adjoint: bool) -> None:
    by_operator, by_matrix = contracted(entry, adjoint=adjoint)
    expected = flat(slopes_of(by_matrix, params(F64)))
    assert expected.abs().max() > 1e-3
    assert_near(flat(ad.grad(by_operator)(params(F64))), expected, F64)
    # The same by a graph of the caller's.
    assert_near(flat(slopes_of(by_operator, params(F64))), expected, F64)
    assert (
        not entry.make(params(F64)).matvec(random(entry.dense(params(F64)).shape[1], seed=20)).requires_grad
    )


@each_dependent
def test_second_derivative_in_what_it_was_made_at(entry: Entry) -> None:
    by_operator, by_matrix = contracted(entry)
    weights = [random(*leaf.shape, seed=21) for leaf in numbers(params(F64))]

    def weighed(slopes: list[Tensor]) -> Tensor:
        return torch.stack([(w * slope).sum() for w, slope in zip(weights, slopes, strict=True)]).sum()

    expected = weighed(slopes_of(by_matrix, params(F64), more=True))
    tangent = tree_map(lambda leaf: leaf, params(F64))
    tangent = {"w": weights[0], "nothing": None, "b": weights[1], "inner": (weights[2], 2)}
    assert_near(ad.jvp(by_operator, (params(F64),), (tangent,))[1], expected, F64)
    if expected.requires_grad:
        p = params(F64)
        second = slopes_of(lambda p: weighed(slopes_of(by_matrix, p, more=True)), p)
        found = ad.grad(lambda p: weighed(numbers(ad.grad(by_operator)(p))))(params(F64))
        assert_near(flat(found), flat(second), F64)


@each_dependent
def test_batches_of_points(entry: Entry) -> None:
    """An operator at each of three points, made inside vmap; its product, and the derivative of that."""
    by_operator, by_matrix = contracted(entry)
    points = [
        tree_map(lambda leaf, s=s: leaf * s if isinstance(leaf, Tensor) else leaf, params(F64))
        for s in (1.0, 0.5, -0.7)
    ]
    stacked = {
        "w": torch.stack([p["w"] for p in points]),
        "nothing": None,
        "b": torch.stack([p["b"] for p in points]),
        "inner": (torch.stack([p["inner"][0] for p in points]), 2),
    }
    dims = {"w": 0, "nothing": None, "b": 0, "inner": (0, None)}
    expected = torch.stack([by_matrix(p) for p in points])
    assert_near(ad.vmap(by_operator, (dims,))(stacked), expected.detach(), F64)
    slopes = ad.vmap(ad.grad(by_operator), (dims,))(stacked)
    for n, p in enumerate(points):
        assert_near(
            torch.cat([leaf[n].reshape(-1) for leaf in numbers(slopes)]), flat(slopes_of(by_matrix, p)), F64
        )


@each_dependent
def test_operator_is_an_argument_of_transformed_functions(entry: Entry) -> None:
    A, _ = made(entry, F64)
    _, by_matrix = contracted(entry)
    rows, columns = A.shape
    u, v = random(rows, seed=19), random(columns, seed=20)
    if not numbers(A):
        pytest.skip("made of a function alone")
    slope = ad.grad(lambda A: u @ A.matvec(v))(A)
    assert type(slope) is type(A)
    assert len(tree_leaves(slope)) == len(tree_leaves(A))
    # What it was made at is p, or a function of it.
    if len(numbers(slope)) == len(numbers(params(F64))) and "scaled by" not in entry.name:
        assert_near(flat(slope), flat(slopes_of(by_matrix, params(F64))), F64)
    assert_near(
        ad.vmap(lambda A, v: A.matvec(v), (None, 0))(A, torch.stack([v, 2 * v]))[1], 2 * A.matvec(v), F64
    )


@each_real
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(entry: Entry, mode: Any) -> None:
    _, dense = made(entry, F64)
    v = random(dense.shape[1], seed=22)
    before = entry.make(params(F64))
    with mode():
        inside = entry.make(params(F64))
        assert_near(inside.matvec(v), dense @ v, F64)
        assert_near(before.matvec(v), dense @ v, F64)
        assert not before.matvec(v).requires_grad
        # A function is transposed by autograd, which refuses tensors of inference mode that it captures.
        if mode is torch.no_grad or numbers(inside):
            assert_near(inside.H.matvec(dense[:, 0]), dense.T @ dense[:, 0], F64)
    assert_near(inside.matvec(v), dense @ v, F64)
