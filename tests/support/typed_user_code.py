"""Code of a user for a type checker: a comment says what it reveals, or which error it finds. Never run."""

from __future__ import annotations

from typing import Any, reveal_type

import torch
from torch import Tensor

import autodiff as ad


def loss(w: Tensor, x: Tensor) -> Tensor:
    return (w * x).sum()


def named(w: Tensor, x: Tensor) -> tuple[Tensor, str]:
    return loss(w, x), "loss"


def parts(x: Tensor) -> dict[str, Tensor]:
    return {"x": x}


w, x, flag = torch.ones(2), torch.ones(2), bool(torch.ones(1))

reveal_type(ad.grad(loss))  # def (w: Tensor, x: Tensor) -> Any
reveal_type(ad.grad(loss, ("w", "x"), strict=True))  # def (w: Tensor, x: Tensor) -> Any
reveal_type(ad.grad(named, has_aux=True))  # def (w: Tensor, x: Tensor) -> tuple[Any, str]
reveal_type(ad.grad(named, 0, True))  # def (w: Tensor, x: Tensor) -> Any
reveal_type(ad.grad(loss, has_aux=flag))  # def (w: Tensor, x: Tensor) -> Any
reveal_type(ad.grad(lambda x: x.sum()))  # def (x: Any) -> Any
reveal_type(ad.grad(torch.nn.Linear(1, 1)))  # def (*Any, **Any) -> Any

reveal_type(ad.value_and_grad(loss)(w, x))  # tuple[Tensor, Any]
reveal_type(ad.value_and_grad(named, has_aux=True)(w, x))  # tuple[tuple[Tensor, str], Any]
reveal_type(ad.value_and_grad(named, 0, True)(w, x))  # Any
reveal_type(ad.grad_and_value(loss)(w, x))  # tuple[Any, Tensor]
reveal_type(ad.grad_and_value(named, has_aux=True)(w, x))  # tuple[Any, tuple[Tensor, str]]

reveal_type(ad.vmap(loss, in_dims=(None, 0)))  # def (w: Tensor, x: Tensor) -> Tensor
reveal_type(ad.vmap(ad.value_and_grad(loss)))  # def (w: Tensor, x: Tensor) -> tuple[Tensor, Any]
reveal_type(ad.checkpoint(parts))  # def (x: Tensor) -> dict[str, Tensor]

reveal_type(ad.jacrev(parts))  # def (x: Tensor) -> Any
reveal_type(ad.jacrev(named, has_aux=True, chunk_size=8))  # def (w: Tensor, x: Tensor) -> tuple[Any, str]
reveal_type(ad.jacfwd(named, has_aux=True, wrt="w"))  # def (w: Tensor, x: Tensor) -> tuple[Any, str]
reveal_type(ad.jacobian(named, has_aux=True, mode="forward"))  # def (w: Tensor, x: Tensor) -> tuple[Any, str]
reveal_type(ad.hessian(loss))  # def (w: Tensor, x: Tensor) -> Any
reveal_type(ad.hessian(named, has_aux=True, mode="auto"))  # def (w: Tensor, x: Tensor) -> tuple[Any, str]
reveal_type(ad.hessian_trace(loss))  # def (w: Tensor, x: Tensor) -> Any

reveal_type(ad.vjp(parts, x))  # tuple[dict[str, Tensor], def (*Any, **Any) -> Any]
reveal_type(ad.vjp(named, w, x, has_aux=True))  # tuple[Tensor, def (*Any, **Any) -> Any, str]
reveal_type(ad.vjp(named, w, x, has_aux=flag))  # tuple[Any, ...]
reveal_type(ad.jvp(parts, (x,), (x,)))  # tuple[dict[str, Tensor], dict[str, Tensor]]
reveal_type(ad.jvp(named, (w, x), (w, x), has_aux=True))  # tuple[Tensor, Tensor, str]
reveal_type(ad.hvp(loss, (w, x), (w, x)))  # tuple[Tensor, Any]
reveal_type(ad.hvp(named, (w, x), (w, x), has_aux=True))  # tuple[Tensor, Any, str]
reveal_type(ad.linearize(parts, x))  # tuple[dict[str, Tensor], def (*Any, **Any) -> dict[str, Tensor]]


@ad.custom_vjp
def clipped(x: Tensor, limit: float) -> Tensor:
    return x.clamp(-limit, limit)


def backward(limit: float, cotangent: Tensor) -> tuple[Tensor, None]:
    return cotangent.clamp(-limit, limit), None


reveal_type(clipped)  # CustomVjp[[x: Tensor, limit: float], Tensor]
reveal_type(clipped(x, limit=1.0))  # Tensor
clipped.defvjp(lambda x, limit: (x, limit), backward)
clipped.defvjp(parts, backward)  # arg-type
clipped(x)  # call-arg


@ad.custom_jvp(nondiff_argnums=("power",))
def to_power(x: Tensor, power: int) -> Tensor:
    return x**power


@to_power.defjvp
def rule(power: int, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    return to_power(primals[0], power), power * primals[0] ** (power - 1) * tangents[0]


reveal_type(to_power(x, 2))  # Tensor

per_sample = ad.per_sample(ad.hessian(loss), in_dims=(None, 0), on_error="nan")
reveal_type(per_sample)  # PerSample
reveal_type([chunk.samples for chunk in per_sample.stream(w, x)])  # list[slice[Any, Any, Any]]

ad.grad(loss, wrt=1)  # call-overload
ad.hessian(loss)(w)  # call-arg
