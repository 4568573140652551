"""Parts of a Hessian without the whole matrix: each records the gradient once and pulls it back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autodiff import checks
from autodiff.core.call import Call, wraps
from autodiff.core.chunks import sizes_for
from autodiff.core.linearization import Linearization, gradient, linearize_derivative
from autodiff.core.products import products, restricted_to_outputs, split_rows
from autodiff.core.seeds import StandardBasis, zeros
from autodiff.types import Argnums, ChunkSize, P, Wrt

# How many rows of a Hessian are pulled at a time by default.
_ROWS = 64


def hessian_diagonal(
    func: Callable[P, Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    chunk_size: ChunkSize = _ROWS,
    wrt: Wrt = None,
) -> Callable[P, Any]:
    r"""Diagonal of the Hessian of a scalar function.

    .. math:: \operatorname{hessian\_diagonal}(f)(x)_i = \partial^2 f / \partial x_i^2

    Rows of the Hessian are pulled for one leaf at a time, with respect to that leaf alone, and only their
    diagonal outlives the chunk that they are pulled in. It takes the time of the Hessian's diagonal
    blocks, and the memory of ``chunk_size`` of their rows.

    >>> import torch
    >>> hessian_diagonal(lambda x: (x**3).sum() * x[0])(torch.tensor([1.0, 2.0]))
    tensor([12., 12.])

    Args:
        func: a function of trees that returns one real tensor of shape ``()``.
        argnums: which arguments to differentiate: a position, a parameter name, or a tuple of them.
        has_aux: whether ``func`` returns ``(value, aux)``.
        chunk_size: how many rows to pull in one batch; None pulls all of a leaf, 1 pulls row by row without
            vmap, ``"auto"`` learns from the first rows how many fit in half of the free memory.
        wrt: which leaves to differentiate: a pattern of places (``"last.*"``, ``"*bias"``), or a tuple of patterns.

    Returns:
        A function of ``func``'s arguments that returns a tree like the selected argument (a tuple of trees
        for a tuple of ``argnums``) whose floating leaves hold the second derivatives, with the leaf's
        shape and dtype, and whose other leaves hold None. With ``has_aux`` it returns ``(diagonal, aux)``.

    Raises:
        OptionError: ``chunk_size`` is not a positive int, ``"auto"`` or None.
        OutputError: the output is not one real scalar tensor.
        DtypeError: a differentiated leaf is complex.
        ArgnumsError, LeafError: ``argnums`` or ``wrt`` does not fit the call, or selects nothing to differentiate.
    """
    checks.chunk_size("hessian_diagonal", chunk_size)

    def diagonal(call: Call, gradient_at_point: Linearization) -> Any:
        return call.like_arguments(_diagonals(call, gradient_at_point, chunk_size))

    return from_gradient("hessian_diagonal", func, argnums, has_aux, wrt, diagonal)


def hessian_block_diagonal(
    func: Callable[P, Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    chunk_size: ChunkSize = None,
    wrt: Wrt = None,
) -> Callable[P, Any]:
    r"""Blocks of the Hessian of a scalar function that belong to one leaf each.

    .. math:: \operatorname{hessian\_block\_diagonal}(f)(x)_l = \partial^2 f / \partial x_l \, \partial x_l

    :math:`x_l` is leaf :math:`l` of the argument. Blocks of two different leaves are never computed.

    >>> import torch
    >>> params = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor(3.0)}
    >>> hessian_block_diagonal(lambda p: p["b"] * p["w"].prod() ** 2)(params)
    {'w': tensor([[24., 24.],
            [24.,  6.]]), 'b': tensor(0.)}

    Args:
        func: a function of trees that returns one real tensor of shape ``()``.
        argnums: which arguments to differentiate: a position, a parameter name, or a tuple of them.
        has_aux: whether ``func`` returns ``(value, aux)``.
        chunk_size: how many rows to pull in one batch; None pulls all of a leaf, 1 pulls row by row without
            vmap, ``"auto"`` learns from the first rows how many fit in half of the free memory.
        wrt: which leaves to differentiate: a pattern of places (``"last.*"``, ``"*bias"``), or a tuple of patterns.

    Returns:
        A function of ``func``'s arguments that returns a tree like the selected argument (a tuple of trees
        for a tuple of ``argnums``) whose floating leaves hold blocks of shape ``(*leaf_shape, *leaf_shape)``,
        and whose other leaves hold None. With ``has_aux`` it returns ``(blocks, aux)``.

    Raises:
        OptionError: ``chunk_size`` is not a positive int, ``"auto"`` or None.
        OutputError: the output is not one real scalar tensor.
        DtypeError: a differentiated leaf is complex.
        ArgnumsError, LeafError: ``argnums`` or ``wrt`` does not fit the call, or selects nothing to differentiate.
    """
    checks.chunk_size("hessian_block_diagonal", chunk_size)

    def blocks(call: Call, gradient_at_point: Linearization) -> Any:
        rows = _block_diagonal_rows(call, gradient_at_point, chunk_size, lambda rows, _: rows)
        # H: [tree(in), *in_shape, *in_shape]
        pairs = zip(rows, call.primals, strict=True)
        return call.like_arguments([split_rows(of_leaf, [leaf], leaf)[0] for of_leaf, leaf in pairs])

    return from_gradient("hessian_block_diagonal", func, argnums, has_aux, wrt, blocks)


def hessian_trace(
    func: Callable[P, Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    chunk_size: ChunkSize = _ROWS,
    wrt: Wrt = None,
) -> Callable[P, Any]:
    r"""Trace of the Hessian of a scalar function: its Laplacian.

    .. math:: \operatorname{hessian\_trace}(f)(x) = \sum_i \partial^2 f / \partial x_i^2 = \Delta f(x)

    It is exact, and takes the time and memory of :func:`hessian_diagonal`.

    >>> import torch
    >>> hessian_trace(lambda x: (x**3).sum())(torch.tensor([1.0, 2.0]))
    tensor(18.)

    Args:
        func: a function of trees that returns one real tensor of shape ``()``.
        argnums: which arguments to differentiate: a position, a parameter name, or a tuple of them.
        has_aux: whether ``func`` returns ``(value, aux)``.
        chunk_size: how many rows to pull in one batch; None pulls all of a leaf, 1 pulls row by row without
            vmap, ``"auto"`` learns from the first rows how many fit in half of the free memory.
        wrt: which leaves to differentiate: a pattern of places (``"last.*"``, ``"*bias"``), or a tuple of patterns.

    Returns:
        A function of ``func``'s arguments that returns a tensor of shape ``()`` and the differentiated
        leaves' common dtype: the sum over all of them. With ``has_aux`` it returns ``(trace, aux)``.

    Raises:
        OptionError: ``chunk_size`` is not a positive int, ``"auto"`` or None.
        OutputError: the output is not one real scalar tensor.
        DtypeError: a differentiated leaf is complex.
        ArgnumsError, LeafError: ``argnums`` or ``wrt`` does not fit the call, or selects nothing to differentiate.
    """
    checks.chunk_size("hessian_trace", chunk_size)

    def trace(call: Call, gradient_at_point: Linearization) -> Tensor:
        return torch.stack(
            [of_leaf.sum() for of_leaf in _diagonals(call, gradient_at_point, chunk_size)]
        ).sum()

    return from_gradient("hessian_trace", func, argnums, has_aux, wrt, trace)


def from_gradient(
    name: str,
    func: Callable[..., Any],
    argnums: Argnums,
    has_aux: bool,
    wrt: Wrt,
    compute: Callable[[Call, Linearization], Any],
) -> Callable[..., Any]:
    """What ``compute`` makes of the gradient at a point, under the public name that the user called."""

    @wraps(func)
    def derived(*args: Any, **kwargs: Any) -> Any:
        call = Call(name, func, args, kwargs, argnums, has_aux, wrt)
        checks.real_tensors(name, call.primals, call.path_of_primal)
        gradient_at_point = linearize_derivative(call, gradient(call))
        result = compute(call, gradient_at_point)
        return (result, call.aux(gradient_at_point.aux)) if has_aux else result

    return derived


def _block_diagonal_rows(
    call: Call, gradient_at_point: Linearization, chunk_size: ChunkSize, keep: Callable[[Tensor, int], Tensor]
) -> list[Tensor | None]:
    """What is kept of the rows that lead from each leaf to itself; see `products` for ``keep``.

    # rows: [chunk, *leaf.shape]
    """
    count, kept = len(call.primals), []
    for position, leaf in enumerate(call.primals):
        own = slice(position, position + 1)

        def pull(cotangents: Sequence[Tensor | None], *, last: bool, own: slice = own) -> list[Tensor | None]:
            return gradient_at_point.vjp(cotangents, wanted=own, last=last)

        pull_own = restricted_to_outputs(pull, own, count, is_last=own.stop == count)
        kept += products(
            pull_own,
            StandardBasis([leaf]),
            gradient_at_point.batchable(sizes_for(chunk_size, [leaf])),
            keep=keep,
        )
    return kept


def _diagonals(call: Call, gradient_at_point: Linearization, chunk_size: ChunkSize) -> list[Tensor]:
    """The Hessian's diagonal, in the shapes of the leaves."""

    def on_diagonal(rows: Tensor, start: int) -> Tensor:
        # Row r is number start + r of its block. A view of it would keep all the rows alive.
        return rows.unsqueeze(-1).flatten(1).diagonal(start).clone()

    pairs = zip(
        _block_diagonal_rows(call, gradient_at_point, chunk_size, on_diagonal), call.primals, strict=True
    )
    return [
        zeros(leaf, tuple(leaf.shape)) if kept is None else kept.reshape(leaf.shape) for kept, leaf in pairs
    ]
