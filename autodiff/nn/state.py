"""The tensors of a module, by name, and those that replace them in a call.

Provides `entries` and `replacements`, and the copies that keep a call from writing to buffers. Never changes a module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from autodiff._torch import versions
from autodiff.core.batch import copy_for_every_sample
from autodiff.errors import OptionError, StructureError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NORMS = (*BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_LAZY = (nn.UninitializedParameter, nn.UninitializedBuffer)


class Entry(NamedTuple):
    """A tensor in the table of parameters or of buffers of ``owner``, by one of its names in the root module."""

    name: str
    tensor: Tensor
    owner: nn.Module
    key: str
    is_buffer: bool


def entries(module: nn.Module) -> Iterator[Entry]:
    """The parameters and buffers of the module and its submodules; what is in two places comes once for each."""
    coming: list[tuple[str, nn.Module, tuple[Any, ...]]] = [("", module, ())]
    while coming:
        prefix, owner, above = coming.pop()
        tables: tuple[Mapping[str, Tensor | None], ...] = (owner._parameters, owner._buffers)
        for table, is_buffer in zip(tables, (False, True), strict=True):
            for key, tensor in table.items():
                if tensor is not None:
                    yield Entry(prefix + key, tensor, owner, key, is_buffer)
        children = owner._modules
        if children:
            # A weak proxy of a parent may be registered as a child; its children are the parent's.
            above = (children, *above)
            for key, child in [*children.items()][::-1]:
                if child is not None and not any(child._modules is other for other in above):
                    coming.append((f"{prefix}{key}.", child, above))


def replacements(own: Iterable[Entry], given: Mapping[str, Tensor], tie_weights: bool) -> dict[int, Tensor]:
    """What replaces a tensor, by the ``id`` of that tensor: so it is replaced wherever the module has it."""
    tensors: dict[int, Tensor] = {}
    for one in own:
        tensor = given.get(one.name)
        if tensor is not None and tensors.setdefault(id(one.tensor), tensor) is not tensor and tie_weights:
            tied = sorted(other.name for other in own if other.tensor is one.tensor)
            raise OptionError(
                f"functional_call got multiple values for keys {tied}, which are tied. "
                f"Give one of them. Consider using tie_weights=False"
            )
    return tensors


def merged(dicts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The given tensors in one dict."""
    whole: dict[str, Tensor] = {}
    for one in dicts:
        repeated = [name for name in one if name in whole]
        if repeated:
            raise OptionError(
                f"functional_call: {repeated} appeared in multiple dictionaries; behavior of functional call "
                f"is ambiguous. Give each name once."
            )
        whole.update(one)
    return whole


def check_names(module: nn.Module, given: Mapping[str, Tensor]) -> None:
    """The names are exactly the module's, as ``strict`` requires."""
    names = {one.name for one in entries(module)}
    unknown, missing = [n for n in given if n not in names], [n for n in names if n not in given]
    if unknown or missing:
        parts = [f"Unexpected key(s): {', '.join(map(repr, unknown))}."] if unknown else []
        parts += [f"Missing key(s): {', '.join(map(repr, sorted(missing)))}."] if missing else []
        raise StructureError(
            f"functional_call: Error(s) in reparametrizing for {type(module).__name__}:\n\t"
            + "\n\t".join(parts)
        )


def check_initialized(own: Iterable[Entry], given: Mapping[str, Tensor]) -> None:
    """No tensor is missing that a lazy module makes, in place, in its first call."""
    for one in own:
        if type(one.tensor) in _LAZY and one.name not in given:
            raise StructureError(
                f"functional_call: {one.name} is not initialized, so that the call would change the module. Expected "
                f"a module that has run, or this name in the dicts. Call the module once."
            )


def copy_buffers(own: Iterable[Entry], tensors: dict[int, Tensor]) -> None:
    """Put a copy, one for every sample of every vmap around, in the place of each buffer."""
    copied = copy_for_every_sample()
    done: set[int] = set()
    for one in own:
        key = id(one.tensor)
        if one.is_buffer and key not in done:
            done.add(key)
            buffer = tensors.get(key, one.tensor)
            # A count of batches is the same for all samples; a layer without momentum needs it as a number.
            counts = isinstance(one.owner, _NORMS) and one.key == "num_batches_tracked"
            tensors[key] = buffer.clone() if counts else copied(buffer)


def clone_buffers(own: Iterable[Entry], tensors: dict[int, Tensor]) -> Iterator[tuple[Entry, Tensor, int]]:
    """Put a clone in the place of each buffer that was not given; yields it and its version."""
    for one in own:
        # Torch's own norms write in training mode alone, and a large network has many of them.
        changes = one.is_buffer and (one.owner.training or type(one.owner) not in _NORMS)
        if changes and id(one.tensor) not in tensors:
            clone = tensors[id(one.tensor)] = one.tensor.clone()
            yield one, clone, version(clone)


def version(tensor: Tensor) -> int:
    """How often a tensor was written in place, 0 where torch does not count it."""
    return 0 if tensor.is_inference() else versions([tensor])[0]
