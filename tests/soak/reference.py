"""Derivatives of plain functions of trees, by raw autograd row by row, or by differences.

A calculus differentiates functions from vectors to vectors; the rest is putting trees around them.
Nothing here calls autodiff or torch.func.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from scenarios import difference
from soak.containers import DTYPE, Tree, active_leaves, filled, mapped, ravel, unravel, weights_like

Func = Callable[..., Tree]
Vector = Callable[[Tensor], Tensor]
Positions = int | tuple[int, ...]


class Calculus(Protocol):
    def jacobian(self, func: Vector, x: Tensor) -> Tensor: ...

    def slope(self, func: Vector, x: Tensor, direction: Tensor) -> Tensor: ...


class Rows:
    """One torch.autograd.grad for each number of the output, with a graph that the next one outside reads."""

    def jacobian(self, func: Vector, x: Tensor) -> Tensor:
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        with torch.enable_grad():
            y = func(x)
            return torch.stack([self._row(one, x) for one in y]) if len(y) else x.new_zeros(0, len(x))

    def _row(self, number: Tensor, x: Tensor) -> Tensor:
        if not number.requires_grad:
            return torch.zeros_like(x)
        (row,) = torch.autograd.grad(number, x, create_graph=True, allow_unused=True)
        return torch.zeros_like(x) if row is None else row

    def slope(self, func: Vector, x: Tensor, direction: Tensor) -> Tensor:
        return self.jacobian(func, x) @ direction


class Differences:
    """Central differences of sixth order."""

    def __init__(self, step: float) -> None:
        self._step = step

    def jacobian(self, func: Vector, x: Tensor) -> Tensor:
        basis = torch.eye(len(x), dtype=DTYPE)
        return torch.stack([self.slope(func, x, e) for e in basis], -1) if len(x) else func(x)[:, None][:, :0]

    def slope(self, func: Vector, x: Tensor, direction: Tensor) -> Tensor:
        return difference(func, x, direction, self._step)


class DifferencesOverRows:
    """Differences for the outermost derivative, raw autograd for those inside: for any order."""

    def __init__(self, step: float) -> None:
        self._outer, self._inner = Differences(step), Rows()
        self._inside = False

    def jacobian(self, func: Vector, x: Tensor) -> Tensor:
        return self._inner.jacobian(func, x) if self._inside else self._outer.jacobian(self._under(func), x)

    def slope(self, func: Vector, x: Tensor, direction: Tensor) -> Tensor:
        if self._inside:
            return self._inner.slope(func, x, direction)
        return self._outer.slope(self._under(func), x, direction)

    def _under(self, func: Vector) -> Vector:
        def inside(x: Tensor) -> Tensor:
            self._inside = True
            try:
                return func(x).detach()
            finally:
                self._inside = False

        return inside


class _Flat:
    """A call of a function of trees, as a function of the vector of its selected arguments."""

    def __init__(self, func: Func, args: tuple[Tree, ...], positions: Positions) -> None:
        self._func, self._args, self._positions = func, args, positions
        self.selected = args[positions] if isinstance(positions, int) else tuple(args[i] for i in positions)
        self.x = ravel(self.selected)
        self.output: Tree = None

    def __call__(self, x: Tensor) -> Tensor:
        selected = filled(self.selected, unravel(x, self.selected), keep=True)
        args = list(self._args)
        if isinstance(self._positions, int):
            args[self._positions] = selected
        else:
            for position, arg in zip(self._positions, selected, strict=True):
                args[position] = arg
        self.output = self._func(*args)
        return ravel(self.output)


def jacobian(calculus: Calculus, func: Func, positions: Positions) -> Func:
    """A tree like the output that holds trees like the arguments that hold blocks."""

    def derived(*args: Tree) -> Tree:
        flat = _Flat(func, args, positions)
        matrix = calculus.jacobian(flat, flat.x)
        rows = unravel(matrix.mT, flat.output)  # [*in, *out] of each output
        outputs = active_leaves(flat.output)
        pairs = zip(rows, outputs, strict=True)
        return filled(flat.output, [_blocks(row, output.dim(), flat.selected) for row, output in pairs])

    return derived


def _blocks(row: Tensor, dims: int, selected: Tree) -> Tree:
    last = row.movedim(0, -1)  # [*out, in]
    assert last.dim() == dims + 1
    return filled(selected, unravel(last, selected))


def gradient(calculus: Calculus, func: Func, positions: Positions) -> Func:
    """A tree like the arguments, for a function of one number."""

    def derived(*args: Tree) -> Tree:
        flat = _Flat(func, args, positions)
        return filled(flat.selected, unravel(calculus.jacobian(flat, flat.x)[0], flat.selected))

    return derived


def pulled(calculus: Calculus, func: Func, cotangents: Callable[[Tree], Tree] = weights_like) -> Func:
    """The tuple of cotangents of all arguments."""

    def against(*args: Tree) -> Tensor:
        output = func(*args)
        return ravel(output) @ ravel(cotangents(output))

    return lambda *args: gradient(calculus, against, tuple(range(len(args))))(*args)


def pushed(calculus: Calculus, func: Func, tangents: Callable[[Tree], Tree] = weights_like) -> Func:
    """The tangents of the output, along all arguments."""

    def derived(*args: Tree) -> Tree:
        flat = _Flat(func, args, tuple(range(len(args))))
        slope = calculus.slope(flat, flat.x, ravel(tangents(args)))
        return filled(flat.output, unravel(slope, flat.output))

    return derived


def looped(func: Func, dims: Tree, size: int, out_dim: int) -> Func:
    """A function of samples, one after the other; ``dims`` says for each argument's leaves where they are."""

    def batched(*args: Tree) -> Tree:
        results = [func(*_sample(args, dims, number)) for number in range(size)]
        columns = iter(zip(*map(active_leaves, results), strict=True))
        return filled(results[0], [torch.stack(column, out_dim) for column in columns])

    return batched


def _sample(args: tuple[Tree, ...], dims: list[int | None], number: int) -> tuple[Tree, ...]:
    where = iter(dims)

    def one(leaf: Any) -> Any:
        dim = next(where)
        return leaf if dim is None else leaf.select(dim, number)

    return mapped(one, args)
