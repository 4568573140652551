"""How often the function runs, and that nobody writes into what it was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import autodiff as ad
from disguises import unmutated
from every_transform import Every, T, X, cubic, each
from scenarios import assert_close


@each
def test_function_runs_exactly_once(every: Every) -> None:
    calls = []

    def func(x: Tensor) -> Tensor:
        calls.append(1)
        return cubic(x)

    every.apply(func, X)
    assert len(calls) == 1


@pytest.mark.parametrize(("chunk_size", "calls"), [(None, 1), (1, 3), (2, 2), (100, 1)])
@pytest.mark.parametrize("mode", ["forward-over-reverse", "forward-over-forward", "jacfwd"])
def test_forward_mode_runs_once_for_every_chunk(mode: Any, chunk_size: int | None, calls: int) -> None:
    seen = []

    def func(x: Tensor) -> Tensor:
        seen.append(1)
        return cubic(x)

    if mode == "jacfwd":
        ad.jacfwd(func, chunk_size=chunk_size)(X)
    else:
        ad.hessian(func, mode=mode, chunk_size=chunk_size)(X)
    assert len(seen) == calls


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 100])
@pytest.mark.parametrize("transform", [ad.jacrev, ad.jacobian, ad.hessian])
def test_reverse_mode_runs_once_whatever_the_chunks(transform: Any, chunk_size: int | None) -> None:
    seen = []

    def func(x: Tensor) -> Tensor:
        seen.append(1)
        return torch.outer(x, x**2)

    transform(func, chunk_size=chunk_size)(X)
    assert len(seen) == 1


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 100])
@pytest.mark.parametrize("transform", [ad.hessian_diagonal, ad.hessian_block_diagonal, ad.hessian_trace])
def test_parts_of_a_hessian_run_it_once_whatever_the_chunks(transform: Any, chunk_size: int | None) -> None:
    seen = []

    def func(x: Tensor) -> Tensor:
        seen.append(1)
        return cubic(x)

    transform(func, chunk_size=chunk_size)(X)
    assert len(seen) == 1


def test_products_do_not_run_the_function_again() -> None:
    seen = []

    def func(x: Tensor) -> Tensor:
        seen.append(1)
        return x.sin()

    _, pullback = ad.vjp(func, X)
    _, pushforward = ad.linearize(func, X)
    for _ in range(3):
        pullback(T)
        pushforward(T)
    assert len(seen) == 2


@each
def test_input_flags_and_values_stay(every: Every) -> None:
    for x in (X.clone(), X.clone().requires_grad_(), (X.clone().requires_grad_() * 1)):
        with unmutated([x]):
            every.apply(cubic, x)
        assert not x.is_leaf or x.grad is None


def test_containers_of_the_input_stay() -> None:
    tree = {"b": [X], "a": (X, None)}
    entries = list(tree.items())
    ad.grad(lambda t: t["b"][0].sum() + t["a"][0].prod())(tree)
    assert list(tree.items()) == entries


@pytest.mark.parametrize("transform", [ad.grad, ad.jacrev, ad.jacfwd, ad.hessian])
def test_in_place_inside_the_function_does_not_reach_the_input(transform: Any) -> None:
    def func(x: Tensor) -> Tensor:
        y = x * 1
        y.mul_(2)
        y[0] = 0
        return (y**2).sum()

    with unmutated([X]):
        result = transform(func)(X)
    expected = 8 * X * torch.tensor([0.0, 1, 1])
    if transform is ad.hessian:
        expected = torch.diag(torch.tensor([0.0, 8, 8], dtype=X.dtype))
    assert_close(result, expected)


def test_mutating_the_functions_container_does_not_reach_the_caller() -> None:
    tree = {"x": X}

    def func(t: dict[str, Tensor]) -> Tensor:
        t["x"] = t["x"] * 2
        t["new"] = torch.ones(1)
        return t["x"].sum()

    ad.grad(func)(tree)
    assert list(tree) == ["x"]
    assert tree["x"] is X
