"""Random functions: a few smooth operations, one after the other, on the leaves of some trees.

A program is drawn by running it once on plain tensors, so that every operation fits the shapes. It is a
function of the trees in which every captured constant is fixed, and can run as often as one likes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from soak.containers import Draw, Tree, container, leaves, mapped
from soak.operations import BINARY, UNARY, World

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_NUMBERS, LARGEST_NUMBER = 8, 4.0


@dataclass
class Step:
    """One operation, on the registers that it reads."""

    name: str
    reads: tuple[int, ...]
    operation: Callable[..., Tensor]


@dataclass
class Program:
    """Registers are the active leaves; then each step appends one. Outputs are some of the last."""

    steps: list[Step]
    template: Tree
    returns: list[int]
    tracked: list[Tensor] = field(default_factory=list)

    def __call__(self, world: World, *args: Tree) -> Tree:
        registers = entered(args)
        for step in self.steps:
            world.tick()
            registers.append(step.operation(world, *(registers[i] for i in step.reads)))
        world.tick()
        rest = iter(self.returns)
        inside = [None if keep is None else registers[next(rest)] for keep in leaves(self.template)]
        return _placed(self.template, inside)


def _placed(template: Tree, values: list[Any]) -> Tree:
    rest = iter(values)
    return mapped(lambda _: next(rest), template)


def entered(args: tuple[Tree, ...]) -> list[Tensor]:
    """The registers to begin with: active leaves, on which the passive ones after them act."""
    registers: list[Tensor] = [torch.zeros((), dtype=torch.float64)]
    for leaf in leaves(args):
        match leaf:
            case Tensor() if leaf.is_floating_point():
                registers.append(leaf if leaf.numel() else leaf.sum())
            case Tensor():
                last = registers[-1].reshape(-1)
                registers.append(last[leaf % last.numel()])
            case int():
                registers[-1] = registers[-1] / leaf
            case str():
                registers[-1] = getattr(torch, leaf)(registers[-1])
    return registers


def program(draw: Draw, args: tuple[Tree, ...], without: set[str], *, scalar: bool) -> Program:
    """A random program for arguments like these, with none of the operations of a kind in ``without``."""
    world = World.plain()
    registers, steps, tracked = entered(args), [], []
    for _ in range(draw.integer(3, 7)):
        step, result = _step(draw, world, registers, without, tracked)
        steps.append(step)
        registers.append(result)
    count = 1 if scalar else draw.weighted({1: 5, 2: 3, 3: 1})
    returns = _returned(draw, world, registers, steps, count, scalar=scalar)
    template = _template(draw, count)
    return Program(steps, template, returns, tracked)


def _step(
    draw: Draw, world: World, registers: list[Tensor], without: set[str], tracked: list[Tensor]
) -> tuple[Step, Tensor]:
    while True:
        table = UNARY if draw.chance(0.65) or len(registers) < 3 else BINARY
        # What needs care somewhere in the library, and is left out elsewhere, is drawn more often.
        name = draw.weighted({name: 3 if kind else 1 for name, (kind, _, _) in table.items()})
        kind, fits, make = table[name]
        # Register 0 is a constant; late registers are taken more often, so that operations pile up.
        reads = tuple(
            max(draw.integer(1, len(registers) - 1) for _ in range(2)) for _ in range(table is BINARY)
        )
        reads = (max(draw.integer(1, len(registers) - 1) for _ in range(2)), *reads)
        read = [registers[i] for i in reads]
        if kind in without or not fits(*(tuple(r.shape) for r in read)):
            continue
        operation = make(draw, *(tuple(r.shape) for r in read), tracked)
        result = operation(world, *read)
        if 0 < result.numel() <= MOST_NUMBERS and result.dim() < 4 and result.abs().max() < LARGEST_NUMBER:
            return Step(name, reads, operation), result


def _returned(
    draw: Draw, world: World, registers: list[Tensor], steps: list[Step], count: int, *, scalar: bool
) -> list[int]:
    """The last registers, added up where there should be one number, or where they are large."""
    returns = []
    for position in range(len(registers) - 1, len(registers) - 1 - count, -1):
        if not scalar and registers[position].numel() <= 4:
            returns.append(position)
            continue
        weight = draw.normal(tuple(registers[position].shape))
        total = Step("total", (position,), lambda _, x, weight=weight: (x * weight).sum())
        steps.append(total)
        registers.append(total.operation(world, registers[position]))
        returns.append(len(registers) - 1)
    return returns


def _template(draw: Draw, count: int) -> Tree:
    """Where the outputs go: True for one, None for a place that stays empty."""
    places: list[Any] = [True] * count
    if count == 1 and draw.chance(0.6):
        return True
    if draw.chance(0.2):
        places.append(None)
    return container(draw, places)
