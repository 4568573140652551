"""Eight threads at once, against closed forms; torch.func gives errors and wrong numbers here."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import autodiff as ad
from autodiff._torch import forward_level as forward
from autodiff.errors import ForwardLevelError
from every_transform import EVERY, Every, T, W, X, cubic
from scenarios import assert_close

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

THREADS, CALLS = 8, 200
# Compositions take longer, and are made of the same levels.
FEWER = 25


@pytest.fixture(autouse=True)
def impatient_interpreter() -> Iterator[None]:
    """Threads change places a thousand times more often than they do by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def slow_cubic(x: Tensor) -> Tensor:
    """The cubic of every_transform.py in more operations, so that threads meet inside."""
    y = (x * 1).clone()
    return (W * y * y * y).sum()


class Cubic(nn.Module):
    """The cubic of a parameter, with a buffer that it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(X.clone())
        self.register_buffer("top", X.clone())
        self.hooked = nn.Identity()
        self.hooked.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.kept = output

    def forward(self) -> Tensor:
        self.top.copy_(self.x.detach())
        self.hooked(slow_cubic(self.x))
        return self.kept


MODULE = Cubic()


def called(_: Any, x: Tensor) -> Tensor:
    """One module for all threads."""
    value, buffers = ad.functional_call(MODULE, {"x": x}, return_buffers=True)
    return torch.cat([value[None], buffers["top"]])


NAMED = {every.name: every for every in EVERY}
NINE = ["grad", "vjp", "jvp", "jacfwd", "jacrev", "hessian", "hvp", "linearize", "vmap"]
TEN = {
    **{name: NAMED[name] for name in NINE},
    "functional_call": Every("functional_call", called, lambda x, w: torch.cat([cubic(x, w)[None], x])),
}
COMPOSED = [
    "vmap-hessian",
    "hessian-forward-over-reverse",
    "hessian-forward-over-forward",
    "hvp-forward-over-reverse",
    "vmap-jacfwd",
]


def in_threads(everies: Sequence[Every], calls: int) -> None:
    """One of them in each thread, on fresh random inputs, against the closed forms."""
    barrier = threading.Barrier(len(everies))

    def work(worker: int, every: Every) -> tuple[Tensor, Tensor]:
        fresh = torch.Generator().manual_seed(worker)
        xs = [torch.randn(3, dtype=torch.float64, generator=fresh) for _ in range(calls)]
        barrier.wait()
        results = [every.apply(slow_cubic, x) for x in xs]
        return torch.stack(results), torch.stack([every.expected(x, W) for x in xs])

    with ThreadPoolExecutor(len(everies)) as pool:
        for results, expected in pool.map(work, range(len(everies)), everies):
            assert_close(results, expected)


@pytest.mark.parametrize("name", TEN)
def test_one_transform_in_eight_threads(name: str) -> None:
    in_threads([TEN[name]] * THREADS, CALLS)
    assert_close(MODULE.x.detach(), X)
    assert_close(MODULE.top, X)
    assert not hasattr(MODULE, "kept")


@pytest.mark.parametrize("name", COMPOSED)
def test_one_composition_in_eight_threads(name: str) -> None:
    in_threads([NAMED[name]] * THREADS, FEWER)


def test_different_transforms_at_once() -> None:
    """Levels are entered and left in every order: a jvp ends while another's function runs."""
    in_threads([*TEN.values()], CALLS)


def is_level_left() -> bool:
    """Where torch.func.jvp of another thread was inside our level, that is a moment later."""
    until = time.monotonic() + 5
    while forward_ad._current_level >= 0 and time.monotonic() < until:
        time.sleep(0.001)
    return forward_ad._current_level < 0


@pytest.mark.parametrize(
    "name", ["jvp", "jacfwd", "hvp-forward-over-reverse", "hessian-forward-over-forward"]
)
def test_beside_torchs_own_jvp_numbers_are_right_or_refused(name: str) -> None:
    """One thread of torch's: two of them corrupt memory without us."""
    every, stop = NAMED[name], threading.Event()
    right, refused, wrong = [0, 0], [0, 0], []

    def torchs() -> None:
        while not stop.is_set():
            # Its own errors are its own affair.
            with contextlib.suppress(RuntimeError, AssertionError):
                torch.func.jvp(slow_cubic, (X,), (T,))

    def ours(worker: int) -> None:
        fresh = torch.Generator().manual_seed(worker)
        for _ in range(CALLS):
            x = torch.randn(3, dtype=torch.float64, generator=fresh)
            try:
                result = every.apply(slow_cubic, x)
            except ForwardLevelError:
                refused[worker] += 1
                continue
            if torch.allclose(result, every.expected(x, W)):
                right[worker] += 1
            else:
                wrong.append((x, result))

    other = threading.Thread(target=torchs)
    other.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(ours, range(2)))
    finally:
        stop.set()
        other.join()
    assert wrong == []
    assert sum(right) + sum(refused) == 2 * CALLS
    assert sum(right) > CALLS
    assert is_level_left()
    assert_close(torch.func.jvp(slow_cubic, (X,), (T,))[1], 3 * W * X**2 @ T)


