"""Checks of data sets that are gone through for every product of an operator. Imports `errors` alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from autodiff._torch import compiling, stop_tracing
from autodiff.errors import ArgnumsError, DataError, InPlaceError, OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence


def data_set(name: str, source: Any, batch_size: object, *, check: bool) -> None:
    """What is given for a data set can be gone through again and again."""
    if batch_size is None:
        _batches(name, source)
    elif not (batch_size == "auto" or (type(batch_size) is int and batch_size > 0)):
        raise OptionError(
            f"{name}: batch_size is a positive int, or 'auto' to have memory decide, got {batch_size!r}. Leave it out "
            f"where the data come in batches, as from a DataLoader."
        )
    loader = source if isinstance(source, DataLoader) else None
    if check and loader is not None and loader.drop_last and isinstance(loader.sampler, RandomSampler):
        size = loader.batch_size
        if size is not None and len(loader.sampler) % size:
            raise DataError(
                f"{name}: expected the same samples in every product, got a DataLoader with shuffle=True and "
                f"drop_last=True, which leaves out {len(loader.sampler) % size} others each time. Pass "
                f"drop_last=False, as a smaller last batch has its right weight; or shuffle=False."
            )


def _batches(name: str, source: Any) -> None:
    is_list_of_tensors = isinstance(source, tuple) and any(isinstance(one, Tensor | dict) for one in source)
    if isinstance(source, Tensor | dict) or is_list_of_tensors:
        raise OptionError(
            f"{name}: expected an iterable of batches, got {_kind(source)} of tensors. Pass batch_size=, a number or "
            f"'auto', to have them cut along their first dimension; or a list of batches."
        )
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        raise OptionError(
            f"{name}: expected an iterable of batches, got {_kind(source)}, which gives single samples. Pass "
            f"DataLoader(dataset, batch_size=...)."
        )
    is_sequence = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    if isinstance(source, str | bytes | torch.nn.Module) or not (hasattr(source, "__iter__") or is_sequence):
        raise OptionError(
            f"{name}: expected an iterable of batches, or tensors with batch_size=, got {_kind(source)}. Pass a "
            f"DataLoader, or a list of tuples."
        )
    if hasattr(source, "__next__") and iter(source) is source:
        raise DataError(
            f"{name}: expected batches that can be gone through for every product, got {_kind(source)}, an iterator "
            f"that is exhausted after one. Pass a list of its batches, a DataLoader, or an object whose __iter__ "
            f"starts anew."
        )


def _kind(source: object) -> str:
    return f"a {type(source).__name__}"


def reduction(name: str, value: object) -> None:
    if value not in ("mean", "sum"):
        raise OptionError(
            f"{name}: reduction is 'mean', where the loss of a batch is a mean over its samples, or 'sum', got "
            f"{value!r}. It has to be the loss's own."
        )


def tensors_to_cut(name: str, leaves: Sequence[Any]) -> int:
    """The number of samples in tensors that are cut into batches."""
    shapes = [leaf.shape for leaf in leaves if isinstance(leaf, Tensor)]
    sizes = {shape[0] if len(shape) else None for shape in shapes}
    if not shapes:
        raise OptionError(
            f"{name}: batch_size cuts tensors along their first dimension, got no tensor. Leave it out where the data "
            f"come in batches, as from a DataLoader."
        )
    if len(sizes) > 1 or None in sizes:
        raise DataError(
            f"{name}: expected tensors with one number of samples in their first dimensions, got the shapes "
            f"{_listed(shapes)}. Give what all samples share to the function itself, as by functools.partial."
        )
    (count,) = sizes
    assert count is not None
    return count


def samples_of_batch(name: str, number: int, leaves: Sequence[Any], *, needed: bool) -> int | None:
    """How many samples a batch holds, None where that is neither known nor needed."""
    shapes = [leaf.shape for leaf in leaves if isinstance(leaf, Tensor)]
    sizes = {shape[0] if len(shape) else None for shape in shapes}
    if len(sizes) == 1 and None not in sizes:
        (count,) = sizes
        if count == 0 and needed:
            raise DataError(f"{name}: expected samples in batch {number}, got none. Leave out empty batches.")
        return count
    if needed:
        raise DataError(
            f"{name}: expected tensors with one number of samples in their first dimensions, by which batch {number} "
            f"is weighed, got {f'the shapes {_listed(shapes)}' if shapes else 'no tensor'}. Give what all samples "
            f"share to the function itself, as by functools.partial; or pass reduction='sum', for a loss which is one."
        )
    return None


def _listed(shapes: Sequence[Any]) -> str:
    return ", ".join(str(tuple(shape)) for shape in shapes[:8]) + (", ..." if len(shapes) > 8 else "")


def raise_no_batches(name: str) -> NoReturn:
    raise DataError(
        f"{name}: expected at least one batch, got none: the data set is empty, or exhausted. Pass a list, a "
        f"DataLoader, or an object whose __iter__ starts anew."
    )


def same_length(name: str, known: tuple[int, int | None], got: tuple[int, int | None]) -> None:
    """The data set has as many batches and samples as it had before."""
    if known != got:
        (batches, samples), (batches_now, samples_now) = known, got
        raise DataError(
            f"{name}: expected the data set of the products before, {batches} batches of {samples} samples in all, got "
            f"{batches_now} batches of {samples_now}. Leave the data as they are while the operator is used, or make "
            f"it anew."
        )


def raise_other_batch(name: str, number: int) -> NoReturn:
    raise DataError(
        f"{name}: expected batch {number} as it was when it was recorded to be kept, got another. Pass shuffle=False, "
        f"or leave memory= out, so that no batch is kept."
    )


def raise_varying(name: str, *, draws: bool) -> NoReturn:
    if draws:
        raise DataError(
            f"{name}: expected the same product each time, got two that differ, since the function draws random "
            f"numbers, as dropout in training mode does. Call module.eval(). check=False leaves the comparison out; "
            f"then every product draws the same numbers."
        )
    raise DataError(
        f"{name}: expected the same product each time, got two that differ by more than rounding: the samples differ, "
        f"or they come in other batches and the loss depends on more than single samples, as with BatchNorm in "
        f"training mode. Pass shuffle=False and drop_last=False, and call module.eval(). check=False leaves this out."
    )


def raise_not_a_mean(name: str) -> NoReturn:
    raise DataError(
        f"{name}: expected a mean over a batch's samples, got a sum: the product of a batch is that of its "
        f"parts, added. Pass reduction='sum', or make the loss a mean. check=False leaves the comparison out."
    )


def raise_mean_of_other_samples(name: str) -> NoReturn:
    raise DataError(
        f"{name}: expected a mean over a batch's samples, got one in some batches and none in others, as of a loss "
        f"that leaves samples out (ignore_index) or weighs them. Means cannot be put together by the batches' numbers "
        f"of samples then. Divide a sum by the weight of all samples, with reduction='sum'; check=False leaves the "
        f"comparison out."
    )


def raise_writes(name: str, shapes: Sequence[Any]) -> NoReturn:
    raise DataError(
        f"{name}: expected a function that leaves all tensors as they are, got one that writes to {len(shapes)} of "
        f"them, of shapes {_listed(shapes)}, as BatchNorm in training mode writes its running statistics. Call "
        f"module.eval(). They have been put back. check=False leaves this out."
    )


def unwritten_arguments(name: str, before: Sequence[int], now: Sequence[int]) -> None:
    """Neither an argument nor the data were written in place since the operator was made."""
    if before != now:
        raise InPlaceError(
            f"{name}: expected the arguments and the data as they were when the operator was made, got a tensor that "
            f"was written in place, as by an optimizer's step. Make the operator anew, or make it at clones."
        )


def differentiated_outside_of_batches(name: str, picks: Sequence[str]) -> None:
    """No argument that is differentiated comes with the batches."""
    if picks:
        raise ArgnumsError(
            f"{name}: expected argnums to select arguments of the call, got {', '.join(picks)}, which the batches "
            f"hold. Put what is differentiated before what the batches hold."
        )


def raise_not_additive(name: str) -> NoReturn:
    raise OptionError(
        f"{name}: expected an operator that is a sum over samples, got a Jacobian: those of batches are stacked, not "
        f"added. Take gauss_newton(model, loss).over(batches), or the jacobian of a function that goes through the "
        f"batches itself."
    )


def untraced_data(name: str) -> None:
    if compiling():
        stop_tracing(
            f"{name}: torch.compile traces a product over a data set. Expected it outside of what is compiled, since "
            f"no tracer can go through a data set. Compile with fullgraph=False, or compile the function that is "
            f"differentiated."
        )
