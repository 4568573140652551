"""Peak memory of one side of a comparison, each in a process of its own.

Run as ``python -m benchmarks.memory CASE SIDE``: prints the bytes by which the process's peak exceeds
its resident memory just before the run.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import autodiff
from autodiff import functional
from benchmarks.problems import chain_of_large, network, numbers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@dataclass(frozen=True)
class Case:
    """Peak memory of autodiff against another side's; ``bar`` times that is allowed."""

    name: str
    against: str
    bar: float


CASES = {
    "grad": Case("grad, 20 sin/cos on 1024 x 1024", "torch.autograd.grad", 1.1),
    "vmap-grad": Case("vmap(grad), 20 sin/cos on 1024 x 1024", "torch.func", 0.5),
    "hessian": Case("functional.hessian, MLP of 256 inputs", "torch.autograd.functional", 1.5),
    "hessian-batch": Case(
        "functional.hessian, 402 parameters, 4096 samples", "torch.autograd.functional", 1.5
    ),
}


def peaks(case: str) -> dict[str, int]:
    """The peaks of both sides of a case, in bytes."""
    return {side: _peak_in_child(case, side) for side in ("autodiff", "other")}


def _peak_in_child(case: str, side: str) -> int:
    command = [sys.executable, "-m", "benchmarks.memory", case, side]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(result.stdout.split()[-1])


def _run(case: str, side: str) -> Callable[[], Any]:
    ours = side == "autodiff"
    if case == "grad":
        x = numbers(1024, 1024)
        return (lambda: autodiff.grad(chain_of_large)(x)) if ours else lambda: _gradient_by_hand(x)
    if case == "vmap-grad":
        library: Any = autodiff if ours else torch.func
        x = numbers(4, 512, 512)
        return lambda: library.vmap(library.grad(chain_of_large))(x)
    hessian = functional.hessian if ours else torch.autograd.functional.hessian
    if case == "hessian":
        model, point = network(256, 256, 256), numbers(256)
        return lambda: hessian(lambda x: model(x).square().sum(), point)
    inputs, weights = numbers(4096, 20), numbers(402, seed=1) / 10

    def loss(w: torch.Tensor) -> torch.Tensor:
        hidden = (inputs @ w[:380].view(20, 19)).tanh()
        return (hidden @ w[380:399].view(19, 1) + w[399]).sin().square().mean() + w[400:].square().sum()

    return lambda: hessian(loss, weights)


def _gradient_by_hand(x: torch.Tensor) -> torch.Tensor:
    watched = x.detach().requires_grad_()
    return torch.autograd.grad(chain_of_large(watched), watched)[0]


def _bytes(field: str) -> int:
    for line in _status():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; memory rows need Linux")


def _status() -> Iterator[str]:
    yield from Path("/proc/self/status").read_text().splitlines()


def main(case: str, side: str) -> None:
    torch.set_num_threads(1)
    run = _run(case, side)
    # What torch loads at first use is not the case's.
    autodiff.grad(torch.sum)(torch.ones(1)) if side == "autodiff" else torch.func.grad(torch.sum)(
        torch.ones(1)
    )
    autodiff.vmap(torch.sin)(torch.ones(1, 1))
    before = _bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    result = run()
    print(_bytes("VmHWM") - before)
    del result


if __name__ == "__main__":
    main(*sys.argv[1:])
