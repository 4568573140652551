"""A composition: a program, layers around it from the inside out, arguments, and the mode it is called in."""

from __future__ import annotations

import itertools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from soak import stage
from soak.containers import Draw, Tree, active, active_leaves, argument, mapped
from soak.layers import batched, by_argnums, by_primals, legacy, torch_grad
from soak.operations import Fuse, World
from soak.programs import Program, program
from soak.stage import NAMES, Layer, Stage, alike

if TYPE_CHECKING:
    from collections.abc import Callable

    from soak.reference import Calculus, Func

# What a composition may cost, in rows that the reference pulls by the order of the derivative (graphs of
# the fifth take seconds), and in numbers of the result.
MOST_ROWS, MOST_NUMBERS = {0: 64, 1: 64, 2: 64, 3: 64, 4: 16}, 200
DEPTHS = {1: 25, 2: 42, 3: 28, 4: 5}
MODES = {"grad": 6, "no_grad": 2, "inference_mode": 2}

SCALAR = ("grad", "value_and_grad", "grad_and_value", "hvp", "torch.func.grad")
LEGACY_SCALAR = ("functional.hessian", "functional.vhp", "functional.hvp")
LEGACY = ("functional.vjp", "functional.jvp", "functional.jacobian", *LEGACY_SCALAR)
MAKERS: dict[str, tuple[Callable[[Stage, str], Layer], float]] = {
    "grad": (by_argnums, 2),
    "value_and_grad": (by_argnums, 1),
    "grad_and_value": (by_argnums, 1),
    "vjp": (by_primals, 2),
    "jvp": (by_primals, 2),
    "linearize": (by_primals, 2),
    "jacrev": (by_argnums, 2),
    "jacfwd": (by_argnums, 2),
    "jacobian": (by_argnums, 2),
    "hessian": (by_argnums, 3),
    "hvp": (by_primals, 2),
    "vmap": (batched, 5),
    "torch.func.grad": (torch_grad, 0.5),
    "torch.func.vmap": (batched, 0.5),
    **dict.fromkeys(LEGACY, (legacy, 0.7)),
}


@dataclass
class Composition:
    program: Program
    layers: list[Layer]
    needs: list[Callable[[Func], Func]]
    args: tuple[Tree, ...]
    mode: str
    by_keyword: int = 0
    tracked: list[Tensor] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The transforms, from the outside in."""
        return [layer.name for layer in reversed(self.layers)]

    @property
    def modes(self) -> str:
        return "".join(layer.modes for layer in reversed(self.layers))

    @property
    def rows(self) -> int:
        return _product(layer.rows for layer in self.layers)

    def __str__(self) -> str:
        described = [f"{layer.name}({layer.options})" for layer in reversed(self.layers)]
        steps = ", ".join(step.name for step in self.program.steps)
        return f"{' of '.join(described)} of [{steps}] under {self.mode}, arguments {self.args}"

    def context(self) -> AbstractContextManager[Any]:
        """The mode that the library is called in; none where that is what torch starts with."""
        return nullcontext() if self.mode == "grad" else getattr(torch, self.mode)()

    def library(self, fuse: Fuse) -> Callable[[], Tree]:
        """The call of the library, for `context`; what is between layers may raise too."""
        func = _named(self.program, World(fuse.tick, library=True), len(self.args))
        for need, layer in zip(self.needs, self.layers, strict=True):
            func = layer.lift(_ticking(need(func), fuse))
        split = len(self.args) - self.by_keyword
        kwargs = dict(zip(NAMES[split:], self.args[split:], strict=False))

        return lambda: func(*self.args[:split], **kwargs)

    def expected(self, calculus: Calculus) -> Tree:
        """What plain PyTorch gives."""
        func = _named(self.program, World.plain(), len(self.args))
        for need, layer in zip(self.needs, self.layers, strict=True):
            func = layer.refer(calculus, need(func))
        return func(*mapped(_outside_inference, self.args))


def _outside_inference(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def _product(numbers: Any) -> int:
    total = 1
    for one in numbers:
        total *= max(one, 1)
    return total


def _named(program: Program, world: World, count: int) -> Func:
    """The program as a function whose parameters have names."""
    return {
        1: lambda a: program(world, a),
        2: lambda a, b: program(world, a, b),
        3: lambda a, b, c: program(world, a, b, c),
    }[count]


def _ticking(func: Func, fuse: Fuse) -> Func:
    def body(*args: Tree, **kwargs: Tree) -> Tree:
        fuse.tick()
        output = func(*args, **kwargs)
        fuse.tick()
        return output

    return alike(func, body)


# Drawn.


def compose(seed: int, index: int) -> Composition:
    """The composition of that number, small enough for the reference."""
    depth = Draw(f"{seed}/{index}/depth").weighted(DEPTHS)
    attempts = (_draw(Draw(f"{seed}/{index}/{attempt}"), depth) for attempt in itertools.count())
    return next(drawn for drawn in attempts if drawn is not None)


def _is_large(drawn: list[Layer]) -> bool:
    order = sum(layer.order for layer in drawn)
    rows = _product(layer.rows for layer in drawn)
    return rows > MOST_ROWS.get(order, 0) or drawn[-1].size > MOST_NUMBERS


def _draw(draw: Draw, depth: int) -> Composition | None:
    """A random composition, or None if it is too large."""
    names = _names(draw, depth)
    args = tuple(argument(draw) for _ in range(draw.weighted({1: 5, 2: 3, 3: 1})))
    mode = draw.weighted(MODES)
    random = draw.chance(0.15)
    size, kept = 4, args
    drawn: list[Layer] = []
    needs: list[Callable[[Func], Func]] = []
    for place, name in enumerate(names):
        need = _need(draw, name, size)
        needs.append(need)
        size = {stage.number: 1, stage.pair: 2}.get(need, size)
        outermost = place == depth - 1
        layer = MAKERS[name][0](Stage(draw, args, size, outermost, random), name)
        drawn.append(layer)
        args, size = layer.args or args, layer.size
    if _is_large(drawn):
        return None
    if mode == "inference_mode" and any(name.startswith("torch.func") for name in names):
        mode = "no_grad"  # torch's own transforms do not leave that mode
    parameters = draw.chance(0.25)
    if parameters and mode == "grad" and draw.chance(0.4):
        args = mapped(lambda leaf: leaf.requires_grad_() if active(leaf) else leaf, args)
    if mode == "inference_mode" and draw.chance(0.3):
        with torch.inference_mode():
            args = mapped(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, args)
    tracked = any(leaf.requires_grad for leaf in active_leaves(args))
    without = _without(drawn, random=random, parameters=parameters, tracked=tracked)
    func = program(draw, kept, without, scalar=False)
    by_keyword = draw.integer(0, len(args)) if all(layer.keywords for layer in drawn) else 0
    watched = [] if mode != "grad" or drawn[-1].detaches else _tracked(func, args)
    return Composition(func, drawn, needs, args, mode, by_keyword, watched)


def _tracked(func: Program, args: tuple[Tree, ...]) -> list[Tensor]:
    return [*func.tracked, *(leaf for leaf in active_leaves(args) if leaf.requires_grad)]


def _names(draw: Draw, depth: int) -> list[str]:
    """From the inside out; torch.autograd.functional's stand at one of the ends."""
    chances = {name: chance for name, (_, chance) in MAKERS.items()}
    ends = [draw.weighted(chances) for _ in range(depth)]
    between = {name: chance for name, chance in chances.items() if name not in LEGACY}
    for i in range(1, depth - 1):
        ends[i] = draw.weighted(between)
    return ends


