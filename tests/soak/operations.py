"""Smooth operations of torch, each drawn for the shapes that it is to read.

A table gives for each its kind (what compositions may have to leave out), whether it fits some shapes,
and how to make it, constants and all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import autodiff as ad
from soak.containers import DTYPE, Draw, Shape

Operation = Callable[..., Tensor]


class Fuse:
    """Counts the places where it was asked, and raises at one of them and ever after."""

    def __init__(self, error: BaseException | None = None, at: int = 0) -> None:
        self.error, self.at, self.count = error, at, 0

    def tick(self) -> None:
        self.count += 1
        if self.error is not None and self.count >= self.at:
            raise self.error


@dataclass
class World:
    """What a run of a program may ask of its surroundings."""

    tick: Callable[[], None]
    library: bool

    @staticmethod
    def plain() -> World:
        """Where the reference runs: nothing raises, and nothing of autodiff is called."""
        return World(lambda: None, library=False)


# How a layer is reached: what holds it, and how it is taken from there.
HOLDERS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[Any], nn.Module]]] = {
    "itself": (lambda layer: layer, lambda held: held),
    "list": (lambda layer: [layer], lambda held: held[0]),
    "closure": (lambda layer: lambda: layer, lambda held: held()),
    "object": (lambda layer: SimpleNamespace(layer=[layer]), lambda held: held.layer[0]),
    "array": (lambda layer: np.array([None, layer], dtype=object), lambda held: held[1]),
    "weak dictionary": (lambda layer: WeakValueDictionary({"a": layer}), lambda held: held["a"]),
    "much data": (lambda layer: [layer, *range(2000)], lambda held: held[0]),
}


class Layer(nn.Module):
    """A layer that may raise, and finds another in one of several ways."""

    def __init__(self, size: int, *, holder: str) -> None:
        super().__init__()
        hold, self.take = HOLDERS[holder]
        self.inner = nn.Linear(size, size, dtype=DTYPE)
        self.held = hold(self.inner)
        if holder == "much data":
            self.data = [
                [k] for k in range(2000)
            ]  # is not searched, so that a call of another layer is an error

    def forward(self, x: Tensor, tick: Callable[[], None]) -> Tensor:
        tick()
        return self.take(self.held)(x).tanh()


def _square(draw: Draw, size: int) -> Tensor:
    """A well-conditioned matrix."""
    return 3 * torch.eye(size, dtype=DTYPE) + 0.3 * draw.normal((size, size))


# Shapes.


def _any(shape: Shape) -> bool:
    return True


def _rows(shape: Shape) -> bool:
    return len(shape) >= 1


def _wide(shape: Shape) -> bool:
    return len(shape) >= 1 and shape[-1] >= 2


def _matrix(shape: Shape) -> bool:
    return len(shape) == 2


def _vector(shape: Shape) -> bool:
    return len(shape) == 1


def _wide_vector(shape: Shape) -> bool:
    return _vector(shape) and _wide(shape)


# Makers, of a draw, the shape, and the list of captured parameters.


def _plain(func: Callable[[Tensor], Tensor]) -> Callable[..., Operation]:
    """An operation without constants."""
    return lambda draw, shape, tracked: lambda _, x: func(x)


def _scaled(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    c = draw.normal(shape)
    return lambda _, x: (1 + c) * x


def _affine(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    c = draw.normal((shape[-1], draw.integer(1, 3)))
    return lambda _, x: x @ c


def _contracted(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    c = draw.normal((draw.integer(1, 2), shape[0], shape[1]))
    return lambda _, x: torch.einsum("ij,kij->ki", x, c)


def _outer(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    c = draw.normal((2,))
    return lambda _, x: torch.einsum("i,j->ij", x, c)


def _picked(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    at: Any = draw.pick([0, -1, slice(None, None, 2), [0, -1, 0], slice(0, 1)])
    return lambda _, x: x[..., at]


def _stacked(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    dim = draw.integer(-1, 0)
    return lambda _, x: torch.stack([x, x.sin()], dim)


def _where(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    mask = draw.normal(shape) > 0
    return lambda _, x: torch.where(mask, x.cos(), 0.5 * x)


def _normed(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    weight, bias = draw.normal(shape[-1:]), draw.normal(shape[-1:])

    def operation(world: World, x: Tensor) -> Tensor:
        # A large eps: the function has to be smooth enough for differences.
        if world.library:
            return functional.layer_norm(x, x.shape[-1:], weight, bias, eps=0.5)
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 0.5).sqrt() * weight + bias

    return operation


def _solved(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    matrix, right = _square(draw, shape[-1]), draw.normal((shape[-1],))

    def operation(_: World, x: Tensor) -> Tensor:
        return torch.linalg.solve(matrix + torch.diag_embed(x.sin()), (right + x.cos()).unsqueeze(-1))[..., 0]

    return operation


def _logdet(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    matrix = _square(draw, shape[-1])
    return lambda _, x: torch.linalg.slogdet(matrix + torch.diag_embed(x.sin())).logabsdet


def _in_place(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    c = draw.normal(shape)

    def operation(_: World, x: Tensor) -> Tensor:
        fresh = x.clone()
        fresh.mul_(c).add_(x).sin_()
        return fresh

    return operation


def _copied(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    def operation(_: World, x: Tensor) -> Tensor:
        fresh = x.new_zeros(x.shape)
        fresh.copy_(x)
        fresh *= 1 + x
        return fresh

    return operation


def _written(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    def operation(_: World, x: Tensor) -> Tensor:
        fresh = 2 * x
        fresh[..., 0] = x[..., -1].sin() + 1
        fresh[..., -1].mul_(0.5)
        return fresh

    return operation


def _without_grad(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    c = draw.normal(shape)

    def operation(_: World, x: Tensor) -> Tensor:
        # Constants only: what of x is computed here, reverse mode does not see, and forward mode does.
        with torch.no_grad():
            scale = (c * len(x.shape)).cos()
        return x * scale

    return operation


def _branched(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    def operation(_: World, x: Tensor) -> Tensor:
        if x.dim() == 0:
            return x * x
        for row in range(x.shape[0]):
            x = x + x[row].cos() / (1 + row)
        return x if x.numel() < 3 else x.sum(0)

    return operation


def _parametrised(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    parameter = draw.normal(draw.pick([(), shape])).requires_grad_()
    tracked.append(parameter)
    return lambda _, x: (x * parameter).sin() + parameter


def _with_history(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    parameter = draw.normal(draw.pick([(), shape])).requires_grad_()
    tracked.append(parameter)
    state: Tensor = parameter
    for _ in range(300):  # sums alone, whose graph can be pulled back any number of times
        state = state + 1e-3
    return lambda _, x: (x * state).sin()


def _hooked(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    parameter = draw.normal(()).requires_grad_()
    tracked.append(parameter)

    def operation(_: World, x: Tensor) -> Tensor:
        y = x.sin()
        if y.requires_grad:
            y.register_hook(lambda cotangent: cotangent * parameter.cos())
        return y

    return operation


def _by_function(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    parameter = draw.normal(()).requires_grad_()
    tracked.append(parameter)

    class Captures(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.sin()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, cotangent: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return cotangent * x.cos() * parameter.cos()

    return lambda _, x: Captures.apply(x)


def _legacy_inside(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    name = draw.pick(["vjp", "jvp"])

    def operation(world: World, x: Tensor) -> Tensor:
        if not world.library:
            return x.sin() + x * x.cos()
        product = getattr(ad.functional, name)
        return product(lambda y: y * y.sin(), x, torch.ones_like(x), create_graph=True)[1]

    return operation


def _overlapping(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    def operation(world: World, x: Tensor) -> Tensor:
        windows = x.unfold(-1, 2, 1)
        if not world.library:
            return windows.cos()
        return ad.jvp(torch.sin, (windows,), (torch.ones_like(windows),))[1]

    return operation


def _noisy(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    # Random numbers that do not show, so that the result can be checked.
    return lambda _, x: x + 0 * torch.rand_like(x)


def _attended(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    key = draw.normal((1, 1, 2, shape[1]))

    def operation(_: World, x: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(x[None, None], key, key.sin())[0, 0]

    return operation


def _module(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    size = shape[-1]
    layer = Layer(size, holder=draw.pick([*HOLDERS])).requires_grad_(False)
    weight = draw.normal((size, size))

    def operation(world: World, x: Tensor) -> Tensor:
        bias = x.reshape(-1, size)[0]
        if not world.library:
            return functional.linear(x, weight, bias).tanh()
        return ad.functional_call(layer, {"inner.weight": weight, "inner.bias": bias}, (x, world.tick))

    return operation


def _checkpointed(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    c = draw.normal(shape)
    captured = draw.chance(0.5)

    def operation(world: World, x: Tensor) -> Tensor:
        again = ad.checkpoint if world.library else _as_it_is

        def outer(y: Tensor) -> Tensor:
            inner = again(lambda z: (c + z).sin() * (x if captured else z))
            return inner(y).cos() * y

        return again(outer)(x)

    return operation


def _as_it_is(func: Operation) -> Operation:
    return func


def _checkpointed_layer(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    """A layer whose kernels differ under vmap, in a checkpoint, with a transform inside or none."""
    size = shape[-1]
    weight, bias = draw.normal((size, size)), draw.normal((size,))
    inside = draw.pick(["nothing", "jvp", "grad per sample"])

    def slopes(world: World, x: Tensor) -> Tensor:
        """Those of sin."""
        if not world.library or inside == "nothing":
            return x.cos()
        if inside == "jvp":
            return ad.jvp(torch.sin, (x,), (torch.ones_like(x),))[1]
        return ad.vmap(ad.grad(torch.sin))(x.reshape(-1)).view(x.shape)

    def operation(world: World, x: Tensor) -> Tensor:
        again = ad.checkpoint if world.library else _as_it_is
        return again(lambda x: slopes(world, functional.linear(x.tanh(), weight, bias)) * x)(x)

    return operation


def _by_bwd(value: Operation, slope: Operation) -> Operation:
    f = ad.custom_vjp(value)
    f.defvjp(lambda x: (value(x), x), lambda x, c: (slope(x, c),))
    return f


def _by_rule(value: Operation, slope: Operation) -> Operation:
    f = ad.custom_jvp(value)
    f.defjvp(lambda primals, tangents: (f(primals[0]), slope(primals[0], tangents[0])))
    return f


def _ruled(draw: Draw, shape: Shape, tracked: list[Tensor]) -> Operation:
    """A custom rule; where its graph does not show that it is linear, it is compared with its transpose."""
    c = draw.normal(shape)
    by, masked = draw.pick([_by_bwd, _by_rule]), draw.chance(0.5)

    def slope(x: Tensor, v: Tensor) -> Tensor:
        slopes = c * x.cos()
        return torch.where(c > 0, slopes * v, v * slopes) if masked else slopes * v

    ruled = by(lambda x: c * x.sin(), slope)
    return lambda world, x: ruled(x) if world.library else c * x.sin()


UNARY: dict[str, tuple[str, Callable[[Shape], bool], Callable[..., Operation]]] = {
    "sin": ("", _any, _plain(torch.sin)),
    "tanh": ("", _any, _plain(torch.tanh)),
    "sigmoid": ("", _any, _plain(torch.sigmoid)),
    "exp": ("", _any, _plain(lambda x: x.tanh().exp())),
    "square": ("", _any, _plain(lambda x: 0.5 * x * x)),
    "power": ("", _any, _plain(lambda x: (1 + x.sin() ** 2) ** 1.5)),
    "rational": ("", _any, _plain(lambda x: x / (1 + x * x))),
    "norm": ("", _any, _plain(lambda x: (1 + (x * x).sum()).sqrt())),
    "scale": ("", _any, _scaled),
    "affine": ("", _rows, _affine),
    "einsum": ("", _matrix, _contracted),
    "outer": ("", _vector, _outer),
    "sum": ("", _rows, _plain(lambda x: x.sum(-1))),
    "mean": ("", _rows, _plain(lambda x: x.mean(0, keepdim=True))),
    "cumsum": ("", _wide, _plain(lambda x: x.cumsum(-1))),
    "softmax": ("softmax", _wide, _plain(lambda x: x.softmax(-1))),
    "log_softmax": ("softmax", _wide, _plain(lambda x: x.log_softmax(-1))),
    "logsumexp": ("softmax", _wide, _plain(lambda x: x.logsumexp(-1))),
    "index": ("", _rows, _picked),
    "flip": ("", _wide, _plain(lambda x: x.flip(-1) * x)),
    "stack": ("", _any, _stacked),
    "reshape": ("", _any, _plain(lambda x: x.reshape(-1))),
    "transpose": ("", _matrix, _plain(lambda x: x.mT.cos())),
    "expand": ("", _any, _plain(lambda x: x.unsqueeze(0).expand(2, *x.shape))),
    "where": ("", _any, _where),
    "layer_norm": ("layer_norm", _wide, _normed),
    "solve": ("linalg", _wide_vector, _solved),
    "slogdet": ("linalg", _wide_vector, _logdet),
    "in place": ("in place", _any, _in_place),
    "copy": ("in place", _any, _copied),
    "write": ("in place", _wide, _written),
    "no_grad": ("", _any, _without_grad),
    "branch": ("", _any, _branched),
    "parameter": ("parameter", _any, _parametrised),
    "history": ("parameter", _any, _with_history),
    "hook": ("hook", _any, _hooked),
    "function": ("function", _any, _by_function),
    "functional": ("", _any, _legacy_inside),
    "overlap": ("", _wide, _overlapping),
    "random": ("random", _any, _noisy),
    "attention": ("attention", _matrix, _attended),
    "module": ("", _rows, _module),
    "checkpoint": ("", _any, _checkpointed),
    "checkpointed layer": ("", _rows, _checkpointed_layer),
    "custom rule": ("", _any, _ruled),
}


# Of two.


def _same(one: Shape, other: Shape) -> bool:
    return one == other or () in (one, other)


def _chained(one: Shape, other: Shape) -> bool:
    return _matrix(one) and len(other) in (1, 2) and one[1] == other[0]


def _both(func: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Operation]:
    return lambda draw, one, other, tracked: lambda _, x, y: func(x, y)


def _mixed(draw: Draw, one: Shape, other: Shape, tracked: list[Tensor]) -> Operation:
    mask = draw.normal(one) > 0
    return lambda _, x, y: torch.where(mask, x, y.sin())


BINARY: dict[str, tuple[str, Callable[[Shape, Shape], bool], Callable[..., Operation]]] = {
    "add": ("", _same, _both(lambda x, y: x + y.cos())),
    "mul": ("", _same, _both(torch.mul)),
    "divide": ("", _same, _both(lambda x, y: x / (1 + y * y))),
    "select": ("", _same, _mixed),
    "cat": ("", lambda one, other: True, _both(lambda x, y: torch.cat([x.reshape(-1), y.reshape(-1)]))),
    "dot": ("", lambda one, other: one == other and _vector(one), _both(torch.dot)),
    "matmul": ("", _chained, _both(torch.matmul)),
    "product": ("", lambda one, other: _vector(one) and _vector(other), _both(torch.outer)),
}
