"""A destination of the caller's: tensors, NumPy arrays and memmaps.

Provides `GivenSink`, which refuses memory that cannot be written to, or that would be written to twice.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from autodiff.core import trees
from autodiff.core.specs import TensorSpec
from autodiff.errors import OptionError, ShapeError
from autodiff.samples.results import nan, with_tensors
from autodiff.samples.sinks import Sink, write_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from autodiff.samples.results import JacobianRows, Result, Template


class GivenSink(Sink):
    """Tensors and arrays of the caller's, which no argument of the function uses."""

    def __init__(self, out: Any, total: int | None, arguments: Sequence[Any]) -> None:
        self._out, self._total = out, total
        leaves = trees.leaves(out)
        # By their positions among the leaves: where the result has a constant, out may have anything.
        self._tensors = {at: _given_tensor(leaf) for at, leaf in enumerate(leaves) if _is_array(leaf)}
        if not self._tensors:
            raise OptionError(
                f"per_sample: out is a tensor, a NumPy array or memmap, a tree of them like the result, or a path, got "
                f"{type(out)}. Allocate it by torch.empty([samples, *shape]), or name a file, as in "
                f"out='hessians.npy'."
            )
        self._memmaps = [leaf.base for leaf in leaves if _is_mapped(leaf)]
        self._given = list(self._tensors.values())
        if any(map(overlaps_itself, self._given)) or _any_overlaps(self._given, arguments):
            raise OptionError(
                "per_sample: a tensor of out overlaps itself, another of out, or an argument. Expected memory for each "
                "number of the result. Allocate it by torch.empty([samples, *shape])."
            )
        self._stop = 0

    def open(self, template: Template) -> None:
        super().open(template)
        self._given = self._ordered(template)
        specs = template.tensors()
        wanted = [((self._total, *spec.shape), spec.dtype) for spec in specs]
        came = [(tuple(tensor.shape), tensor.dtype) for tensor in self._given]
        fits = len(came) == len(specs) and all(
            shape[1:] == spec.shape and dtype == spec.dtype and self._total in (None, *shape[:1])
            for (shape, dtype), spec in zip(came, specs, strict=True)
        )
        if not fits or len({shape[:1] for shape, _ in came}) > 1:
            raise ShapeError(
                f"per_sample: out has {_listed(came)}, but the result is {_listed(wanted)}. Give one tensor for each "
                f"leaf of the result, in its order, with the samples in front."
            )

    def _ordered(self, template: Template) -> list[Tensor]:
        """The tensors in the order of the result's: by its keys, or in their own order if they are in a sequence."""
        spec = trees.structure(self._out)
        places = trees.match(template.spec, trees.unflatten(spec, range(spec.num_leaves)))
        if places is not None:
            pairs = zip(places, template.leaves, strict=True)
            wanted = [at for at, leaf in pairs if isinstance(leaf, TensorSpec)]
            return [self._tensors[at] for at in wanted if at in self._tensors]
        if all(isinstance(step, int) for path in spec.paths() for step in path):
            return self._given
        raise ShapeError(
            f"per_sample: out is not a tree like the result: "
            f"{trees.difference(spec, 'out', template.spec, 'result')} Give a tree of tensors with the same keys, or a "
            f"list of them in the order of the result's."
        )

    def put(self, start: int, stop: int, result: Result) -> None:
        targets = self._of_samples(start, stop)
        for target, leaf in zip(targets, result.tensors(), strict=True):
            leaf.copy_to(target)
        for mapped in self._memmaps:
            # What was written stays in the file, but no longer counts as memory of this process.
            mapped.madvise(mmap.MADV_DONTNEED)

    def put_rows(self, sample: int, rows: JacobianRows) -> None:
        targets = self._of_samples(sample, sample + 1)
        for leaf, first, piece in rows.pieces:
            write_rows(targets[leaf][0], first, piece)

    def put_nan(self, sample: int) -> None:
        assert self.template is not None
        targets = self._of_samples(sample, sample + 1)
        for target, spec in zip(targets, self.template.tensors(), strict=True):
            target.copy_(nan(spec, sample))

    def tree(self) -> Any:
        assert self.template is not None
        if self._given and self._stop < len(self._given[0]):
            self._raise_number(f"{self._stop}, which are in its first rows")
        return with_tensors(self.template, self._given)

    def _of_samples(self, start: int, stop: int) -> list[Tensor]:
        if self._given and stop > len(self._given[0]):
            self._raise_number("more")
        self._stop = stop
        return [tensor[start:stop] for tensor in self._given]

    def _raise_number(self, came: str) -> NoReturn:
        raise ShapeError(
            f"per_sample: out has room for {len(self._given[0])} samples, but the iterable of batches gave {came}. "
            f"Expected as many. Give out the number of samples, or leave it out."
        )


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) or hasattr(leaf, "__array_interface__")


