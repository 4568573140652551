"""One transform with random options, twice: by the library under test, and by a calculus of `reference`.

A maker draws the options for a `Stage`, and gives a `Layer`, both of whose results are nested alike.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import autodiff as ad
from soak import reference
from soak.containers import (
    Draw,
    Tree,
    active,
    active_leaves,
    filled,
    leaves,
    mapped,
    ravel,
    unravel,
    weights,
    weights_like,
)
from soak.stage import NAMES, PAIR, Layer, Stage, alike, aux_of, by_position, with_aux, without_notes

if TYPE_CHECKING:
    from collections.abc import Callable

    from soak.reference import Calculus, Func, Positions

CHUNKS = {None: 5, 1: 2, 2: 2, 3: 1, "auto": 1}

# Derivatives by argnums.

_HESSIANS = {
    "auto": "rr",
    "reverse-over-reverse": "rr",
    "forward-over-reverse": "fr",
    "reverse-over-forward": "rf",
    "forward-over-forward": "ff",
}
_JACOBIANS = {"auto": "r", "reverse": "r", "forward": "f"}


def _listed(argnums: Any) -> tuple[int | str, ...]:
    return argnums if isinstance(argnums, tuple) else (argnums,)


def by_argnums(stage: Stage, name: str) -> Layer:
    """grad, jacrev, hessian and so on."""
    draw, transform = stage.draw, getattr(ad, name)
    positions, aux = stage.positions(), draw.chance(0.3)
    argnums = stage.argnums(positions)
    options: dict[str, Any] = {"argnums": argnums, "has_aux": aux}
    width, modes = stage.width(positions), "f" if name == "jacfwd" else "r"
    if name in ("jacobian", "hessian"):
        table = _JACOBIANS if name == "jacobian" else _HESSIANS
        options["mode"] = draw.pick(list(table))
        modes = table[options["mode"]]
    if name in ("jacrev", "jacfwd", "jacobian", "hessian"):
        options["chunk_size"] = draw.weighted(CHUNKS)
    if name == "jacfwd":
        options["randomness"] = stage.randomness()

    def lift(func: Func) -> Func:
        derived = transform(with_aux(func) if aux else func, **options)
        return alike(func, lambda *args, **kwargs: without_notes(derived(*args, **kwargs)))

    def refer(calculus: Calculus, func: Func) -> Func:
        make = reference.gradient if "grad" in name else reference.jacobian
        derived = make(calculus, func, positions)
        if name == "hessian":
            derived = make(calculus, derived, positions)

        def arranged(*args: Tree) -> Tree:
            value = func(*args)
            extra = without_notes(aux_of(value))
            pair = (value, extra) if aux else value
            match name:
                case "value_and_grad":
                    return pair, derived(*args)
                case "grad_and_value":
                    return derived(*args), pair
            return (derived(*args), extra) if aux else derived(*args)

        return arranged

    size = stage.size * width ** len(modes)
    rows = stage.size * width ** (len(modes) - 1)
    keywords = all(isinstance(one, str) or one >= 0 for one in _listed(argnums))
    return Layer(name, lift, refer, size + 2, rows, modes, keywords=keywords, options=options)


# Products.


def _twice(linear: Callable[[Tree], Tree], vector: Tree) -> tuple[Tree, Tree]:
    """A pullback or pushforward runs as often as one likes."""
    half = filled(vector, [0.5 * leaf for leaf in active_leaves(vector)])
    return linear(vector), linear(half)


def by_primals(stage: Stage, name: str) -> Layer:
    """vjp, jvp, linearize, hvp."""
    draw = stage.draw
    aux = draw.chance(0.3) and name != "linearize"
    mode = draw.pick([m for m in _HESSIANS if m != "forward-over-forward"])
    options: dict[str, Any] = {"has_aux": aux} | ({"mode": mode} if name == "hvp" else {})
    several = len(stage.args) > 1

    def body(func: Func, args: tuple[Tree, ...]) -> Tree:
        tangents = weights_like(args)
        match name:
            case "vjp":
                out, pullback, *rest = ad.vjp(func, *args, has_aux=aux)
                return (out, *_twice(pullback, weights_like(out)), *rest)
            case "jvp":
                return ad.jvp(func, args, tangents, has_aux=aux)
            case "linearize":
                out, pushforward = ad.linearize(func, *args)
                return (out, *_twice(lambda vectors: pushforward(*vectors), tangents))
        return ad.hvp(func, args, tangents, has_aux=aux, mode=mode)

    def lift(func: Func) -> Func:
        inner = with_aux(func) if aux else func
        return by_position(func, lambda args: without_notes(body(inner, args)))

    def refer(calculus: Calculus, func: Func) -> Func:
        def arranged(*args: Tree) -> Tree:
            value = func(*args)
            rest = [without_notes(aux_of(value))] if aux else []
            if name == "hvp":
                gradient = reference.gradient(calculus, func, tuple(range(len(args))))
                product = reference.pushed(calculus, gradient)(*args)
                return value, product if several else product[0], *rest
            make = reference.pulled if name == "vjp" else reference.pushed
            product = make(calculus, func)(*args)
            if name == "jvp":
                return value, product, *rest
            return (value, product, filled(product, [0.5 * leaf for leaf in active_leaves(product)]), *rest)

        return arranged

    width = stage.width(tuple(range(len(stage.args))))
    modes = {"vjp": "r", "jvp": "f", "linearize": "r", "hvp": _HESSIANS[mode]}[name]
    size = stage.size + 2 * (stage.size if name in ("jvp", "linearize") else width)
    rows = {"vjp": 1, "hvp": width}.get(name, stage.size)
    return Layer(name, lift, refer, size, rows, modes, options=options)


# Batches.


def _in_dims(draw: Draw, args: tuple[Tree, ...]) -> tuple[Any, list[int | None]]:
    """in_dims in one of the ways of saying it, and the dim of each leaf; at least one is not None."""

    def one(leaf: Any) -> int | None:
        return draw.integer(0, leaf.dim()) if isinstance(leaf, Tensor) and draw.chance(0.7) else None

    def entry(arg: Tree, dim: int | None) -> Any:
        return dim if dim is None or any(isinstance(leaf, Tensor) for leaf in leaves(arg)) else None

    while True:
        style = draw.pick(["one", "arguments", "leaves", "names"])
        if style == "one":
            return 0, [0 if isinstance(leaf, Tensor) else None for leaf in leaves(args)]
        if style == "leaves":
            trees = mapped(one, args)
            dims = leaves(trees)
        else:
            entries = [entry(arg, 0 if draw.chance(0.7) else None) for arg in args]
            trees = tuple(entries)
            dims = [
                dim if isinstance(leaf, Tensor) else None
                for arg, dim in zip(args, entries, strict=True)
                for leaf in leaves(arg)
            ]
        if any(dim is not None for dim in dims):
            return (dict(zip(NAMES, trees, strict=False)) if style == "names" else trees), dims


def _batch(draw: Draw, args: tuple[Tree, ...], dims: list[int | None], size: int) -> tuple[Tree, ...]:
    """The arguments with a batch of samples in each leaf that has a dim."""
    where = iter(dims)

    def several(leaf: Any) -> Any:
        dim = next(where)
        if dim is None:
            return leaf
        others = [leaf + draw.normal(tuple(leaf.shape)) if active(leaf) else leaf for _ in range(size - 1)]
        return torch.stack([leaf.detach(), *others], dim)

    return mapped(several, args)


def batched(stage: Stage, name: str) -> Layer:
    """vmap, ours or torch.func's."""
    draw, ours = stage.draw, name == "vmap"
    size, out_dims = draw.pick([1, 2, 2, 3, 3]), draw.pick([0, 0, -1]) if ours else 0
    in_dims, dims = _in_dims(draw, stage.args)
    options: dict[str, Any] = {"out_dims": out_dims, "randomness": stage.randomness()}
    if ours:
        options["chunk_size"] = draw.weighted(CHUNKS)
        options["fallback"] = draw.pick([None, None, "loop"])
        options["in_dims"] = in_dims
    else:
        where = iter(dims)
        options["in_dims"] = mapped(lambda _: next(where), stage.args)
        options["chunk_size"] = draw.pick([None, 2])

    def lift(func: Func) -> Func:
        transform = ad.vmap if ours else torch.func.vmap
        return alike(func, transform(func, **options))

    def refer(calculus: Calculus, func: Func) -> Func:
        return reference.looped(func, dims, size, out_dims)

    args = _batch(draw, stage.args, dims, size)
    # Keyword arguments have their dims from a dict alone.
    keywords = isinstance(in_dims, dict) and ours
    return Layer(name, lift, refer, stage.size * size, size, "", args, keywords=keywords, options=options)


