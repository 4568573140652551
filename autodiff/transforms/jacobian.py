"""Floor 2: Jacobians by rows (reverse) or by columns (forward). Builds on `blocks`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autodiff.transforms.blocks import by_mode

if TYPE_CHECKING:
    from collections.abc import Callable

    from autodiff.core.batch import Randomness
    from autodiff.core.call import Argnums, Wrt
    from autodiff.core.chunks import ChunkSize
    from autodiff.transforms.blocks import JacobianMode


def jacrev(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    has_aux: bool = False,
    chunk_size: ChunkSize = None,
    holomorphic: bool = False,
    strict: bool = False,
    wrt: Wrt = None,
) -> Callable[..., Any]:
    r"""Jacobian by reverse mode: one evaluation, then a pull for every number of the output.

    .. math:: \operatorname{jacrev}(f)(x)_{ij} = \partial f_i / \partial x_j

    >>> import torch
    >>> jacrev(lambda x: x[0] * x[1:])(torch.tensor([2.0, 3.0, 5.0]))
    tensor([[3., 2., 0.],
            [5., 0., 2.]])

    Args:
        func: a function of trees that returns a tree of floating or complex tensors, or a pair
            ``(output, aux)`` if ``has_aux``.
        argnums: which arguments to differentiate: a position, a parameter name, or a tuple of them.
        has_aux: whether ``func`` returns ``(output, aux)``.
        chunk_size: how many rows to pull in one batch; None pulls all, 1 pulls row by row without vmap,
            ``"auto"`` learns from the first rows how many fit in half of the free memory. The function
            runs once in any case.
        holomorphic: differentiate a complex function of complex arguments, with one complex derivative.
        strict: raise where an output does not depend on a leaf, instead of giving zeros.
        wrt: which leaves of these arguments to differentiate, by patterns of their places, as for
            :func:`autodiff.grad`.

    Returns:
        A function of ``func``'s arguments that returns a tree like the output, holding at every leaf a
        tree like the selected argument (a tuple of trees for a tuple of ``argnums``), holding at every
        floating leaf a block of shape ``(*out_shape, *in_shape)`` and the input's dtype, and None at
        other leaves. With ``has_aux`` it returns ``(jacobian, aux)``.

    Raises:
        OptionError: ``chunk_size`` is not a positive int, ``"auto"`` or None.
        DtypeError: complex tensors without ``holomorphic``, or real ones with it.
        OutputError: the output is empty, or holds something else than floating or complex tensors.
        ArgnumsError, LeafError: ``argnums`` or ``wrt`` does not fit the call, or selects nothing to differentiate.
        IndependenceError: ``strict`` and an output is independent of a leaf.
    """
    return by_mode("jacrev", func, argnums, "reverse", has_aux, chunk_size, holomorphic, strict, wrt=wrt)


def jacfwd(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    has_aux: bool = False,
    *,
    randomness: Randomness = "same",
    chunk_size: ChunkSize = None,
    holomorphic: bool = False,
    strict: bool = False,
    wrt: Wrt = None,
) -> Callable[..., Any]:
    r"""Jacobian by forward mode: a push for every number of the input, all in one evaluation.

    .. math:: \operatorname{jacfwd}(f)(x)_{ij} = \partial f_i / \partial x_j

    >>> import torch
    >>> jacfwd(lambda x: x[0] * x[1:])(torch.tensor([2.0, 3.0, 5.0]))
    tensor([[3., 2., 0.],
            [5., 0., 2.]])

    Args:
        func: as for :func:`jacrev`.
        argnums: as for :func:`jacrev`.
        has_aux: whether ``func`` returns ``(output, aux)``.
        randomness: ``"same"`` lets ``func`` draw random numbers; one draw serves all columns, also with
            ``"different"``, since all columns are derivatives of one function. ``"error"`` forbids it.
        chunk_size: how many columns to push in one batch; None pushes all, ``"auto"`` learns how many
            fit. The function runs once for every chunk, with the same random numbers.
        holomorphic: as for :func:`jacrev`.
        strict: raise where an output does not depend on the selected arguments.
        wrt: as for :func:`jacrev`.

    Returns:
        What :func:`jacrev` returns, with blocks of the output's dtype.

    Raises:
        OptionError: ``chunk_size`` is not a positive int, ``"auto"`` or None, or ``randomness`` is unknown.
        DtypeError: complex tensors without ``holomorphic``, or real ones with it.
        OutputError: the output is empty, or holds something else than floating or complex tensors.
        ArgnumsError, LeafError: ``argnums`` or ``wrt`` does not fit the call, or selects nothing to differentiate.
        IndependenceError: ``strict`` and an output is independent of the arguments.
    """
    return by_mode(
        "jacfwd", func, argnums, "forward", has_aux, chunk_size, holomorphic, strict, randomness, wrt=wrt
    )


def jacobian(
    func: Callable[..., Any],
    argnums: Argnums = 0,
    *,
    mode: JacobianMode = "auto",
    has_aux: bool = False,
    chunk_size: ChunkSize = None,
    holomorphic: bool = False,
    strict: bool = False,
    wrt: Wrt = None,
) -> Callable[..., Any]:
    r"""Jacobian by the mode that needs fewer products.

    .. math:: \operatorname{jacobian}(f)(x)_{ij} = \partial f_i / \partial x_j

    ``"auto"`` evaluates ``func`` once and then takes whichever is smaller: a pull for each number of
    the output, or, by the pullback of the pullback, a push for each number of the input.

    >>> import torch
    >>> jacobian(lambda t: torch.stack([t, t**2, t**3]))(torch.tensor(2.0))
    tensor([ 1.,  4., 12.])

    Args:
        func: as for :func:`jacrev`.
        argnums: as for :func:`jacrev`.
        mode: ``"auto"``, ``"reverse"`` (:func:`jacrev`) or ``"forward"`` (:func:`jacfwd`).
        has_aux: whether ``func`` returns ``(output, aux)``.
        chunk_size: how many rows or columns to compute in one batch; ``"auto"`` learns how many fit.
        holomorphic: as for :func:`jacrev`.
        strict: raise where an output does not depend on a leaf, instead of giving zeros.
        wrt: which leaves of these arguments to differentiate, by patterns of their places, as for
            :func:`autodiff.grad`.

    Returns:
        What :func:`jacrev` returns.

    Raises:
        OptionError: ``mode`` is unknown, or ``chunk_size`` is not a positive int, ``"auto"`` or None.
        DtypeError: complex tensors without ``holomorphic``, or real ones with it.
        OutputError: the output is empty, or holds something else than floating or complex tensors.
        ArgnumsError, LeafError: ``argnums`` or ``wrt`` does not fit the call, or selects nothing to differentiate.
        IndependenceError: ``strict`` and an output is independent of a leaf.
    """
    return by_mode("jacobian", func, argnums, mode, has_aux, chunk_size, holomorphic, strict, wrt=wrt)