def _given_tensor(leaf: Any) -> Tensor:
    """One tensor or NumPy array that the caller wants filled."""
    if not isinstance(leaf, Tensor):
        return _tensor_of_array(leaf)
    if leaf.requires_grad or leaf.layout is not torch.strided or leaf.is_conj() or leaf.is_neg():
        raise OptionError(
            "per_sample: out has a tensor that requires grad, is sparse, or is the conjugate or negative of another. "
            "Expected one that holds numbers alone. Allocate it by torch.empty([samples, *shape])."
        )
    return leaf


def _tensor_of_array(array: Any) -> Tensor:
    why = "it is read-only."
    # torch would only warn of it, and crash where a file is mapped.
    if array.flags.writeable:
        try:
            return torch.from_numpy(array)
        except (TypeError, ValueError) as error:
            why = str(error)
    raise OptionError(
        f"per_sample: out has a {type(array).__name__} that cannot be written to as a tensor: {why} Expected an array "
        f"that is writable, in the byte order of this machine, with strides that are not negative and a dtype that "
        f"torch has. Open a memmap with mode='r+', or copy the array."
    )


def _is_mapped(leaf: Any) -> bool:
    """Whether the leaf is a NumPy memmap that shares its file."""
    return (
        isinstance(getattr(leaf, "base", None), mmap.mmap)
        and getattr(leaf, "mode", None) in ("r+", "w+")
        and hasattr(mmap, "MADV_DONTNEED")
    )


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share memory, as in an expanded tensor.

    >>> overlaps_itself(torch.zeros(3, 4).T), overlaps_itself(torch.zeros(3).expand(2, 3))
    (False, True)
    """
    reach = 0
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    for stride, size in sorted(pair for pair in pairs if pair[1] > 1):
        if stride <= reach:
            return tensor.numel() > 0
        reach += (size - 1) * stride
    return False


def _any_overlaps(tensors: Sequence[Tensor], others: Sequence[Any]) -> bool:
    """Whether one of the tensors overlaps another of them, or one of the others; sorted, since there may be many."""
    dense = [leaf for leaf in others if isinstance(leaf, Tensor) and leaf.layout is torch.strided]
    spans = [(*_span(tensor), at < len(tensors), tensor) for at, tensor in enumerate([*tensors, *dense])]
    open_spans: list[Any] = []
    for device, start, stop, mine, tensor in sorted(spans, key=lambda span: span[:2]):
        open_spans = [span for span in open_spans if span[0] == device and span[2] > start]
        if any((mine or span[3]) and overlap(tensor, span[4]) for span in open_spans):
            return True
        open_spans.append((device, start, stop, mine, tensor))
    return False


def _span(tensor: Tensor) -> tuple[str, int, int]:
    """The device of a dense tensor, and where its memory begins and ends."""
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    last = sum(stride * (size - 1) for stride, size in pairs) if tensor.numel() else -1
    return str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


def overlap(one: Tensor, other: Tensor) -> bool:
    """Whether an element of one tensor shares memory with one of the other.

    >>> table = torch.zeros(4, 3)
    >>> overlap(table[:, 0], table[:, 1]), overlap(table[:, :2], table[:, 1:])
    (False, True)
    """
    if one.device != other.device or not (one.numel() and other.numel()):
        return False
    # The bytes of an element are a dimension, too.
    sizes: dict[int, list[int]] = {1: [0, 0]}
    for sign, tensor in ((1, one), (-1, other)):
        strides = (*(stride * tensor.itemsize for stride in tensor.stride()), 1)
        for stride, size in zip(strides, (*tensor.shape, tensor.itemsize), strict=True):
            sizes.setdefault(stride, [0, 0])[sign > 0] += sign * (size - 1)
    return _reaches(sorted(sizes.items(), reverse=True), other.data_ptr() - one.data_ptr())


def _reaches(steps: list[tuple[int, list[int]]], distance: int) -> bool:
    """Whether ``distance`` is a sum of strides, each taken a number of times between its two bounds."""
    if not steps or steps[0][0] == 0:
        return distance == 0
    (stride, (least, most)), *rest = steps
    low = sum(stride * least for stride, (least, _) in rest)
    high = sum(stride * most for stride, (_, most) in rest)
    first, last = max(least, -((high - distance) // stride)), min(most, (distance - low) // stride)
    return any(_reaches(rest, distance - times * stride) for times in range(first, last + 1))


def _listed(pairs: Sequence[tuple[tuple[Any, ...], torch.dtype]]) -> str:
    return ", ".join(f"{list(shape)} {str(dtype).removeprefix('torch.')}" for shape, dtype in pairs)
