"""Flattening, prefixes, key paths, and every kind of container through every kind of transform."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict, deque, namedtuple
from typing import Any, NamedTuple

import attrs
import optree
import pytest
import torch
from torch import Tensor

import autodiff as ad
from autodiff.core import trees

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
S = torch.tensor(3.0, dtype=torch.float64)


@ad.pytree.register_dataclass
@dataclasses.dataclass
class Params:
    z: Tensor
    name: str | None
    a: Any


@ad.pytree.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    z: Tensor
    a: Any

    def __post_init__(self) -> None:
        if self.z is None:
            raise ValueError("z must be given")


@ad.pytree.register_dataclass
@attrs.frozen
class Attrs:
    z: Tensor
    a: Any


class Plain(NamedTuple):
    z: Tensor
    a: Any


Named = namedtuple("Named", ["z", "a"])


class Registered:
    def __init__(self, z: Any, a: Any) -> None:
        self.z, self.a = z, a


ad.pytree.register(Registered, lambda r: ((r.z, r.a), "meta"), lambda meta, children: Registered(*children))


class ByOptree(Registered):
    pass


optree.register_pytree_node(
    ByOptree,
    lambda r: ((r.z, r.a), None, ("z", "a")),
    lambda _, children: ByOptree(*children),
    namespace="torch",
)


class ByOptreeGlobally(Registered):
    pass


optree.register_pytree_node(
    ByOptreeGlobally,
    lambda r: ((r.z, r.a), None, ("z", "a")),
    lambda _, children: ByOptreeGlobally(*children),
    namespace=optree.registry.__GLOBAL_NAMESPACE,
)


def by_attribute(tree: Any) -> tuple[Any, Any]:
    return tree.z, tree.a


def by_key(tree: Any) -> tuple[Any, Any]:
    return tree["z"], tree["a"]


def by_index(tree: Any) -> tuple[Any, Any]:
    return tree[0], tree[1]


CONTAINERS = {
    "dataclass": (lambda z, a: Params(z, None, a), by_attribute),
    "frozen dataclass": (Frozen, by_attribute),
    "attrs": (Attrs, by_attribute),
    "NamedTuple": (Plain, by_attribute),
    "namedtuple": (Named, by_attribute),
    "registered": (Registered, by_attribute),
    "optree, namespace torch": (ByOptree, by_attribute),
    "optree, global namespace": (ByOptreeGlobally, by_attribute),
    "dict": (lambda z, a: {"z": z, "a": a}, by_key),
    "OrderedDict": (lambda z, a: OrderedDict(z=z, a=a), by_key),
    "defaultdict": (lambda z, a: defaultdict(list, z=z, a=a), by_key),
    "tuple": (lambda z, a: (z, a), by_index),
    "list": (lambda z, a: [z, a], by_index),
    "deque": (lambda z, a: deque([z, a], maxlen=2), by_index),
    "nested": (lambda z, a: {"z": z, "a": [(a,)]}, lambda t: (t["z"], t["a"][0][0])),
}
each_container = pytest.mark.parametrize(("make", "take"), CONTAINERS.values(), ids=CONTAINERS)


def same_kind(result: Any, model: Any) -> None:
    assert type(result) is type(model)
    if isinstance(model, dict):
        assert list(result) == list(model)
    if isinstance(model, defaultdict):
        assert result.default_factory is model.default_factory
    if isinstance(model, deque):
        assert result.maxlen == model.maxlen


@each_container
def test_gradient_is_a_container_of_the_same_kind(make: Any, take: Any) -> None:
    tree = make(X, S)
    result = ad.grad(lambda t: (take(t)[0] ** 2).sum() * take(t)[1])(tree)
    same_kind(result, tree)
    z, a = take(result)
    torch.testing.assert_close((z, a), (2 * X * S, (X**2).sum()))


@each_container
@pytest.mark.parametrize("passive", [3, "text", None, 2.5, True, torch.tensor([1, 2]), b"raw"], ids=repr)
def test_passive_leaf_passes_and_leaves_none(make: Any, take: Any, passive: Any) -> None:
    def func(t: Any) -> Tensor:
        z, a = take(t)
        assert a is passive or torch.equal(a, passive)
        return (z**2).sum()

    z, a = take(ad.grad(func)(make(X, passive)))
    torch.testing.assert_close(z, 2 * X)
    assert a is None


@each_container
@pytest.mark.parametrize("passive", [3, "text", None])
def test_passive_leaf_passes_through_vmap(make: Any, take: Any, passive: Any) -> None:
    result = ad.vmap(lambda t: make(take(t)[0] * 2, take(t)[1]))(make(X, passive))
    torch.testing.assert_close(take(result)[0], 2 * X)
    assert take(result)[1] is passive


@each_container
@pytest.mark.parametrize("name", ["jacrev", "jacfwd", "jacobian"])
def test_container_as_output_stands_outside(make: Any, take: Any, name: str) -> None:
    result = getattr(ad, name)(lambda x: make(x * 2, x.sum()))(X)
    same_kind(result, make(X, S))
    z, a = take(result)
    torch.testing.assert_close((z, a), (2 * torch.eye(3, dtype=X.dtype), torch.ones_like(X)))


@each_container
def test_container_through_vjp_jvp_linearize_and_vmap(make: Any, take: Any) -> None:
    def func(t: Any) -> Any:
        z, a = take(t)
        return make(z * a, a**2)

    primal, direction = make(X, S), make(torch.ones_like(X), 2 * S)
    pushed = (S + 2 * S * X, 4 * S * S)
    for out, tangent in (
        ad.jvp(func, (primal,), (direction,)),
        (ad.linearize(func, primal)[0], ad.linearize(func, primal)[1](direction)),
    ):
        torch.testing.assert_close(take(out), (X * S, S**2))
        torch.testing.assert_close(take(tangent), pushed)
        same_kind(tangent, primal)
    out, pullback = ad.vjp(func, primal)
    (pulled,) = pullback(direction)
    torch.testing.assert_close(take(pulled), (S * torch.ones_like(X), X.sum() + 4 * S * S))
    same_kind(pulled, primal)
    batched = ad.vmap(func)(make(torch.stack([X, 2 * X]), torch.stack([S, S])))
    torch.testing.assert_close(take(batched)[0], torch.stack([X * S, 2 * X * S]))
    same_kind(batched, primal)


@each_container
def test_container_as_aux(make: Any, take: Any) -> None:
    _, aux = ad.grad(lambda x: (x.sum(), make(x * 2, "text")), has_aux=True)(X)
    same_kind(aux, make(X, S))
    torch.testing.assert_close(take(aux)[0], 2 * X)
    assert take(aux)[1] == "text"
    assert not take(aux)[0].requires_grad


@each_container
def test_hessian_of_a_container_nests_it_twice(make: Any, take: Any) -> None:
    result = ad.hessian(lambda t: (take(t)[0] ** 2).sum() * take(t)[1])(make(X, S))
    (zz, za), (az, aa) = (take(row) for row in take(result))
    torch.testing.assert_close(zz, 2 * S * torch.eye(3, dtype=X.dtype))
    torch.testing.assert_close((za, az, aa), (2 * X, 2 * X, torch.zeros_like(S)))


@pytest.mark.parametrize("aux", ["text", 3, None, {"a": [1, "b"]}, (), object], ids=repr)
def test_aux_may_be_anything(aux: Any) -> None:
    for transform in (ad.grad, ad.jacrev, ad.jacfwd, ad.hessian):
        assert transform(lambda x: (x.sum(), aux), has_aux=True)(X)[1] == aux
    assert ad.vjp(lambda x: (x, aux), X, has_aux=True)[2] == aux
    assert ad.jvp(lambda x: (x, aux), (X,), (X,), has_aux=True)[2] == aux
    assert ad.hvp(lambda x: (x.sum(), aux), (X,), (X,), has_aux=True)[2] == aux


def test_flatten_keeps_dict_order_and_none() -> None:
    tree = {"z": [1, None], "a": (), "m": {"x": "text"}}
    leaves, spec = trees.flatten(tree)
    assert leaves == [1, None, "text"]
    back = trees.unflatten(spec, leaves)
    assert back == tree
    assert list(back) == ["z", "a", "m"]


def test_paths_are_code() -> None:
    tree = {"w": [1, Params(2, 3, {"b c": 4})], 5: (6,)}
    assert trees.paths(trees.structure(tree), "p") == [
        "p['w'][0]",
        "p['w'][1].z",
        "p['w'][1].name",
        "p['w'][1].a['b c']",
        "p[5][0]",
    ]
    assert trees.paths(trees.structure(7), "args[0]") == ["args[0]"]


def test_match_goes_by_key_and_refuses_other_structures() -> None:
    spec = trees.structure({"a": 1, "b": [2, 3]})
    assert trees.match(spec, {"b": [5, 6], "a": 4}) == [4, 5, 6]
    for other in (
        {"a": 1},
        {"a": 1, "b": [2]},
        {"a": 1, "b": (2, 3)},
        {"a": [1], "b": [2, 3]},
        [1, 2, 3],
        1,
        None,
    ):
        assert trees.match(spec, other) is None
    assert trees.match(trees.structure(None), None) == [None]


def test_broadcast_gives_one_value_for_each_leaf() -> None:
    spec = trees.structure(({"x": 1, "y": [2, 3]}, 4))
    assert trees.broadcast(7, spec) == [(7, False)] * 4
    assert trees.broadcast(({"x": 0, "y": None}, 1), spec) == [
        (0, True),
        (None, False),
        (None, False),
        (1, True),
    ]
    for wrong in ((0,), (0, 1, 2), ({"x": 0}, 1), (0, [1])):
        assert trees.broadcast(wrong, spec) is None


def test_subtrees_are_found_at_any_depth() -> None:
    spec = trees.structure({"w": 0, "b": 0})
    one, two = {"w": 1, "b": 2}, {"w": 3, "b": 4}
    assert trees.subtrees({"out": [one, {"deep": two}], "other": 5}, spec) == [one, two]


def test_registration_reaches_torch_func() -> None:
    """A class registered with autodiff crosses torch.func's transforms too."""
    result = torch.func.grad(lambda p: (p.z**2).sum() * p.a)(Registered(X, S))
    assert type(result) is Registered
    torch.testing.assert_close(result.z, 2 * X * S)


def test_class_registered_with_torch_works() -> None:
    class ByTorch(Registered):
        pass

    torch.utils._pytree.register_pytree_node(
        ByTorch, lambda r: ([r.z, r.a], None), lambda children, _: ByTorch(*children)
    )
    result = ad.grad(lambda p: (p.z**2).sum() * p.a)(ByTorch(X, S))
    assert type(result) is ByTorch
    torch.testing.assert_close(result.z, 2 * X * S)


def test_dict_order_of_the_argument_rules_not_that_of_the_function() -> None:
    result = ad.jacrev(lambda p: {"b": p["z"] * 1, "a": p["a"] * 1})({"z": X, "a": S})
    assert list(result) == ["b", "a"]
    assert list(result["b"]) == ["z", "a"]
