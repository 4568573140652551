"""What the machine could do: its measured rates, and the least time that a problem needs by them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.check import leaves_of
from benchmarks.clock import Here

if TYPE_CHECKING:
    from benchmarks.rows.row import Side

_SIZE, _BYTES, _ROUNDS = 1024, 2**27, 10


class Rates(NamedTuple):
    """Multiplications and additions per second of a matrix product; bytes read and written by a copy.

    The rate of products is the better of torch.mm's and of a convolution's with filters of size 1, which is the same
    product by another library: on some processors oneDNN is twice as fast as MKL.
    """

    operations: float
    operations_of_mm: float
    bytes: float


def rates(device: str) -> Rates:
    a, b = (torch.ones(_SIZE, _SIZE, device=device) for _ in range(2))
    product = torch.empty_like(a)
    image, filters = a.view(_SIZE // 32, _SIZE, 32, 1), b.view(_SIZE, _SIZE, 1, 1)
    source = torch.ones(_BYTES // 4, device=device)
    target = torch.empty_like(source)
    multiplying = _fastest(Here(lambda: torch.mm(a, b, out=product), device))
    convolving = _fastest(Here(lambda: torch.nn.functional.conv2d(image, filters), device))
    copying = _fastest(Here(lambda: target.copy_(source), device))
    return Rates(
        2 * _SIZE**3 / min(multiplying, convolving), 2 * _SIZE**3 / multiplying, 2 * _BYTES / copying
    )


def _fastest(side: Here) -> float:
    side.seconds(2)
    return min(side.seconds(1) for _ in range(_ROUNDS))


class Needs(NamedTuple):
    """What a run needs: operations in matrix products and convolutions, and bytes in and out.

    The bytes are those of its arguments and its result, each moved once; what is moved in between is the
    implementation's own business.
    """

    operations: int
    bytes: int

    def seconds(self, rates: Rates) -> float:
        """The least time, the two done at once."""
        return max(self.operations / rates.operations, self.bytes / rates.bytes)


class _Counter(TorchDispatchMode):
    """Counts by torch's own formulas. Its FlopCounterMode hooks modules too, which a pull inside does not allow."""

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.operations += formula(*args, **(kwargs or {}), out_val=result)
        return result


def needs(side: Side) -> Needs:
    counter = _Counter()
    with counter:
        result = side.run()
    return Needs(counter.operations, sum(map(_bytes, [*leaves_of(side.args), *leaves_of(result)])))


def _bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()