def test_another_threads_jvp_of_torch_is_waited_for() -> None:
    inside = threading.Event()

    def func(x: Tensor) -> Tensor:
        inside.set()
        time.sleep(0.05)
        return x.sin()

    with ThreadPoolExecutor(1) as pool:
        torchs = pool.submit(lambda: torch.func.jvp(func, (X,), (T,))[1])
        assert inside.wait(5)
        ours = ad.jvp(slow_cubic, (X,), (T,))[1]
        assert torchs.done() or forward_ad._current_level < 0
        assert_close([ours, torchs.result()], [3 * W * X**2 @ T, X.cos() * T])


def test_torchs_jvp_inside_our_level_keeps_it_open() -> None:
    """A level that is left takes the tangents of all threads with it."""
    torch_is_in, ours_is_out = threading.Event(), threading.Event()

    def torchs(x: Tensor) -> Tensor:
        y = x.sin()
        torch_is_in.set()
        assert ours_is_out.wait(5)
        return y * x

    with ThreadPoolExecutor(1) as pool:

        def ours(x: Tensor) -> tuple[Tensor, Any]:
            pending = pool.submit(lambda: torch.func.jvp(torchs, (X,), (T,))[1])
            assert torch_is_in.wait(5)
            return x.sin(), pending

        _, tangent, pending = ad.jvp(ours, (X,), (T,), has_aux=True)
        ours_is_out.set()
        assert_close([tangent, pending.result()], [X.cos() * T, (X.cos() * X + X.sin()) * T])
    assert is_level_left()


def test_torchs_jvp_that_comes_while_the_level_is_half_left_leaves_none_behind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    leave = torch._C._exit_dual_level
    tangents = []

    def slowly(*, level: int) -> None:
        with pytest.raises(RuntimeError, match="forward"):
            torch.func.jvp(slow_cubic, (X,), (T,))
        leave(level=level)
        monkeypatch.undo()
        tangents.append(torch.func.jvp(slow_cubic, (X,), (T,))[1])

    monkeypatch.setattr(torch._C, "_exit_dual_level", slowly)
    tangents.append(ad.jvp(slow_cubic, (X,), (T,))[1])
    assert_close(tangents, [3 * W * X**2 @ T] * 2)


def test_level_that_cannot_be_entered_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise RuntimeError("Nested forward mode AD is not supported at the moment")

    monkeypatch.setattr(torch._C, "_enter_dual_level", refuse)
    with pytest.raises(ForwardLevelError, match="another thread is half way into"):
        ad.jvp(slow_cubic, (X,), (T,))
    monkeypatch.undo()
    assert_close(ad.jvp(slow_cubic, (X,), (T,))[1], 3 * W * X**2 @ T)


def test_level_that_a_failed_compile_left_is_taken_away() -> None:
    """torch's own account says that there is none, and torch itself that there is one."""
    torch._C._enter_dual_level()
    assert forward_ad._current_level < 0
    assert_close(ad.jvp(slow_cubic, (X,), (T,))[1], 3 * W * X**2 @ T)
    torch._C._exit_dual_level(level=torch._C._enter_dual_level())


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


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "_MAX_WAIT", 0.01)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("wrapped", [False, True], ids=["eagerly", "in vmap"])
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


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("error", [RuntimeError, KeyError])
def test_error_of_a_function_whose_level_is_gone(error: type[Exception]) -> None:
    """torch raises RuntimeErrors then, which do not tell why; other errors are the function's own."""
    meeting = Meeting()
    other = threading.Thread(target=meeting.run_torchs)
    other.start()
    assert meeting.torch_is_in.wait(5)

    def raising(x: Tensor) -> Tensor:
        meeting.inside_ours(x)
        raise error("inside")

    with pytest.raises(ForwardLevelError if error is RuntimeError else KeyError) as raised:
        ad.jvp(raising, (X,), (T,))
    if error is RuntimeError:
        assert str(raised.value.__cause__) == "inside"
    other.join()


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


@pytest.mark.parametrize(
    ("home", "slow"), [(torch._C, "_enter_dual_level"), (torch._C, "_exit_dual_level")], ids=["in", "out"]
)
def test_level_is_entered_and_left_behind_a_lock(
    home: Any, slow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one thread is half way into or out of torch's level, no other may come or go."""
    switch = getattr(home, slow)

    def slowly(**options: int) -> int | None:
        time.sleep(0.002)
        result = switch(**options)
        time.sleep(0.002)
        return result

    monkeypatch.setattr(home, slow, slowly)

    def work(worker: int) -> None:
        for call in range(2 * FEWER):
            x = X * (1 + worker / 10 + call / 100)
            assert_close(ad.jvp(slow_cubic, (x,), (T,))[1], 3 * W * x**2 @ T)

    # Two threads: with more, somebody always holds the level and it is seldom entered or left.
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
