"""Disguises of a scenario: batched, closed over, as a deeper tree, with aux, and so on.

Each gives a `Case`: a call, and what the disguise does to the scenario's closed forms. `call` runs a
transform on a case and checks on the way that inputs stay as they were and aux arrives.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import autodiff as ad
from scenarios import Scenario, Tree, leaves_of, map_tree, random_like, stacked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

AUX = {"note": "any text", "number": 7}
DTYPES = [torch.float64, torch.float32]
CHUNKS = [None, 1, 2, 3, 100]


def _same(tree: Tree) -> Tree:
    return tree


def _cast(tree: Tree, dtype: torch.dtype) -> Tree:
    return map_tree(lambda leaf: leaf.to(dtype), tree, tree)


@dataclass(frozen=True)
class Case:
    """A scenario in disguise: a call, and what the disguise does to the expected results.

    ``dress`` takes a tree like the scenario's primal to one like the disguised argument.
    """

    scenario: Scenario
    func: Callable[..., Any]
    primals: list[Tree]
    dress: Callable[[Tree], Tree]
    args: Callable[[Tree], tuple[Any, ...]]
    kwargs: Callable[[Tree], dict[str, Any]] = lambda _: {}
    argnums: Any = 0
    has_aux: bool = False
    batched: bool = False

    def expect(self, closed_form: Callable[..., Tree], *along: list[Tree]) -> Tree:
        """A closed form at the primal, or stacked over the batch of them."""
        results = [closed_form(*each) for each in zip(self.primals, *along, strict=True)]
        return stacked(results) if self.batched else results[0]

    def jacobian(self) -> Tree:
        """The expected Jacobian, dressed."""
        return self._dressed(self.scenario.jacobian, self.dress)

    def hessian(self) -> Tree:
        """The expected Hessian, dressed at both inner levels."""
        model = self.primals[0]
        return self._dressed(
            self.scenario.hessian, lambda inner: self.dress(map_tree(self.dress, model, inner))
        )

    def _dressed(self, closed_form: Callable[[Tree], Tree], dress: Callable[[Tree], Tree]) -> Tree:
        outputs = self.scenario.func(self.primals[0])
        return map_tree(dress, outputs, self.expect(closed_form))

    def gathered(self, trees: list[Tree]) -> Tree:
        """What the transform is given for one tree per primal: the stack, or the only one."""
        return stacked(trees) if self.batched else trees[0]


def plain(scenario: Scenario, dtype: torch.dtype) -> Case:
    """The scenario as it is."""
    return Case(scenario, scenario.func, [_cast(scenario.primal, dtype)], _same, lambda x: (x,))


def vmapped(scenario: Scenario, dtype: torch.dtype) -> Case:
    """Three inputs at once, for a transform under vmap."""
    base = _cast(scenario.primal, dtype)
    primals = [map_tree(lambda leaf, k=k: leaf * (1 - 0.2 * k), base, base) for k in range(3)]
    return Case(scenario, scenario.func, primals, _same, lambda x: (x,), batched=True)


def closed_over(scenario: Scenario, dtype: torch.dtype) -> Case:
    """f(x) = g(x - s) of a captured s."""
    primal = _cast(scenario.primal, dtype)
    shift = random_like(primal, seed=1)

    def func(x: Tree) -> Tree:
        return scenario.func(map_tree(lambda a, b: a - b, x, x, shift))

    def args(x: Tree) -> tuple[Tree]:
        return (map_tree(lambda a, b: a + b, x, x, shift),)

    return Case(scenario, func, [primal], _same, args)


def as_tree(scenario: Scenario, dtype: torch.dtype) -> Case:
    """The argument inside two more containers, keys not in alphabetical order."""

    def dress(x: Tree) -> Tree:
        return {"z": [x], "a": ()}

    return Case(
        scenario,
        lambda tree: scenario.func(tree["z"][0]),
        [_cast(scenario.primal, dtype)],
        dress,
        lambda x: (dress(x),),
    )


def with_aux(scenario: Scenario, dtype: torch.dtype) -> Case:
    """Beside the output, something else."""
    return Case(
        scenario,
        lambda x: (scenario.func(x), AUX),
        [_cast(scenario.primal, dtype)],
        _same,
        lambda x: (x,),
        has_aux=True,
    )


def non_contiguous(scenario: Scenario, dtype: torch.dtype) -> Case:
    """Every leaf a strided view into something larger."""

    def spread(leaf: Tensor) -> Tensor:
        return torch.stack([leaf, leaf + 9], -1)[..., 0]

    return Case(
        scenario, scenario.func, [_cast(scenario.primal, dtype)], _same, lambda x: (map_tree(spread, x, x),)
    )


def passive_leaves(scenario: Scenario, dtype: torch.dtype) -> Case:
    """Int, string, None and an integer tensor among the leaves; None stands in their place after."""

    def func(tree: Tree) -> Tree:
        assert (tree["count"], tree["name"], tree["nothing"]) == (3, "x", None)
        assert tree["index"].tolist() == [1, 2]
        return scenario.func(tree["x"])

    def dress(x: Tree) -> Tree:
        return {"count": None, "x": x, "name": None, "nothing": None, "index": None}

    def args(x: Tree) -> tuple[Tree]:
        return ({"count": 3, "x": x, "name": "x", "nothing": None, "index": torch.tensor([1, 2])},)

    return Case(scenario, func, [_cast(scenario.primal, dtype)], dress, args)


def second_argument(scenario: Scenario, dtype: torch.dtype) -> Case:
    """argnums=-1, after an argument that is not differentiated."""
    return Case(
        scenario,
        lambda label, x: scenario.func(x),
        [_cast(scenario.primal, dtype)],
        _same,
        lambda x: ("label", x),
        argnums=-1,
    )


def by_keyword(scenario: Scenario, dtype: torch.dtype) -> Case:
    """argnums by name, in a call by keywords alone."""
    return Case(
        scenario,
        lambda scale, *, x: scenario.func(x),
        [_cast(scenario.primal, dtype)],
        _same,
        lambda x: (),
        lambda x: {"x": x, "scale": 2},
        argnums="x",
    )


def tuple_of_argnums(scenario: Scenario, dtype: torch.dtype) -> Case:
    """A tuple of one argnum gives tuples."""
    return Case(
        scenario, scenario.func, [_cast(scenario.primal, dtype)], lambda x: (x,), lambda x: (x,), argnums=(0,)
    )


# Transforms that take primals have no argnums, so the last three disguises do not apply to them.
OF_PRIMALS = [plain, vmapped, closed_over, as_tree, with_aux, non_contiguous, passive_leaves]
TRANSFORMERS = [*OF_PRIMALS, second_argument, by_keyword, tuple_of_argnums]


def call(case: Case, transform: Callable[..., Callable[..., Any]]) -> Tree:
    """``transform(func, argnums=, has_aux=)`` of the case's function at the case's arguments."""
    derived = transform(case.func, argnums=case.argnums, has_aux=case.has_aux)
    tree = case.gathered(case.primals)
    args, kwargs = case.args(tree), case.kwargs(tree)
    with unmutated((args, kwargs)):
        result = ad.vmap(derived)(*args) if case.batched else derived(*args, **kwargs)
    if case.has_aux:
        result, aux = result
        assert aux == AUX
    for leaf in leaves_of(result):
        assert leaf is None or not leaf.requires_grad
    return result


@contextmanager
def unmutated(tree: Tree) -> Iterator[None]:
    """Every tensor of the tree has the same numbers, flags and version after as before."""
    tensors = [leaf for leaf in leaves_of(tree) if isinstance(leaf, Tensor)]
    before = [(t.clone(), t._version, t.requires_grad, t.grad_fn) for t in tensors]
    yield
    for tensor, (values, *rest) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, values)
        assert [tensor._version, tensor.requires_grad, tensor.grad_fn] == rest


def cases(
    scenarios: list[Scenario], transformers: list[Callable[..., Case]], dtypes: list[torch.dtype] = DTYPES
) -> list[Any]:
    """pytest parameters: every scenario in every disguise and dtype, with readable ids."""
    return [
        pytest.param(make(scenario, dtype), id=f"{scenario.name}-{make.__name__}-{str(dtype)[6:]}")
        for scenario in scenarios
        for make in transformers
        for dtype in dtypes
    ]
