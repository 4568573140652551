"""Functions of a sample with known Hessians: by a closed form, or by torch.autograd.functional, one by one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

import autodiff as ad
from autodiff import _torch

ARCHITECTURES = ("mlp", "cnn", "encoder")
CHUNKS: dict[str, dict[str, Any]] = {
    "auto": {},
    "one": {"chunk_size": 1},
    "two": {"chunk_size": 2},
    "all": {"chunk_size": None},
    "rows": {"row_chunk_size": 11},
    "row": {"row_chunk_size": 1},
}
W = torch.tensor([1.0, 2.0, -1.0])
X = torch.arange(30.0).view(10, 3) / 10


def square(w: Tensor, x: Tensor) -> Tensor:
    """Its Hessian is 2 x x^T."""
    return (w @ x) ** 2


def outer(x: Tensor) -> Tensor:
    """The Hessians of `square` for samples [n, 3]."""
    return 2 * x[:, :, None] * x[:, None, :]


def out_of_memory_above(size: int, tried: list[int], func: Any = square) -> Any:
    """``func``, but for batches of more than ``size`` samples there is no memory."""

    def limited(w: Tensor, x: Tensor) -> Tensor:
        batch = _torch.fully_unwrapped(x).numel() // x.numel()
        tried.append(batch)
        if batch > size:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return func(w, x)

    return limited


@dataclass
class Problem:
    """A module in evaluation mode, five samples, and a loss."""

    module: nn.Module
    inputs: Tensor
    targets: Tensor

    @property
    def params(self) -> dict[str, Tensor]:
        return dict(self.module.named_parameters())

    def loss(self) -> Any:
        return ad.sample_loss(self.module, cross_entropy)

    def expected(self) -> Tensor:
        """The Hessians [5, P, P], by a loop over torch.autograd.functional.hessian."""
        names = list(self.params)
        sizes = [param.numel() for param in self.params.values()]
        vector = torch.cat([param.detach().flatten() for param in self.params.values()])

        def loss(vector: Tensor, x: Tensor, y: Tensor) -> Tensor:
            parts = vector.split(sizes)
            params = {name: part.view_as(self.params[name]) for name, part in zip(names, parts, strict=True)}
            return cross_entropy(torch.func.functional_call(self.module, params, (x[None],)), y[None])

        with sdpa_kernel(SDPBackend.MATH):
            return torch.stack(
                [
                    torch.autograd.functional.hessian(lambda v, x=x, y=y: loss(v, x, y), vector)
                    for x, y in zip(self.inputs, self.targets, strict=True)
                ]
            )


class Encoder(nn.Module):
    """A transformer encoder layer, whose tokens' mean is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(dim=1))


def problem(kind: str) -> Problem:
    torch.manual_seed(7)
    targets = torch.tensor([0, 2, 1, 1, 0])
    match kind:
        case "mlp":
            module: nn.Module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
            return Problem(module.eval(), torch.randn(5, 4), targets)
        case "cnn":
            module = nn.Sequential(
                nn.Conv2d(2, 3, 3),
                nn.BatchNorm2d(3),
                nn.Tanh(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(12, 3),
            )
            module(torch.randn(9, 2, 6, 7))  # running statistics that are not those of a fresh layer
            return Problem(module.eval(), torch.randn(5, 2, 6, 7), targets)
        case "encoder":
            return Problem(Encoder().eval(), torch.randn(5, 6, 4), targets)
    raise ValueError(kind)


@cache
def known(kind: str) -> tuple[Problem, Tensor]:
    """The problem and its Hessians, found once."""
    case = problem(kind)
    return case, case.expected()
