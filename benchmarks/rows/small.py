"""Rows 1 and 2: functions of 4 numbers, of few operations and of many, where overhead decides."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.autograd.functional as legacy

from benchmarks import by_hand
from benchmarks.rows.row import (
    AUTODIFF,
    BY_HAND,
    FUNCTIONAL,
    JAX,
    TORCH_FUNC,
    OfJax,
    Row,
    Side,
    of_autodiff,
    transformed,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from benchmarks.rows.row import Place, Sides


def tiny(x: Tensor) -> Tensor:
    return (x * x.sin()).sum()


def tiny_vector(x: Tensor) -> Tensor:
    return x * x.sin()


def chain(length: int) -> Callable[[Tensor], Tensor]:
    """Many small operations, one after the other."""

    def func(x: Tensor) -> Tensor:
        for _ in range(length):
            x = x.sin()
        return x.sum()

    return func


def _grad(place: Place, func: Callable[[Tensor], Tensor], jax_name: str) -> Sides:
    x = place.numbers(4)
    return {
        **transformed(place, lambda library: library.grad(func), x),
        BY_HAND: Side(by_hand.gradient, (func, x)),
        JAX: OfJax("grad", jax_name, (x,)),
    }


def _vjp(place: Place, func: Callable[[Tensor], Tensor], jax_name: str) -> Sides:
    x, v = place.numbers(4), place.numbers(4, seed=1)

    def of(library: Any) -> Callable[[Tensor, Tensor], Any]:
        def product(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            output, pullback = library.vjp(func, x)
            return output, pullback(v)[0]

        return product

    return {
        **transformed(place, of, x, v),
        FUNCTIONAL: Side(legacy.vjp, (func, x, v)),
        BY_HAND: Side(by_hand.vjp, (func, x, v)),
        JAX: OfJax("vjp", jax_name, (x, v)),
    }


def _jvp(place: Place, func: Callable[[Tensor], Tensor], jax_name: str) -> Sides:
    x, v = place.numbers(4), place.numbers(4, seed=1)
    return {
        **transformed(place, lambda library: lambda x, v: library.jvp(func, (x,), (v,)), x, v),
        FUNCTIONAL: Side(legacy.jvp, (func, x, v)),
        BY_HAND: Side(by_hand.jvp, (func, x, v)),
        JAX: OfJax("jvp", jax_name, (x, v)),
    }


def _hvp(place: Place, func: Callable[[Tensor], Tensor], jax_name: str) -> Sides:
    x, v = place.numbers(4), place.numbers(4, seed=1)

    def of_torch_func(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        _, product, value = torch.func.jvp(torch.func.grad_and_value(func), (x,), (v,), has_aux=True)
        return value, product

    return {
        **of_autodiff(place, lambda library: lambda x, v: library.hvp(func, (x,), (v,)), x, v),
        TORCH_FUNC: Side(of_torch_func, (x, v)),
        FUNCTIONAL: Side(legacy.hvp, (func, x, v)),
        BY_HAND: Side(by_hand.hvp, (func, x, v)),
        JAX: OfJax("hvp", jax_name, (x, v)),
    }


def _hessian(place: Place, func: Callable[[Tensor], Tensor], jax_name: str) -> Sides:
    x = place.numbers(4)
    return {
        **transformed(place, lambda library: library.hessian(func), x),
        FUNCTIONAL: Side(legacy.hessian, (func, x)),
        BY_HAND: Side(by_hand.hessian_row_by_row, (func, x)),
        JAX: OfJax("hessian", jax_name, (x,)),
    }


_PRODUCTS_BY_HAND = {
    "vjp": by_hand.vjp,
    "jvp": by_hand.jvp,
    "vhp": by_hand.hvp,
    "hvp": by_hand.hvp,
    "jacobian": by_hand.jacobian_row_by_row,
    "hessian": by_hand.hessian_row_by_row,
}


def _of_functional(name: str, number: int, title: str, func: Callable[[Tensor], Tensor]) -> Row:
    """A function of autodiff.functional beside its model."""

    def sides(place: Place) -> Sides:
        x, v = place.numbers(4), place.numbers(4, seed=1)
        # The cotangent of one number may be left out.
        alone = name in {"jacobian", "hessian"} or (name == "vjp" and func(x).dim() == 0)
        args = (func, x) if alone else (func, x, v)
        return {
            **of_autodiff(place, lambda library: getattr(library.functional, name), *args),
            FUNCTIONAL: Side(getattr(legacy, name), args),
            BY_HAND: Side(_PRODUCTS_BY_HAND[name], args),
        }

    return Row(f"{title} functional.{name}", number, sides, short=True, compiles=())


def _of_chain(length: int) -> list[Row]:
    func, jax_name = chain(length), f"chain_{length}"
    # Compilers unroll a chain: one of 1000 operations takes them minutes.
    compilers = length < 1000

    def sides(place: Place, of: Callable[[Place, Any, str], Sides]) -> Sides:
        all_sides = of(place, func, jax_name)
        return all_sides if compilers else {c: side for c, side in all_sides.items() if c != JAX}

    return [
        Row(
            f"chain of {length}, {name}",
            2,
            partial(sides, of=of),
            short=length == 100,
            compiles=(AUTODIFF, TORCH_FUNC) if compilers else (),
        )
        for name, of in (("grad", _grad), ("hvp", _hvp), ("hessian", _hessian))
    ]


ROWS = [
    Row("tiny grad", 1, lambda place: _grad(place, tiny, "tiny"), short=True),
    Row("tiny vjp", 1, lambda place: _vjp(place, tiny_vector, "tiny_vector"), short=True),
    Row("tiny jvp", 1, lambda place: _jvp(place, tiny_vector, "tiny_vector"), short=True),
    Row("tiny hvp", 1, lambda place: _hvp(place, tiny, "tiny"), short=True),
    Row("tiny hessian", 1, lambda place: _hessian(place, tiny, "tiny"), short=True),
    *(_of_functional(name, 1, "tiny", tiny_vector) for name in ("vjp", "jvp", "jacobian")),
    *(_of_functional(name, 1, "tiny", tiny) for name in ("vhp", "hvp", "hessian")),
    *(row for length in (10, 100, 1000) for row in _of_chain(length)),
    *(_of_functional(name, 2, "chain of 100,", chain(100)) for name in ("vjp", "jvp", "vhp", "hvp")),
]
