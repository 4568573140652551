"""Calls to be interrupted, and what an interrupt might leave behind.

Each call gives a tree of tensors, the same every time.
"""

from __future__ import annotations

import tempfile
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import autodiff as ad
from autodiff import functional
from autodiff._torch import forward_level, silenced_fallback_warning
from autodiff._torch.thread_state import thread
from autodiff.core import tape
from autodiff.torch_fixes.attention import plain_attention
from conftest import state_of_torch

X = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
T = torch.tensor([1.0, -2.0, 0.25], dtype=torch.float64)
WEIGHT = torch.tensor([1.0, 3.0, -0.5], dtype=torch.float64, requires_grad=True)
BATCH = torch.stack([X, T, X + T])
LINEAR = nn.Linear(3, 1, dtype=torch.float64)

Scalar = Callable[[Tensor], Tensor]
Call = Callable[[], Any]


def cubic(x: Tensor) -> Tensor:
    return (x**3).sum() + x.prod()


# Functions that a rule, a mode or a fix of the library has to do with.


def normed(x: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape).pow(3).sum()


def attended(x: Tensor) -> Tensor:
    rows = torch.outer(x, x).unsqueeze(0)
    return nn.functional.scaled_dot_product_attention(rows, rows, rows).sum()


def captured(x: Tensor) -> Tensor:
    return (WEIGHT * x**3).sum()


@ad.checkpoint
def checkpointed(x: Tensor) -> Tensor:
    return (nn.functional.dropout(x, 0.5).sin() * x**2 * WEIGHT).sum()


class Cube(torch.autograd.Function):
    """A Function with all rules."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * cotangent

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * tangent


def of_function(x: Tensor) -> Tensor:
    return Cube.apply(x).sum()


@ad.custom_vjp
def sines(x: Tensor) -> Tensor:
    return x.sin()


@ad.custom_jvp
def cosines(x: Tensor) -> Tensor:
    return x.cos()


sines.defvjp(lambda x: (x.sin(), x), lambda x, c: (x.cos() * c,))
cosines.defjvps(lambda t, _, x: -x.sin() * t)


def of_rules(x: Tensor) -> Tensor:
    return (sines(x) * cosines(x)).sum()


def of_module(x: Tensor) -> Tensor:
    return ad.functional_call(LINEAR, {"weight": x.unsqueeze(0)}, (T,)).sum()


FUNCTIONS: dict[str, Scalar] = {
    one.__name__: one
    for one in (cubic, normed, attended, captured, checkpointed, of_function, of_rules, of_module)
}
# Each takes a scalar function of a vector to another.
WRAPPERS: dict[str, Callable[[Scalar], Scalar]] = {
    "grad": lambda f: lambda x: ad.grad(f)(x).sum(),
    "vjp": lambda f: lambda x: ad.vjp(f, x)[1](torch.ones((), dtype=x.dtype))[0].sum(),
    "jvp": lambda f: lambda x: ad.jvp(f, (x,), (T,))[1],
    "linearize": lambda f: lambda x: ad.linearize(f, x)[1](T),
    "vmap": lambda f: lambda x: ad.vmap(f, randomness="same")(torch.stack([x, x])).sum(),
    "jacrev": lambda f: lambda x: ad.jacrev(f)(x).sum(),
    "jacfwd": lambda f: lambda x: ad.jacfwd(f, randomness="same")(x).sum(),
    "hessian": lambda f: lambda x: ad.hessian(f)(x).sum(),
    "hvp": lambda f: lambda x: ad.hvp(f, (x,), (T,))[1].sum(),
}
# Those that stand outside alone.
OUTER: dict[str, Callable[[Scalar], Call]] = {
    "functional.vjp": lambda f: partial(functional.vjp, f, X),
    "functional.jvp": lambda f: partial(functional.jvp, f, X, T),
    "functional.hvp": lambda f: partial(functional.hvp, f, X, T),
    "functional.vhp": lambda f: partial(functional.vhp, f, X, T),
    "functional.jacobian": lambda f: partial(functional.jacobian, f, X),
    "functional.hessian": lambda f: partial(functional.hessian, f, X),
    "hessian_diagonal": lambda f: partial(ad.hessian_diagonal(f), X),
    "jacobian": lambda f: partial(ad.jacobian(f), X),
    "operators.jacobian": lambda f: lambda: ad.operators.jacobian(f)(X) @ T,
    "operators.hessian": lambda f: lambda: ad.operators.hessian(f)(X) @ torch.stack([T, X], 1),
}


def _seeded(call: Call) -> Any:
    torch.manual_seed(3)
    return call()


def _streamed() -> Any:
    return [chunk.result for chunk in ad.per_sample(ad.grad(cubic), chunk_size=2).stream(BATCH)]


def _written() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        ad.per_sample(ad.grad(cubic), chunk_size=2).map(None, BATCH, out=Path(folder) / "out")
        return torch.ones(len(list(Path(folder).iterdir())))


def calls() -> dict[str, Call]:
    """Every call by its name."""
    found: dict[str, Call] = {}
    for name, func in FUNCTIONS.items():
        found |= {f"{outer}({name})": partial(wrap(func), X) for outer, wrap in WRAPPERS.items()}
        found |= {f"{outer}({name})": wrap(func) for outer, wrap in OUTER.items()}
    for outer, wrap in WRAPPERS.items():
        found |= {f"{outer}({n}(cubic))": partial(wrap(inner(cubic)), X) for n, inner in WRAPPERS.items()}
        found[f"{outer}(grad(of_function))"] = partial(wrap(WRAPPERS["grad"](of_function)), X)
        found[f"{outer}(hvp(of_rules))"] = partial(wrap(WRAPPERS["hvp"](of_rules)), X)
        found[f"{outer}(grad(checkpointed))"] = partial(wrap(WRAPPERS["grad"](checkpointed)), X)
    found["per_sample"] = partial(ad.per_sample(ad.grad(cubic), chunk_size=2), BATCH)
    found["per_sample(memory)"] = partial(ad.per_sample(ad.grad(cubic), memory="1MiB"), BATCH)
    found["per_sample.stream"] = _streamed
    found["per_sample(out)"] = _written
    found["vmap(auto)"] = partial(ad.vmap(attended, chunk_size="auto"), BATCH)
    return {name: partial(_seeded, call) for name, call in found.items()}


def state() -> dict[str, Any]:
    """Everything that is switched, taken or counted while a transform runs."""
    return state_of_torch() | {
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "in-place requires_grad": torch._C._functorch.get_inplace_requires_grad_allowed(),
        "warning filters": tuple(warnings.filters),
        "threads": sum("forward-AD" in one.name for one in threading.enumerate()),
        "pushes": (thread.pushes, thread.hidden, len(thread.__dict__.keys() - {"pushes", "hidden"})),
        "users of the forward-mode level": (
            forward_level.dual_level._users,
            forward_level.dual_level.owned,
            forward_level.dual_level._lock.locked(),
        ),
        "recordings": tape._thread.recording,
        "switches": [
            (one._users, one._lock.locked()) for one in (plain_attention, silenced_fallback_warning)
        ],
    }