def _need(draw: Draw, name: str, size: int) -> Callable[[Func], Func]:
    """What the layer needs, or what keeps results small."""
    if name in SCALAR or name in LEGACY_SCALAR:
        return stage.number
    if name == "functional.vjp":
        return stage.pair
    if name.startswith(("functional", "torch.func")):
        return stage.tensors
    if name == "hessian" and draw.chance(0.6):
        return stage.number
    return stage.pair if draw.chance(0.8 if size > 8 else 0.2) else _as_it_is


def _as_it_is(func: Func) -> Func:
    """The function as it is."""
    return func


def _without(drawn: list[Layer], *, random: bool, parameters: bool, tracked: bool) -> set[str]:
    """Kinds of operations that cannot be in what is drawn, for what torch cannot do or does wrong."""
    names = [layer.name for layer in drawn]
    modes = "".join(layer.modes for layer in reversed(drawn))
    forward = "f" in modes
    # These may take the pullback of a pullback for one derivative, and what is tracked takes one more.
    order = (
        len(modes) + sum(name in ("linearize", "jacobian", "functional.jvp") for name in names) + parameters
    )
    legal = {
        "random": random,
        "parameter": parameters,
        # What they do is not the derivative of anything, and only one pullback sees it as it is. A batched tensor has no
        # hooks, and no pull from outside a level reaches those inside.
        "function": parameters and modes == "r" and not any("functional" in name for name in names),
        "hook": parameters
        and modes == "r"
        and not tracked
        and not any("functional" in n or "vmap" in n for n in names),
        # "Operations without a rule": a jvp eagerly, differentiated by a parameter in a closure.
        "softmax": not (forward and parameters),
        # "Silently wrong in torch": the third derivative in reverse mode.
        "layer_norm": order < 3,
        # Attention differentiated twice unannounced: by a parameter in a closure, or by torch.func inside.
        "attention": not parameters and not any(name.startswith("torch.func") for name in names),
        # torch refuses to write to a dual tensor whose tangent is not batched while its primal is, or is zero.
        "in place": not forward or (modes.count("f") == 1 and not any("vmap" in name for name in names)),
    }
    return {kind for kind, allowed in legal.items() if not allowed}
