"""The functions that are differentiated, with fixed seeds."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(x: Tensor) -> Tensor:
    """Sum of x sin x over 4 inputs: nothing but overhead."""
    return (x * x.sin()).sum()


def chain_of_sin(x: Tensor, length: int = 100) -> Tensor:
    """Many small operations, one after the other."""
    for _ in range(length):
        x = x.sin()
    return x.sum()


def chain_of_large(x: Tensor, length: int = 20) -> Tensor:
    """Sines and cosines in turn, on a large tensor: memory decides."""
    for step in range(length):
        x = x.sin() if step % 2 else x.cos()
    return x.sum()


def network(*widths: int) -> nn.Sequential:
    """A multilayer perceptron with tanh between its layers; its parameters are constants."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).requires_grad_(requires_grad=False)
