"""How the time of a step grows in a loop whose state keeps its graph, as in a Kalman filter."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

import autodiff

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EARLY, LATE, WINDOW = 50, 1000, 21


class Steps(NamedTuple):
    """Seconds of a step early and late, of autodiff's transform and of torch.func's at the same state."""

    name: str
    early: float
    late: float
    of_torch_func: float | None


def scalar(x: Tensor, state: Tensor) -> Tensor:
    """A number of two vectors."""
    return ((x * state).sin() * x).sum()


def vector(x: Tensor, state: Tensor) -> Tensor:
    """A vector of two."""
    return (x * state).sin() * x


def _vjp(library: Any, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return library.vjp(f, x)[1](torch.ones_like(x))[0]


def _jvp(library: Any, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return library.jvp(f, (x,), (torch.ones_like(x),))[1]


def _linearize(library: Any, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return library.linearize(f, x)[1](torch.ones_like(x))


# From a library, a function and a vector to a vector.
TRANSFORMS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "grad": (scalar, lambda library, f, x: library.grad(f)(x)),
    "vjp": (vector, _vjp),
    "jvp": (vector, _jvp),
    "linearize": (vector, _linearize),
    "jacrev": (vector, lambda library, f, x: library.jacrev(f)(x).sum(0)),
    "jacfwd": (vector, lambda library, f, x: library.jacfwd(f)(x).sum(0)),
    "hessian": (scalar, lambda library, f, x: library.hessian(f)(x).sum(0)),
    "vmap of grad": (scalar, lambda library, f, x: library.vmap(library.grad(f))(x[None])[0]),
}
# What torch.func does not have.
MORE: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "hvp": (scalar, lambda library, f, x: library.hvp(f, (x,), (torch.ones_like(x),))[1]),
    "functional.hvp": (
        scalar,
        lambda library, f, x: library.functional.hvp(f, x, torch.ones_like(x), create_graph=True)[1],
    ),
    "functional.jacobian": (
        vector,
        lambda library, f, x: library.functional.jacobian(f, x, create_graph=True).sum(0),
    ),
}


def measured() -> Iterator[Steps]:
    """Every transform, where the state is captured, is differentiated, and is both."""
    for name, (func, derivative) in {**TRANSFORMS, **MORE}.items():
        yield from (
            _steps(f"{name}, {how}", func, derivative, how, beside=name in TRANSFORMS)
            for how in ("captured", "differentiated", "both")
        )


def _steps(
    name: str, func: Callable[..., Tensor], derivative: Callable[..., Tensor], how: str, *, beside: bool
) -> Steps:
    constant = torch.linspace(0.1, 0.4, 4)
    state = torch.full((4,), 0.5, requires_grad=True) * 1.0
    seconds: list[float] = []
    of_torch_func: list[float] = []
    for _ in range(LATE + WINDOW):
        x, other = {
            "captured": (constant, state),
            "differentiated": (state, constant),
            "both": (state, state),
        }[how]
        run = partial(derivative, f=lambda x, other=other: func(x, other), x=x)
        start = time.perf_counter()
        slope = run(autodiff)
        seconds.append(time.perf_counter() - start)
        state = (0.9 * state + 0.01 * slope).clamp(-1, 1)
    for _ in range(WINDOW if beside else 0):
        start = time.perf_counter()
        run(torch.func)
        of_torch_func.append(time.perf_counter() - start)
    half = WINDOW // 2
    return Steps(
        name,
        statistics.median(seconds[EARLY - half : EARLY + half + 1]),
        statistics.median(seconds[-WINDOW:]),
        statistics.median(of_torch_func) if beside else None,
    )
