"""Where samples come from: tensors, or an iterable of batches such as a DataLoader.

Provides `batches`: calls with their samples, one batch after the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from autodiff.core import trees
from autodiff.errors import BatchError

if TYPE_CHECKING:
    from collections.abc import Iterator

Args = tuple[Any, ...]


class Source(NamedTuple):
    """Calls, each with a batch of samples, and how many samples there are, None where that is unknown."""

    calls: Iterator[tuple[Args, dict[str, Any]]]
    one: bool
    expected: int | None


def calls_of(in_dims: Any, args: Args, kwargs: dict[str, Any]) -> Source:
    """The call itself, or one for each batch where an argument is an iterable of batches."""
    places = [at for at, arg in enumerate(args) if _is_iterable_of_batches(arg)]
    if not places:
        return Source(iter([(args, kwargs)]), True, None)
    if len(places) > 1:
        raise BatchError(
            f"per_sample: arguments {places[0]} and {places[1]} are both iterables of batches. Give one, whose batches "
            f"hold all mapped arguments, as torch.utils.data.DataLoader makes them."
        )
    loader = args[places[0]]
    others = [arg for at, arg in enumerate(args) if at != places[0]]
    return Source(_calls(in_dims, loader, others, kwargs), False, _count(loader))


def _is_iterable_of_batches(arg: Any) -> bool:
    if isinstance(arg, Tensor | str | bytes | nn.Module) or hasattr(arg, "__array_interface__"):
        return False
    return hasattr(arg, "__iter__") and trees.is_leaf(arg)


def _calls(
    in_dims: Any, loader: Any, others: list[Any], kwargs: dict[str, Any]
) -> Iterator[tuple[Args, dict[str, Any]]]:
    for batch in loader:
        if isinstance(in_dims, dict):
            names = [name for name, dim in in_dims.items() if _maps(dim)]
            yield tuple(others), {**kwargs, **dict(zip(names, _parts(batch, len(names), names), strict=True))}
        elif isinstance(in_dims, tuple):
            mapped = [at for at, dim in enumerate(in_dims) if _maps(dim)]
            if len(in_dims) != len(mapped) + len(others):
                raise BatchError(
                    f"per_sample(in_dims={in_dims}): expected {len(in_dims) - len(mapped)} shared arguments beside the "
                    f"iterable of batches, got {len(others)}. The batches hold all mapped arguments. Any iterator "
                    f"counts as batches: for parameters write dict(module.named_parameters())."
                )
            remaining = iter(others)
            parts = dict(zip(mapped, _parts(batch, len(mapped)), strict=True))
            yield tuple(parts[at] if at in parts else next(remaining) for at in range(len(in_dims))), kwargs
        else:
            if others:
                raise BatchError(
                    f"per_sample(in_dims={in_dims}): every argument is mapped, but {len(others)} more came beside the "
                    f"iterable of batches. Write a tuple with None for what is shared, as in in_dims=(None, 0, 0)."
                )
            yield tuple(batch) if isinstance(batch, list | tuple) else (batch,), kwargs


def _maps(prefix: Any) -> bool:
    return any(dim is not None for dim in trees.leaves(prefix))


def _parts(batch: Any, count: int, names: list[str] | None = None) -> list[Any]:
    """A batch as the values of the mapped arguments."""
    if names is not None and isinstance(batch, dict) and set(names) <= set(batch):
        return [batch[name] for name in names]
    if isinstance(batch, list | tuple) and len(batch) == count:
        return list(batch)
    if count == 1:
        return [batch]
    size = f" of {len(batch)}" if isinstance(batch, list | tuple) else ""
    raise BatchError(
        f"per_sample: a batch of the iterable is a {type(batch).__name__}{size}, but {count} arguments are mapped. "
        f"Yield a tuple of {count}, in the order of the arguments."
    )


def _count(loader: Any) -> int | None:
    """How many samples a DataLoader will give, unless its dataset or collate_fn changes their number."""
    try:
        if loader.batch_size is None:
            return None  # its items are batches, of any size
        return int(len(loader) * loader.batch_size if loader.drop_last else len(loader.sampler))
    except (AttributeError, TypeError):
        return None
