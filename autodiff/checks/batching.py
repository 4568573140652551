"""Checks of vmap's ``in_dims``, ``out_dims`` and outputs, named as `checks` says. Imports `trees` and `errors`."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from autodiff.core import trees
from autodiff.errors import BatchError, OutDimError, RandomnessError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autodiff.core.trees import Spec


def in_dims_type(name: str, in_dims: object) -> None:
    """An int, a tuple or a dict."""
    if isinstance(in_dims, int | tuple | dict) and not isinstance(in_dims, bool):
        return
    raise BatchError(
        f"{name}(in_dims={in_dims}): expected `in_dims` to be int or a (potentially nested) tuple "
        f"matching the structure of inputs, or a dict from parameter names to dims, got: {type(in_dims)}. "
        f"Write a tuple for several arguments, as in (None, 0)."
    )


def raise_in_dims_structure(name: str, in_dims: object, dims: object, spec: Spec) -> NoReturn:
    raise BatchError(
        f"{name}(in_dims={in_dims}): in_dims is not compatible with the structure of `inputs`. in_dims "
        f"has structure {trees.structure(dims)} but inputs has structure {spec}. Give one "
        f"entry for each positional argument; an entry may stand for a whole tree."
    )


def raise_unknown_in_dims_name(name: str, unknown: str, known: Sequence[str]) -> NoReturn:
    raise BatchError(
        f"{name}: in_dims names {unknown!r}, which is not an argument of this call. The arguments are "
        f"{', '.join(map(repr, known)) or 'none'}. Correct the name, or pass the argument by keyword."
    )


def in_dim(name: str, in_dims: object, path: str, dim: object, leaf: Any) -> None:
    """A dim is None, or an int in the range of the tensor, or container, that it is for."""
    if dim is None:
        return
    number = dim if isinstance(dim, int) and not isinstance(dim, bool) else None
    has_dims = isinstance(leaf, Tensor) or trees.hides_batches(leaf)
    if number is not None and has_dims and -leaf.dim() <= number < leaf.dim():
        return
    # Written only when there is an error: a tracer would guard on the number in the text.
    opening = f"{name}(in_dims={in_dims}): Got in_dim={dim} for an input"
    if number is None:
        raise BatchError(
            f"{opening} but in_dim must be either an integer dimension or None. It is for {path}."
        )
    if not has_dims:
        raise BatchError(
            f"{opening} but the input is of type {type(leaf)}. We cannot vmap over non-Tensor arguments, "
            f"please use None as the respective in_dim. It is {path}."
        )
    kind = "Tensor" if isinstance(leaf, Tensor) else type(leaf).__name__
    raise BatchError(
        f"{name}(in_dims={in_dims}): Got in_dim={dim} for some input, but that input is a {kind} of "
        f"dimensionality {leaf.dim()} so expected in_dim to satisfy -{leaf.dim()} <= in_dim < "
        f"{leaf.dim()}. It is {path}, of shape {tuple(leaf.shape)}."
    )


def batch_sizes(name: str, where: Sequence[str], sizes: Sequence[int]) -> None:
    """There is a batch, and all agree on its size."""
    if not sizes:
        raise BatchError(
            f"{name}: Expected at least one Tensor to vmap over, got none with an in_dim. Give an in_dim "
            f"to one argument, or call the function without vmap."
        )
    for path, size in zip(where, sizes, strict=True):
        if size != sizes[0]:
            raise BatchError(
                f"{name}: Expected all tensors to have the same size in the mapped dimension, got sizes "
                f"{list(sizes)} for the mapped dimension: {where[0]} has {sizes[0]}, {path} has {size}. "
                f"Use None as in_dim for what is shared by all samples."
            )


def raise_no_inputs(name: str) -> NoReturn:
    raise BatchError(
        f"{name}: got no inputs. Maybe you forgot to add inputs, or you are trying to vmap over a "
        f"function with no inputs. The latter is unsupported."
    )


def out_dims_type(name: str, out_dims: object) -> None:
    """Ints and None only."""
    for dim in trees.leaves(out_dims):
        if dim is not None and (not isinstance(dim, int) or isinstance(dim, bool)):
            raise BatchError(
                f"{name}(out_dims={out_dims}): `out_dims` must be an int, None or a python collection of "
                f"ints representing where in the outputs the vmapped dimension should appear, got {dim!r}."
            )


def raise_out_dims_structure(name: str, out_dims: object, spec: Spec) -> NoReturn:
    raise BatchError(
        f"{name}(out_dims={out_dims}): out_dims is not compatible with the structure of `outputs`. "
        f"out_dims has structure {trees.structure(out_dims)} but outputs has structure {spec}. Give "
        f"one entry for each output; an entry may stand for a whole tree."
    )


def out_dim(name: str, path: str, dim: int | None, leaf: Any, batched: bool) -> None:
    """A dim is in range, and None only for what all samples share."""
    if dim is None:
        if batched:
            raise BatchError(
                f"{name}: {path} can not return a BatchedTensor when out_dim is None: it differs from "
                f"sample to sample. Give it an out_dim."
            )
        return
    dims = leaf.dim() + 1
    if not -dims <= dim < dims:
        raise OutDimError(
            f"{name}: Dimension out of range: out_dim={dim} for {path}, which has {dims} dimensions with the "
            f"batch's. Expected -{dims} <= out_dim < {dims}."
        )


def raise_structures_differ(name: str, where: str, came: Spec, first: Spec) -> NoReturn:
    raise BatchError(
        f"{name}: expected outputs of one structure for all samples, but for {where} "
        f"{trees.difference(came, 'output', first, 'that of the samples before')} Return the same containers for "
        f"every sample."
    )


def raise_outputs_differ(name: str, path: str, where: str, came: object, first: object) -> NoReturn:
    raise BatchError(
        f"{name}: {path} is {_shown(came)} for {where}, but {_shown(first)} for the samples before it. Expected "
        f"tensors of one shape, and anything else to be equal for all samples, since it is returned as it is. Return "
        f"what differs as a tensor, as in torch.tensor(1.0)."
    )


def raise_random_numbers_drawn(name: str) -> NoReturn:
    raise RandomnessError(
        f"{name}: called random operation while in randomness error mode, in a sample that fallback='loop' ran. "
        f"Expected a function that draws no random numbers. Pass randomness='same' or 'different', or draw outside."
    )


def _shown(value: object) -> str:
    """A value in one short line."""
    return " ".join(reprlib.repr(value).split())
