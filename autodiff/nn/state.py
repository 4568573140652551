"""The tensors of a module, by name, and those that replace them in a call.

Provides `entries` and `replacements`, and the copies that keep a call from writing to buffers. Never changes a module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from autodiff._torch import versions
from autodiff.core.batch import copy_for_every_sample
from autodiff.errors import OptionError, StructureError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NORMS = (*BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_LAZY = (nn.UninitializedParameter, nn.UninitializedBuffer)


# Where a module keeps a tensor: the submodule, the key in its table, and whether that is the table of buffers.
Place: TypeAlias = "tuple[nn.Module, str, bool]"


def tensor_at(place: Place) -> Tensor:
    """The tensor that the module has there."""
    owner, key, is_buffer = place
    tensor: Any = (owner._buffers if is_buffer else owner._parameters)[key]
    return tensor  # type: ignore[no-any-return]


def entries(module: nn.Module, *, once: bool = False) -> Iterator[tuple[str, Place]]:
    """The parameters and buffers of the module and its submodules.

    What is in two places comes once for each, or with ``once`` by its first name alone: modules that share their parts
    on many levels have many more names than parts.
    """
    coming: list[tuple[str, nn.Module, bool]] = [("", module, False)]
    above: dict[int, Mapping[str, nn.Module | None]] = {}
    while coming:
        prefix, owner, left = coming.pop()
        children = owner._modules
        if left:
            del above[id(children)]
            continue
        # A weak proxy of a parent may be registered as a child; its children are the parent's.
        if id(children) in above:
            continue
        tables: tuple[Mapping[str, Tensor | None], ...] = (owner._parameters, owner._buffers)
        for table, is_buffer in zip(tables, (False, True), strict=True):
            for key, tensor in table.items():
                if tensor is not None:
                    yield prefix + key, (owner, key, is_buffer)
        above[id(children)] = children
        if not once:
            coming.append((prefix, owner, True))
        coming.extend(
            (f"{prefix}{key}.", child, False) for key, child in [*children.items()][::-1] if child is not None
        )


def replacements(
    module: nn.Module, given: Mapping[str, Tensor], *, tie_weights: bool
) -> tuple[dict[str, Place], dict[int, Tensor]]:
    """What replaces the module's own tensors.

    Returns:
        The places of the given names, without the names that stand for no tensor of the module. And what replaces a
        tensor, by the ``id`` of that tensor: so it is replaced wherever the module has it.
    """
    places: dict[str, Place] = {}
    tensors: dict[int, Tensor] = {}
    owners: dict[str, nn.Module | None] = {"": module}
    for name, tensor in given.items():
        path, _, key = name.rpartition(".")
        owner = owners[path] if path in owners else _owner(path, owners)
        if owner is None:
            continue
        is_buffer = key not in owner._parameters
        table: Mapping[str, Tensor | None] = owner._buffers if is_buffer else owner._parameters
        # A scripted module's tables have no get().
        own = table[key] if key in table else None  # noqa: SIM401
        if own is None:
            continue
        places[name] = owner, key, is_buffer
        if tensors.setdefault(id(own), tensor) is not tensor and tie_weights:
            tied = sorted(other for other, place in entries(module) if tensor_at(place) is own)
            raise OptionError(
                f"functional_call got multiple values for keys {tied}, which are tied. "
                f"Give one of them. Consider using tie_weights=False"
            )
    return places, tensors


def _owner(path: str, owners: dict[str, nn.Module | None]) -> nn.Module | None:
    """The submodule at a path; ``owners`` has those that were asked for before, and all above them."""
    below = []
    while path not in owners:
        path, _, name = path.rpartition(".")
        below.append(name)
    owner = owners[path]
    for name in reversed(below):
        owner = owner._modules[name] if owner is not None and name in owner._modules else None
        path = f"{path}.{name}" if path else name
        owners[path] = owner
    return owner


def merged(dicts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The given tensors in one dict."""
    whole: dict[str, Tensor] = {}
    for one in dicts:
        repeated = [name for name in one if name in whole] if whole else []
        if repeated:
            raise OptionError(
                f"functional_call: {repeated} appeared in multiple dictionaries; behavior of functional call "
                f"is ambiguous. Give each name once."
            )
        whole.update(one)
    return whole


def check_names(module: nn.Module, given: Mapping[str, Tensor]) -> None:
    """The names are exactly the module's, as ``strict`` requires."""
    names = {name for name, _ in entries(module)}
    unknown, missing = [n for n in given if n not in names], [n for n in names if n not in given]
    if unknown or missing:
        parts = [f"Unexpected key(s): {', '.join(map(repr, unknown))}."] if unknown else []
        parts += [f"Missing key(s): {', '.join(map(repr, sorted(missing)))}."] if missing else []
        raise StructureError(
            f"functional_call: Error(s) in reparametrizing for {type(module).__name__}:\n\t"
            + "\n\t".join(parts)
        )


def check_initialized(module: nn.Module, parts: Iterable[nn.Module], replaced: Mapping[int, Tensor]) -> None:
    """No tensor is missing that a lazy module makes, in place, in its first call."""
    if not any(isinstance(part, LazyModuleMixin) for part in parts):
        return
    for name, place in entries(module, once=True):
        if type(tensor_at(place)) in _LAZY and id(tensor_at(place)) not in replaced:
            raise StructureError(
                f"functional_call: {name} is not initialized, so that the call would change the module. Expected "
                f"a module that has run, or this name in the dicts. Call the module once."
            )


class Buffers:
    """Copies the buffers that a call may write to, so that the module's own stay as they are.

    Args:
        returned: whether the call returns its buffers; then each sample of every vmap around gets its own.
    """

    def __init__(self, *, returned: bool) -> None:
        self._copied = copy_for_every_sample() if returned else None
        self._clones: list[tuple[Place, Tensor, int]] = []

    def copy_given(self, places: Mapping[str, Place], tensors: dict[int, Tensor]) -> None:
        """Put copies in the place of given buffers, if they are returned."""
        if self._copied is not None:
            done: set[int] = set()
            for place in places.values():
                key = id(tensor_at(place))
                if place[2] and key not in done:
                    done.add(key)
                    tensors[key] = self._for_samples(place, tensors[key])

    def copy(self, owner: nn.Module, key: str, buffer: Tensor) -> Tensor:
        """What a clone has in the place of a buffer that was not given."""
        if self._copied is not None:
            return self._for_samples((owner, key, True), buffer)
        # Torch's own norms write in training mode alone, and a large network has many of them.
        if (not owner.training and type(owner) in _NORMS) or type(buffer) in _LAZY:
            return buffer
        clone = buffer.clone()
        self._clones.append(((owner, key, True), clone, version(clone)))
        return clone

    def written(self, counterpart: Callable[[nn.Module], nn.Module]) -> list[Place]:
        """The places of buffers that were not given, and which the call wrote to, or assigned anew."""
        return [
            place
            for place, clone, before in self._clones
            if version(clone) != before or getattr(counterpart(place[0]), place[1], None) is not clone
        ]

    def _for_samples(self, place: Place, buffer: Tensor) -> Tensor:
        # A count of batches is the same for all samples; a layer without momentum needs it as a number.
        counts = isinstance(place[0], _NORMS) and place[1] == "num_batches_tracked"
        return buffer.clone() if counts or self._copied is None else self._copied(buffer)


def version(tensor: Tensor) -> int:
    """How often a tensor was written in place, 0 where torch does not count it."""
    return 0 if tensor.is_inference() else versions([tensor])[0]