# torch.func between ours. It takes no leaves that are no tensors, so it is shown a vector.


def torch_grad(stage: Stage, name: str) -> Layer:
    position = stage.draw.integer(0, len(stage.args) - 1)
    width = stage.width(position)

    def lift(func: Func) -> Func:
        def body(args: tuple[Tree, ...]) -> Tree:
            def of_vector(vector: Tensor) -> Tensor:
                arg = filled(args[position], unravel(vector, args[position]), keep=True)
                return func(*args[:position], arg, *args[position + 1 :])

            return torch.func.grad(of_vector)(ravel(args[position]))

        return by_position(func, body)

    def refer(calculus: Calculus, func: Func) -> Func:
        return lambda *args: ravel(reference.gradient(calculus, func, position)(*args))

    return Layer(name, lift, refer, width, 1, "r")


# torch.autograd.functional's interface.


def legacy(stage: Stage, name: str) -> Layer:
    """One of `autodiff.functional`; results are detached only where nobody outside differentiates them."""
    draw, short = stage.draw, name.removeprefix("functional.")
    options: dict[str, Any] = {"create_graph": not stage.outermost or draw.chance(0.5)}
    modes = {"jvp": "f", "hessian": "rr", "vhp": "rr", "hvp": "rr"}.get(short, "r")
    if short in ("jacobian", "hessian"):
        strategy = draw.pick(["reverse-mode", "forward-mode"])
        options["strategy" if short == "jacobian" else "outer_jacobian_strategy"] = strategy
        options["vectorize"] = draw.chance(0.5)
        modes = ("f" if strategy == "forward-mode" else "r") + modes[1:]
    bare = len(stage.args) == 1 and not isinstance(stage.args[0], tuple) and draw.chance(0.5)

    def body(func: Func, args: tuple[Tree, ...]) -> Tree:
        inputs, vector = (args[0], weights_like(args[0])) if bare else (args, weights_like(args))
        if short in ("jacobian", "hessian"):
            return getattr(ad.functional, short)(func, inputs, **options)
        if short == "vjp":
            vector = weights((PAIR,))
        return getattr(ad.functional, short)(func, inputs, vector, **options)

    def refer(calculus: Calculus, func: Func) -> Func:
        positions: Positions = 0 if bare else tuple(range(len(stage.args)))
        first = reference.jacobian(calculus, func, positions)
        if short == "jacobian":
            return first
        if short == "hessian":
            gradient = reference.gradient(calculus, func, positions)
            return reference.jacobian(calculus, gradient, positions)
        if short == "vjp":
            product = reference.pulled(calculus, func)
        elif short == "jvp":
            product = reference.pushed(calculus, func)
        else:
            gradient = reference.gradient(calculus, func, tuple(range(len(stage.args))))
            product = reference.pushed(calculus, gradient)
        pick = bare and short != "jvp"
        return lambda *args: (func(*args), product(*args)[0] if pick else product(*args))

    width = stage.width(tuple(range(len(stage.args))))
    size = {"jacobian": stage.size * width, "hessian": width**2, "jvp": 2 * stage.size}.get(short, 1 + width)
    rows = {"jacobian": stage.size, "jvp": stage.size, "vjp": 1}.get(short, width)
    return Layer(
        name,
        lambda func: by_position(func, lambda args: body(func, args)),
        refer,
        size,
        rows,
        modes,
        detaches=not options["create_graph"],
        options=options,
    )
