"""Two threads at once. Events put them in the one order in which torch goes wrong, every time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from scenarios import assert_close
from table.row import WRONG, Section

THREADS = Section("Threads")
X, T = torch.tensor([[0.5, -1.0, 2.0], [1.0, -2.0, 0.25]], dtype=torch.float64)
PATIENCE = 20  # seconds


class Overlap:
    """The first thread's function starts before the second's and ends while the second's still runs."""

    def __init__(self) -> None:
        self.first_is_in, self.second_is_in, self.first_is_out = (threading.Event() for _ in range(3))

    def first(self) -> None:
        """Called inside what runs in the first thread."""
        self.first_is_in.set()
        assert self.second_is_in.wait(PATIENCE), "the second thread never came"

    def second(self) -> None:
        """Called inside what runs in the second thread."""
        self.second_is_in.set()
        assert self.first_is_out.wait(PATIENCE), "the first thread never left"

    def run(self, first: Any, second: Any) -> tuple[Any, Any]:
        """Both in threads of their own; what they return."""

        def leaving() -> Any:
            try:
                return first()
            finally:
                self.first_is_out.set()

        with ThreadPoolExecutor(2) as pool:
            one = pool.submit(leaving)
            assert self.first_is_in.wait(PATIENCE), "the first thread never began"
            other = pool.submit(second)
            return one.result(), other.result()


TRANSFORMS = {
    "jvp": (lambda library, f: library.jvp(f, (X,), (T,))[1], 3 * X**2 @ T),
    "jacfwd": (lambda library, f: library.jacfwd(f)(X), 3 * X**2),
    "hessian": (lambda library, f: library.hessian(f)(X), torch.diag(6 * X)),
}


@THREADS.row(
    "`jvp`, `jacfwd`, `hessian` in two threads",
    torch="wrong numbers or errors: one level of forward mode for the whole process",
    fails=WRONG,
    ours="right",
    over=TRANSFORMS,
    issue="pytorch PR#113520",
)
def forward_mode_in_threads(library: Any, case: tuple[Any, Tensor]) -> None:
    transform, expected = case
    overlap = Overlap()

    def cubic(wait: Any) -> Any:
        def func(x: Tensor) -> Tensor:
            wait()
            return (x**3).sum()

        return func

    results = overlap.run(
        lambda: transform(library, cubic(overlap.first)), lambda: transform(library, cubic(overlap.second))
    )
    assert_close(results, (expected, expected))


class Waiting(nn.Module):
    """x -> wait; x * scale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor, wait: Any) -> Tensor:
        wait()
        return x * self.scale


@THREADS.row(
    "`functional_call` on one module in two threads",
    torch="wrong values, and the module's parameters stay changed",
    fails=f"({WRONG}|AssertionError: the module has another parameter)",
    ours="right, the module untouched",
    over={"values": False, "module": True},
)
def functional_call_in_threads(library: Any, afterwards: bool) -> None:
    overlap, module = Overlap(), Waiting()
    own = module.scale
    results = overlap.run(
        lambda: library.functional_call(module, {"scale": 2 * own.detach()}, (X, overlap.first)),
        lambda: library.functional_call(module, {"scale": 5 * own.detach()}, (X, overlap.second)),
    )
    if afterwards:
        assert module.scale is own, "the module has another parameter"
    else:
        assert_close(results, (2 * X, 5 * X))
