"""vmap against loops written here, and its dims, chunks, randomness and fallback."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import autodiff as ad
from autodiff.errors import BatchError
from disguises import CHUNKS, DTYPES, unmutated
from scenarios import SCENARIOS, Scenario, assert_close, map_tree, stacked

Pair = namedtuple("Pair", ["first", "second"])

X = torch.arange(24.0, dtype=torch.float64).reshape(4, 3, 2) / 10
Y = torch.arange(12.0, dtype=torch.float64).reshape(3, 4).sin()


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_batch_equals_the_loop(scenario: Scenario, dtype: torch.dtype, chunk_size: int | None) -> None:
    base = map_tree(lambda leaf: leaf.to(dtype), scenario.primal, scenario.primal)
    samples = [map_tree(lambda leaf, k=k: leaf * (1 - 0.2 * k), base, base) for k in range(5)]
    batch = stacked(samples)
    with unmutated(batch):
        result = ad.vmap(scenario.func, chunk_size=chunk_size)(batch)
    assert_close(result, stacked([scenario.func(sample) for sample in samples]))


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("fallback", [None, "loop"])
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
@pytest.mark.parametrize("out_dim", [0, 1, 2, -1, -3])
def test_dims_of_inputs_and_outputs(dim: int, out_dim: int, chunk_size: int | None, fallback: Any) -> None:
    def func(x: Tensor, s: Tensor) -> Tensor:
        if fallback == "loop":
            float(x.sum())
        return x.T * 2 + s

    s = torch.tensor(0.5, dtype=torch.float64)
    result = ad.vmap(func, (dim, None), out_dim, chunk_size=chunk_size, fallback=fallback)(X, s)
    expected = torch.stack([func(x, s) for x in X.unbind(dim)], out_dim)
    assert_close(result, expected)


def weighted(tree: dict[str, Any], scale: Any, *, shift: Any = 0.0) -> Tensor:
    return tree["x"] @ tree["w"] * scale + shift


TREE = {"x": X[:, :, 0], "w": torch.tensor([1.0, -2, 0.5], dtype=torch.float64)}
SCALE = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
BY_LOOP = torch.stack([weighted({"x": x, "w": TREE["w"]}, s) for x, s in zip(TREE["x"], SCALE, strict=True)])


@pytest.mark.parametrize(
    ("in_dims", "args", "kwargs", "expected"),
    [
        (({"x": 0, "w": None}, 0), (TREE, SCALE), {}, BY_LOOP),
        (({"x": 0, "w": None}, None), (TREE, 2.0), {}, TREE["x"] @ TREE["w"] * 2),
        ({"tree": {"x": 0, "w": None}, "scale": 0}, (TREE, SCALE), {}, BY_LOOP),
        ({"tree": {"x": 0, "w": None}, "scale": 0}, (TREE,), {"scale": SCALE}, BY_LOOP),
        ({"tree": {"x": 0, "w": None}, "scale": 0}, (), {"scale": SCALE, "tree": TREE}, BY_LOOP),
        ({"scale": 0}, ({"x": TREE["w"], "w": TREE["w"]}, SCALE), {}, TREE["w"] @ TREE["w"] * SCALE),
        (
            {"tree": {"x": 0, "w": None}, "scale": 0, "shift": 0},
            (TREE, SCALE),
            {"shift": SCALE},
            BY_LOOP + SCALE,
        ),
        (({"x": 0, "w": None}, 0), (TREE, SCALE), {"shift": SCALE[1]}, BY_LOOP + 2),
    ],
    ids=["nested", "python number", "names", "one keyword", "keywords", "unnamed", "shift", "shared keyword"],
)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_in_dims_as_trees_and_names(
    in_dims: Any, args: Any, kwargs: Any, expected: Tensor, chunk_size: Any
) -> None:
    assert_close(ad.vmap(weighted, in_dims, chunk_size=chunk_size)(*args, **kwargs), expected)


def test_keyword_arguments_are_shared_unless_named() -> None:
    result = ad.vmap(lambda x, *, w: x @ w)(TREE["x"], w=TREE["w"])
    assert_close(result, TREE["x"] @ TREE["w"])


def test_one_in_dim_stands_for_a_tree_with_passive_leaves() -> None:
    tree = {"x": X, "n": 2, "note": "text", "none": None}
    result = ad.vmap(lambda t: t["x"].sum() * t["n"])(tree)
    assert_close(result, X.sum((1, 2)) * 2)


@pytest.mark.parametrize(
    ("out_dims", "where"),
    [(0, (0, 0)), (-1, (-1, -1)), ((0, 1), (0, 1)), ((1, -1), (1, -1))],
)
def test_out_dims_of_a_tuple(out_dims: Any, where: tuple[int, int]) -> None:
    one, other = ad.vmap(lambda x: (x * 2, x.T), out_dims=out_dims)(X)
    assert_close(one, (X * 2).movedim(0, where[0]).contiguous())
    assert_close(other, X.transpose(1, 2).movedim(0, where[1]).contiguous())


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_out_dims_of_a_tree_with_shared_and_passive_leaves(chunk_size: int | None) -> None:
    result = ad.vmap(
        lambda x, y: {"x": x, "shared": y, "note": "text", "nothing": None},
        in_dims=(0, None),
        out_dims={"x": 1, "shared": None, "note": None, "nothing": None},
        chunk_size=chunk_size,
    )(X, Y)
    expected = {"x": X.movedim(0, 1), "shared": Y, "note": "text", "nothing": None}
    assert_close(result, expected)


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_output_that_does_not_depend_on_the_sample_is_expanded(chunk_size: int | None) -> None:
    square = torch.arange(16.0).reshape(4, 4)
    result = ad.vmap(lambda x: (x.sum(), Y, square), out_dims=(0, 1, 2), chunk_size=chunk_size)(X)
    assert_close(result[1], torch.stack([Y] * 4, 1))
    assert_close(result[2], torch.stack([square] * 4, 2))


@pytest.mark.parametrize(
    "make",
    [
        Pair,
        lambda a, b: OrderedDict(z=a, a=b),
        lambda a, b: {"z": a, "a": [b]},
        lambda a, b: (a, (b,)),
    ],
    ids=["namedtuple", "OrderedDict", "dict", "tuple"],
)
def test_containers_keep_their_type(make: Any) -> None:
    result = ad.vmap(lambda t: t)(make(X, SCALE))
    assert_close(result, make(X, SCALE))


@pytest.mark.parametrize("chunk_size", [None, 2, 3])
def test_nested_vmaps(chunk_size: int | None) -> None:
    inner = ad.vmap(lambda x, y: x * y, in_dims=(0, None), chunk_size=chunk_size)
    result = ad.vmap(inner, in_dims=(None, 0), chunk_size=chunk_size)(Y[0], SCALE[:3])
    assert_close(result, torch.outer(SCALE[:3], Y[0]))


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_empty_and_single_batches(size: int, chunk_size: int | None) -> None:
    assert_close(ad.vmap(lambda x: x.sum(0), chunk_size=chunk_size)(X[:size]), X[:size].sum(1))


def dropout(x: Tensor) -> Tensor:
    return torch.nn.functional.dropout(x, 0.5)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 5])
@pytest.mark.parametrize("fallback", [None, "loop"])
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_randomness(randomness: Any, chunk_size: int | None, fallback: Any) -> None:
    def func(x: Tensor) -> Tensor:
        if fallback == "loop":
            float(x.sum())
        return dropout(x)

    rows = ad.vmap(func, randomness=randomness, chunk_size=chunk_size, fallback=fallback)(torch.ones(5, 60))
    assert set(rows.flatten().tolist()) == {0.0, 2.0}
    different = {tuple(row.tolist()) for row in rows}
    assert len(different) == (1 if randomness == "same" else 5)


def test_random_operation_is_refused_by_default() -> None:
    with pytest.raises(RuntimeError, match="randomness"):
        ad.vmap(dropout)(torch.ones(5, 6))


def test_random_numbers_go_on_after_same_in_chunks() -> None:
    func = ad.vmap(dropout, randomness="same", chunk_size=2)
    assert not torch.equal(func(torch.ones(5, 60)), func(torch.ones(5, 60)))


def branching(x: Tensor) -> Tensor:
    return x * 2 if x.sum() > 1 else x - 1


def test_fallback_loops_over_what_cannot_be_batched() -> None:
    result = ad.vmap(branching, fallback="loop")(X)
    assert_close(result, torch.stack([branching(x) for x in X]))


@pytest.mark.parametrize(
    ("func", "words"),
    [
        (branching, "data-dependent control flow"),
        (lambda x: x * x.sum().item(), r"\.item\(\)"),
        (lambda x: x[x > 1].sum(), "dynamic shape"),
        (lambda x: x * x.tolist()[0][0], "doesn't have storage"),
    ],
)
def test_what_cannot_be_batched_is_refused_with_the_way_out(func: Any, words: str) -> None:
    with pytest.raises(RuntimeError, match=words) as raised:
        ad.vmap(func)(X)
    (note,) = raised.value.__notes__
    assert note.startswith("vmap: the function branches on data, or reads a value out of a tensor")
    assert "vmap(func, fallback='loop')" in note
    assert_close(ad.vmap(func, fallback="loop")(X), torch.stack([func(x) for x in X]))


def test_fallback_has_no_sample_to_loop_over_in_an_empty_batch() -> None:
    with pytest.raises(RuntimeError, match="data-dependent control flow"):
        ad.vmap(branching, fallback="loop")(X[:0])


def test_fallback_tells_what_samples_share_from_what_differs() -> None:
    def func(x: Tensor) -> Any:
        return branching(x), {"shared": Y, "note": "text"}

    result = ad.vmap(func, out_dims=(0, None), fallback="loop")(X)
    assert_close(result, (torch.stack([branching(x) for x in X]), {"shared": Y, "note": "text"}))
    with pytest.raises(BatchError, match=r"output\[0\] .* differs from sample to sample"):
        ad.vmap(func, out_dims=None, fallback="loop")(X)


def test_fallback_batches_what_can_be() -> None:
    calls = []

    def func(x: Tensor) -> Tensor:
        calls.append(1)
        return x.sum()

    assert_close(ad.vmap(func, fallback="loop")(X), X.sum((1, 2)))
    assert len(calls) == 1


def test_fallback_passes_on_an_error_of_the_function() -> None:
    def func(x: Tensor) -> Tensor:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        ad.vmap(func, fallback="loop")(X)


@pytest.mark.parametrize(("chunk_size", "calls"), [(None, 1), (1, 4), (3, 2), (4, 1), (100, 1)])
def test_function_runs_once_for_every_chunk(chunk_size: int | None, calls: int) -> None:
    seen = []

    def func(x: Tensor) -> Tensor:
        seen.append(x.shape)
        return x * 2

    ad.vmap(func, chunk_size=chunk_size)(X)
    assert seen == [X.shape[1:]] * calls


@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_watched_results_stay_connected(chunk_size: int | None) -> None:
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    result = ad.vmap(lambda x: (x * w).sin(), chunk_size=chunk_size)(SCALE)
    (gradient,) = torch.autograd.grad(result.sum(), w)
    assert_close(gradient, (SCALE * (SCALE * 2).cos()).sum())


@pytest.mark.parametrize("library", [ad, torch.func], ids=lambda m: m.__name__)
def test_per_sample_gradients_of_a_module(library: Any) -> None:
    module = torch.nn.Linear(3, 2, dtype=torch.float64)
    params = dict(module.named_parameters())
    xs, ys = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return ((ad.functional_call(module, params, (x,)) - y) ** 2).sum()

    result = library.vmap(ad.grad(loss), in_dims=(None, 0, 0))(params, xs, ys)
    residual = 2 * (module(xs) - ys)
    expected = {"weight": torch.einsum("no,ni->noi", residual, xs), "bias": residual}
    assert_close({k: v.detach() for k, v in result.items()}, {k: v.detach() for k, v in expected.items()})


def test_partial_of_a_method_and_builtin() -> None:
    assert_close(ad.vmap(partial(torch.add, alpha=2))(SCALE, SCALE), 3 * SCALE)
    assert_close(ad.vmap(torch.dot)(TREE["x"], TREE["x"]), (TREE["x"] ** 2).sum(1))


NORMALISATIONS = {
    "layer_norm": lambda x: torch.nn.functional.layer_norm(x, (4,)),
    "batch_norm": lambda x: torch.nn.functional.batch_norm(x, None, None, training=True),
    "instance_norm": lambda x: torch.nn.functional.instance_norm(x[None]),
    "group_norm": lambda x: torch.nn.functional.group_norm(x[None], 3),
}


@pytest.mark.parametrize("norm", NORMALISATIONS.values(), ids=NORMALISATIONS)
def test_second_derivatives_of_normalisations_per_sample(norm: Any) -> None:
    """The direction is the same for all samples, and torch's formulas write in place to what they make of it."""
    xs, direction = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)

    def func(x: Tensor) -> Tensor:
        return (norm(x) ** 3).sum()

    expected = torch.func.vmap(torch.func.hessian(func))(xs)
    assert_close(ad.vmap(ad.hessian(func))(xs), expected)
    products = ad.vmap(lambda x: ad.hvp(func, (x,), (direction,))[1])(xs)
    assert_close(products, torch.einsum("nijkl,kl->nij", expected, direction))
    if norm is not NORMALISATIONS["group_norm"]:
        with pytest.raises(RuntimeError, match=r"inplace arithmetic|under vmap"):
            torch.func.vmap(lambda x: torch.func.vjp(torch.func.grad(func), x)[1](direction))(xs)


@pytest.mark.parametrize("fallback", [None, "loop"])
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_stop_iteration_comes_out_as_it_is(fallback: Any, chunk_size: int | None) -> None:
    def func(x: Tensor) -> Tensor:
        raise StopIteration("inside")

    with pytest.raises(StopIteration, match="inside"):
        ad.vmap(func, fallback=fallback, chunk_size=chunk_size)(torch.ones(3))
