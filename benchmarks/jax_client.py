"""The process in which JAX runs, seen from here."""

from __future__ import annotations

import pickle
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import optree
import torch

if TYPE_CHECKING:
    from benchmarks.rows.row import OfJax


class JaxError(RuntimeError):
    """JAX raised."""


class Jax:
    """Starts ``python`` of the environment that has JAX, and asks it. To be used by ``with``."""

    def __init__(self, python: str) -> None:
        self._command = [python, str(Path(__file__).with_name("jax_side.py"))]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.version: str = self._ask("version")
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def make(self, side: OfJax) -> tuple[list[torch.Tensor], float]:
        """Compile it; the result's leaves, and the seconds it took."""
        numbers = optree.tree_map(lambda leaf: leaf.numpy(), side.args)
        leaves, seconds = self._ask("make", side.transform, side.function, numbers)
        return [torch.from_numpy(leaf.copy()) for leaf in leaves], seconds

    def seconds(self, runs: int) -> float:
        """What so many runs of what was made last take."""
        return self._ask("time", runs)

    def matrix_rate(self, size: int = 1024) -> float:
        return self._ask("matrix_rate", size)

    def _ask(self, *request: Any) -> Any:
        pickle.dump(request, self._process.stdin)
        self._process.stdin.flush()
        kind, answer = pickle.load(self._process.stdout)
        if kind == "error":
            raise JaxError(answer)
        return answer
