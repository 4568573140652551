"""Random trees: differentiating keeps the structure, and every passive leaf passes untouched."""

from __future__ import annotations

from collections import OrderedDict, deque, namedtuple
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import autodiff as ad
from autodiff.core import trees
from autodiff.pytree import from_matrix, ravel, to_matrix

Point = namedtuple("Point", ["p", "q"])

# No deadline: the first call of a transform loads rules, which takes longer than the rest together.
relaxed = settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
)

shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
tensors = st.builds(
    lambda shape, dtype, seed: torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed)),
    shapes,
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 999),
)
passives = st.one_of(
    st.none(),
    st.integers(),
    st.text(max_size=3),
    st.booleans(),
    st.just(2.5),
    st.builds(torch.arange, st.integers(0, 3)),
)
keys = st.one_of(st.text("abz", min_size=1, max_size=2), st.integers(0, 9))


def containers(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    dicts = st.dictionaries(keys, children, max_size=3)
    return st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        dicts,
        dicts.map(OrderedDict),
        st.builds(Point, children, children),
        st.lists(children, max_size=2).map(deque),
    )


any_tree = st.recursive(st.one_of(tensors, passives), containers, max_leaves=8)
trees_with_a_tensor = st.builds(lambda t, x: {"rest": t, "first": x}, any_tree, tensors)


def parts(tree: Any) -> list[tuple[Any, Any]] | None:
    """The direct children by key, or None for a leaf; written without the library."""
    if isinstance(tree, dict):
        return list(tree.items())
    if isinstance(tree, list | tuple | deque):
        return list(enumerate(tree))
    return None


def assert_same_structure(result: Any, tree: Any, check_leaf: Any) -> None:
    below, model = parts(result), parts(tree)
    if model is None:
        check_leaf(result, tree)
        return
    assert type(result) is type(tree)
    assert below is not None
    assert [key for key, _ in below] == [key for key, _ in model]
    for (_, one), (_, other) in zip(below, model, strict=True):
        assert_same_structure(one, other, check_leaf)


def active(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def leaves(tree: Any) -> list[Any]:
    below = parts(tree)
    return [tree] if below is None else [leaf for _, child in below for leaf in leaves(child)]


def loss(tree: Any) -> Tensor:
    """Half the sum of squares, plus the first number of every leaf: gradient x + e_0."""
    total = torch.zeros((), dtype=torch.float64)
    for leaf in leaves(tree):
        if active(leaf):
            total = total + (leaf.double() ** 2).sum() / 2 + leaf.flatten()[:1].double().sum()
    return total


def expected_gradient(leaf: Tensor) -> Tensor:
    flat = leaf.clone().flatten()
    flat[:1] += 1
    return flat.reshape(leaf.shape)


def check_gradient(gradient: Any, leaf: Any) -> None:
    if active(leaf):
        torch.testing.assert_close(gradient, expected_gradient(leaf))
    else:
        assert gradient is None


@relaxed
@given(any_tree)
def test_flatten_and_unflatten_are_inverse(tree: Any) -> None:
    flat, spec = trees.flatten(tree)
    assert [id(leaf) for leaf in flat] == [id(leaf) for leaf in leaves(tree)]

    def same(result: Any, leaf: Any) -> None:
        assert result is leaf

    assert_same_structure(trees.unflatten(spec, flat), tree, same)


@relaxed
@given(any_tree)
def test_paths_lead_to_their_leaves(tree: Any) -> None:
    flat, spec = trees.flatten(tree)
    for path, leaf in zip(trees.paths(spec, "tree"), flat, strict=True):
        assert eval(path, {"tree": tree}) is leaf


@pytest.mark.parametrize("transform", [ad.grad, ad.jacrev, ad.jacfwd], ids=lambda f: f.__name__)
@relaxed
@given(tree=trees_with_a_tensor)
def test_gradient_has_the_structure_of_its_argument(transform: Any, tree: Any) -> None:
    assert_same_structure(
        transform(loss)(tree),
        tree,
        lambda g, leaf: check_gradient(g.to(leaf.dtype) if active(leaf) else g, leaf),
    )


@relaxed
@given(tree=trees_with_a_tensor)
def test_function_sees_the_passive_leaves_it_was_given(tree: Any) -> None:
    def func(inner: Any) -> Tensor:
        def same(result: Any, leaf: Any) -> None:
            if active(leaf):
                assert torch.equal(result.detach(), leaf)
            elif isinstance(leaf, Tensor):
                assert torch.equal(result, leaf)
            else:
                assert result is leaf

        assert_same_structure(inner, tree, same)
        return loss(inner)

    ad.grad(func)(tree)


@relaxed
@given(tree=trees_with_a_tensor)
def test_products_have_the_structure_of_output_and_argument(tree: Any) -> None:
    def keep(inner: Any) -> Any:
        """The tree itself, doubled, with holes for what is passive."""
        flat, spec = trees.flatten(inner)
        return trees.unflatten(spec, [2 * leaf if active(leaf) else None for leaf in flat])

    ones = trees.unflatten(
        trees.structure(tree), [torch.ones_like(leaf) if active(leaf) else None for leaf in leaves(tree)]
    )

    def twice(result: Any, leaf: Any) -> None:
        assert torch.equal(result, 2 * torch.ones_like(leaf)) if active(leaf) else result is None

    out, tangent = ad.jvp(keep, (tree,), (ones,))
    assert_same_structure(tangent, tree, twice)
    out, pullback = ad.vjp(keep, tree)
    (pulled,) = pullback(ones)
    assert_same_structure(pulled, tree, twice)
    assert_same_structure(out, tree, lambda r, leaf: None)


@relaxed
@given(tree=trees_with_a_tensor)
def test_ravel_round_trip(tree: Any) -> None:
    vector, unravel = ravel(tree)
    assert vector.numel() == sum(leaf.numel() for leaf in leaves(tree) if active(leaf))

    def same(result: Any, leaf: Any) -> None:
        assert torch.equal(result, leaf) if isinstance(leaf, Tensor) else result is leaf

    assert_same_structure(unravel(vector), tree, same)


@settings(relaxed, max_examples=25)
@given(tree=trees_with_a_tensor)
def test_matrix_of_the_hessian_is_the_identity_and_goes_back(tree: Any) -> None:
    hessian = ad.hessian(loss)(tree)
    matrix = to_matrix(hessian, tree)
    torch.testing.assert_close(matrix.double(), torch.eye(len(matrix), dtype=torch.float64))
    again = to_matrix(from_matrix(matrix, tree, tree), tree)
    assert torch.equal(again, matrix)


@relaxed
@given(tree=trees_with_a_tensor, size=st.integers(1, 3), chunk_size=st.sampled_from([None, 1, 2]))
def test_vmap_keeps_the_structure_and_passes_passive_leaves(
    tree: Any, size: int, chunk_size: int | None
) -> None:
    flat, spec = trees.flatten(tree)
    batch = trees.unflatten(spec, [torch.stack([leaf] * size) if active(leaf) else leaf for leaf in flat])
    in_dims = trees.unflatten(spec, [0 if active(leaf) else None for leaf in flat])

    def sample(inner: Any) -> Any:
        below, structure = trees.flatten(inner)
        return trees.unflatten(structure, [leaf + 1 if active(leaf) else None for leaf in below])

    result = ad.vmap(sample, in_dims=(in_dims,), chunk_size=chunk_size)(batch)

    def stacked(got: Any, leaf: Any) -> None:
        assert torch.equal(got, torch.stack([leaf + 1] * size)) if active(leaf) else got is None

    assert_same_structure(result, tree, stacked)
