"""Eight threads at once, against closed forms; torch.func gives errors and wrong numbers here."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import autodiff as ad
from autodiff.errors import ForwardLevelError
from every_transform import EVERY, Every, T, W, X
from scenarios import assert_close

if TYPE_CHECKING:
    from collections.abc import Iterator

THREADS, CALLS = 8, 25


@pytest.fixture(autouse=True)
def impatient_interpreter() -> Iterator[None]:
    """Threads change places a thousand times more often than they do by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def slow_cubic(x: Tensor) -> Tensor:
    """The cubic of every_transform.py in more operations, so that threads meet inside."""
    y = x
    for _ in range(3):
        y = (y * 1 + 0).clone()
    return (W * y * y * y).sum()


THREADED = [
    "jvp",
    "jacfwd",
    "hessian",
    "hvp",
    "vmap",
    "grad",
    "linearize",
    "vmap-hessian",
    "hessian-forward-over-reverse",
    "hessian-forward-over-forward",
    "hvp-forward-over-reverse",
    "vmap-jacfwd",
]


@pytest.mark.parametrize("every", [e for e in EVERY if e.name in THREADED], ids=lambda e: e.name)
def test_one_transform_in_eight_threads(every: Every) -> None:
    barrier = threading.Barrier(THREADS)

    def work(worker: int) -> list[tuple[Tensor, Tensor]]:
        barrier.wait()
        xs = [X * (1 + worker / 10 + call / 100) for call in range(CALLS)]
        return [(every.apply(slow_cubic, x), every.expected(x, W)) for x in xs]

    with ThreadPoolExecutor(THREADS) as pool:
        for pairs in pool.map(work, range(THREADS)):
            for result, expected in pairs:
                assert_close(result, expected)


def test_different_transforms_in_eight_threads() -> None:
    """Levels are entered and left in every order: a jvp ends while another's function runs."""
    mixed = [next(e for e in EVERY if e.name == name) for name in THREADED[:THREADS]]
    barrier = threading.Barrier(THREADS)

    def work(every: Every) -> None:
        barrier.wait()
        for call in range(CALLS):
            x = X * (1 + call / 100)
            assert_close(every.apply(slow_cubic, x), every.expected(x, W))

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, mixed))


def test_jvp_in_a_thread_started_inside_a_jvp() -> None:
    inner = []

    def func(x: Tensor) -> Tensor:
        thread = threading.Thread(target=lambda: inner.append(ad.jvp(slow_cubic, (X,), (T,))[1]))
        thread.start()
        thread.join()
        return slow_cubic(x)

    _, tangent = ad.jvp(func, (X,), (T,))
    expected = 3 * W * X**2 @ T
    assert_close([tangent, *inner], [expected, expected])


class Meeting:
    """Two threads, the first inside torch.func.jvp while the second is inside ours."""

    def __init__(self) -> None:
        self.torch_is_in, self.ours_is_in, self.torch_is_out = (threading.Event() for _ in range(3))

    def run_torchs(self) -> None:
        def waiting(x: Tensor) -> Tensor:
            self.torch_is_in.set()
            assert self.ours_is_in.wait(5)
            return x.sin()

        torch.func.jvp(waiting, (X,), (T,))
        self.torch_is_out.set()

    def inside_ours(self, x: Tensor) -> Tensor:
        y = x.sin()
        self.ours_is_in.set()
        assert self.torch_is_out.wait(5)
        return y * x


@pytest.mark.parametrize("wrapped", [False, True], ids=["on the ground", "in vmap"])
def test_torchs_jvp_that_leaves_the_level_first_is_an_error(wrapped: bool) -> None:
    """Never wrong numbers: torch's exit takes the tangents of every thread with it."""
    meeting = Meeting()
    other = threading.Thread(target=meeting.run_torchs)
    other.start()
    assert meeting.torch_is_in.wait(5)
    func, x, t = (ad.vmap(meeting.inside_ours), X[None], T[None]) if wrapped else (meeting.inside_ours, X, T)
    with pytest.raises(ForwardLevelError, match="another thread left"):
        ad.jvp(func, (x,), (t,))
    other.join()
    _, tangent = ad.jvp(slow_cubic, (X,), (T,))
    assert_close(tangent, (3 * W * X * X * T).sum())


def test_a_level_of_the_callers_own_is_shared() -> None:
    with forward_ad.dual_level():
        _, tangent = ad.jvp(slow_cubic, (X,), (T,))
        dual = forward_ad.make_dual(X, T)
        outer = forward_ad.unpack_dual(ad.jvp(lambda x: x * dual, (X,), (T,))[1]).tangent
    assert_close(tangent, (3 * W * X * X * T).sum())
    assert_close(outer, T * T)


def test_grad_mode_is_each_threads_own() -> None:
    inside, leave = threading.Event(), threading.Event()

    def func(x: Tensor) -> Tensor:
        inside.set()
        leave.wait(20)
        return (x**3).sum()

    with ThreadPoolExecutor(1) as pool, torch.no_grad():
        pending = pool.submit(lambda: ad.grad(func)(X))
        inside.wait(20)
        assert not torch.is_grad_enabled()
        assert not (X.clone().requires_grad_() * 2).requires_grad
        leave.set()
        assert_close(pending.result(), 3 * X**2)


@pytest.mark.parametrize("slow", ["enter_dual_level", "exit_dual_level"])
def test_level_is_entered_and_left_behind_a_lock(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread is half way into or out of torch's level, no other may come or go."""
    switch = getattr(forward_ad, slow)

    def slowly(**options: int) -> int | None:
        time.sleep(0.002)
        result = switch(**options)
        time.sleep(0.002)
        return result

    monkeypatch.setattr(forward_ad, slow, slowly)

    def work(worker: int) -> None:
        for call in range(2 * CALLS):
            x = X * (1 + worker / 10 + call / 100)
            assert_close(ad.jvp(slow_cubic, (x,), (T,))[1], 3 * W * x**2 @ T)

    # Two threads: with more, somebody always holds the level and it is seldom entered or left.
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
