"""Where one mode combination lacks a rule, hvp and hessian take another, and say so where all do."""

from __future__ import annotations

import contextlib
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import autodiff as ad
from autodiff.errors import MissingRuleError
from every_transform import T, W, X
from scenarios import assert_close, difference


def cdist_sum(x: Tensor) -> Tensor:
    return (torch.cdist(x.reshape(-1, 1).expand(3, 2) * T[:2], x[:2].expand(3, 2)) ** 3).sum()


def hardsigmoid(x: Tensor) -> Tensor:
    return (functional.hardsigmoid(x) ** 2).sum()


FUNCTIONS = {
    # No second backward, cdist before torch 2.15; forward over reverse works, by a formula.
    "cdist": cdist_sum,
    "hardsigmoid": hardsigmoid,
    # No backward of second order in forward mode; the default works.
    "huber": lambda x: functional.huber_loss(x, T, delta=0.7) ** 2,
}


@pytest.mark.parametrize("func", FUNCTIONS.values(), ids=FUNCTIONS)
def test_default_order_finds_rules(func: Any) -> None:
    slope = ad.grad(func)
    expected = difference(slope, X, T, 1e-5)
    value, product = ad.hvp(func, (X,), (T,))
    assert_close(value, func(X))
    torch.testing.assert_close(product, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ad.hessian(func)(X) @ T, expected, rtol=1e-6, atol=1e-6)
    rows = ad.vmap(ad.hessian(func))(torch.stack([X, 2 * X]))
    torch.testing.assert_close(rows[0] @ T, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rows[1], ad.hessian(func)(2 * X))
    assert ad.hessian(lambda x: (func(x), "aux"), has_aux=True)(X)[1] == "aux"
    per_sample = ad.per_sample(ad.hessian(func))(torch.stack([X, 2 * X]))
    torch.testing.assert_close(per_sample, rows)


@pytest.mark.parametrize("transform", ["hvp", "hessian"])
def test_random_numbers_are_those_of_one_run(transform: str) -> None:
    def func(x: Tensor) -> Tensor:
        return hardsigmoid(x * torch.rand_like(x)) * torch.rand(())

    def run(f: Any) -> Any:
        torch.manual_seed(0)
        result = ad.hvp(f, (X,), (T,))[1] if transform == "hvp" else ad.hessian(f)(X) @ T
        return result, torch.rand(())

    result, after = run(func)
    torch.manual_seed(0)
    scale, factor, once = torch.rand_like(X), torch.rand(()), torch.rand(())
    expected = difference(ad.grad(lambda x: hardsigmoid(x * scale) * factor), X, T, 1e-5)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    assert_close(after, once)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("wrapped", [False, True])
def test_error_says_what_was_tried(wrapped: bool) -> None:
    func = lambda x: functional.multi_margin_loss(x[None], torch.tensor([1]))
    hessian = ad.hessian(func)
    with pytest.raises(MissingRuleError) as caught:
        ad.vmap(hessian)(X[None]) if wrapped else hessian(X)
    message = str(caught.value)
    assert message.startswith("hessian: torch has no second derivative")
    assert "multi_margin_loss" in message
    for order in ("reverse over reverse: ", "forward over reverse: ", "reverse over forward: "):
        assert order in message
    assert "autodiff.custom_jvp" in message
    with pytest.raises(MissingRuleError, match="hvp: torch has no second derivative"):
        ad.hvp(func, (X,), (T,))
    assert isinstance(caught.value, RuntimeError)
    assert_close(ad.hessian(lambda x: (W * x**3).sum())(X), torch.diag(6 * W * X))


@pytest.mark.parametrize("mode", ["reverse-over-reverse", "forward-over-reverse", "reverse-over-forward"])
def test_a_mode_that_is_asked_for_is_the_only_one(mode: Any) -> None:
    ran = []

    def func(x: Tensor) -> Tensor:
        ran.append(1)
        return functional.multi_margin_loss(x[None], torch.tensor([1]))

    with pytest.raises((RuntimeError, NotImplementedError)) as caught:
        ad.hessian(func, mode=mode)(X)
    assert not isinstance(caught.value, MissingRuleError)
    assert len(ran) == 1


def test_other_errors_are_not_taken_for_a_missing_rule() -> None:
    ran = []

    def func(x: Tensor) -> Tensor:
        ran.append(1)
        raise RuntimeError("of my own")

    for call in (lambda: ad.hessian(func)(X), lambda: ad.hvp(func, (X,), (T,))):
        ran.clear()
        with pytest.raises(RuntimeError, match="of my own"):
            call()
        assert len(ran) == 1


def test_the_functions_own_missing_part_is_its_own_error() -> None:
    def func(x: Tensor) -> Tensor:
        raise NotImplementedError("of my own")

    for call in (lambda: ad.hessian(func)(X), lambda: ad.hvp(func, (X,), (T,))):
        with pytest.raises(NotImplementedError, match="of my own") as caught:
            call()
        assert not isinstance(caught.value, MissingRuleError)


@pytest.mark.parametrize(
    "func", [hardsigmoid, lambda x: functional.multi_margin_loss(x[None], torch.tensor([1]))]
)
def test_an_order_that_failed_leaves_no_reference_cycle(func: Any) -> None:
    made: list[weakref.ref[Tensor]] = []

    def tracked(x: Tensor) -> Tensor:
        between = torch.sin(x)
        made.append(weakref.ref(between))
        result: Tensor = func(between)
        return result

    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(MissingRuleError):
            ad.hvp(tracked, (X,), (T,))
        assert len(made) >= 2
        assert not any(ref() is not None for ref in made)
    finally:
        gc.enable()
