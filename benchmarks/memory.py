"""Peak memory of one side of a comparison, each in a process of its own.

Run as ``python -m benchmarks.memory CASE SIDE``: prints the bytes by which the process's peak exceeds
its resident memory just before the run.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import autodiff
from autodiff import functional
from benchmarks.problems import chain_of_large, network, numbers

if TYPE_CHECKING:
    from collections.abc import Callable


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


def _bytes(field: str, process: int | str = "self") -> int:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{process}/status has no {field}; memory rows need Linux")


# What a budget of 256 MiB may become in the eyes of the system.
BUDGET, BUDGET_BAR = 256 * 2**20, 320 * 2**20


def peak_of_per_sample(samples: int = 1797) -> int:
    """The peak of a run to disk above the process's start, seen from outside, in bytes.

    The Hessians of a 64-16-10 network in all of its 1210 parameters: 10.5 GB for 1797 samples.
    """
    with tempfile.TemporaryDirectory(dir=".") as folder:
        command = [
            sys.executable,
            "-m",
            "benchmarks.memory",
            "per-sample",
            f"{folder}/hessians.npy",
            str(samples),
        ]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
            assert run.stdin is not None
            assert run.stdout is not None
            peaks = []
            for field in ("VmRSS", "VmHWM"):  # at the start, and at the end
                run.stdout.readline()
                peaks.append(_bytes(field, run.pid))
                print(file=run.stdin, flush=True)
    return peaks[1] - peaks[0]


def per_sample_to_disk(path: str, samples: str) -> None:
    """The run that is looked at; it waits for its observer before and after."""
    torch.set_num_threads(1)
    model = network(64, 16, 10)
    params = {name: param.clone() for name, param in model.named_parameters()}
    loss = autodiff.sample_loss(model, torch.nn.functional.cross_entropy)
    inputs, targets = numbers(int(samples), 64), numbers(int(samples), seed=1).abs().long()
    hessians = autodiff.per_sample(autodiff.hessian(loss), (None, 0, 0), as_matrix=True, memory=BUDGET)
    print("ready", flush=True)
    input()
    hessians(params, inputs, targets, out=path)
    print("done", flush=True)
    input()


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
    if sys.argv[1] == "per-sample":
        per_sample_to_disk(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
