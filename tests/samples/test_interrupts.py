"""Runs on disk that are stopped at any line of this room, or killed at any time, and resume bit for bit."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree

import autodiff as ad
from autodiff.samples import files
from autodiff.samples.journal import Journal
from problems import W

ROOM = str(Path(files.__file__).parent)
X = torch.arange(27.0).view(9, 3) / 10


def energy(w: Tensor, x: Tensor) -> Tensor:
    return torch.sin(w @ x) * (w * x).sum().square()


def noisy(w: Tensor, x: Tensor) -> Tensor:
    return energy(w, x) + torch.rand(())


def two(w: Tensor, x: Tensor) -> Any:
    return {"a.b": energy(w, x), "a": {"b": x * 2}}


RUNS: dict[str, Any] = {
    "rows": (ad.hessian(energy), {"row_chunk_size": 2, "as_matrix": True}),
    "random": (noisy, {"chunk_size": 2, "randomness": "different", "on_error": "nan"}),
    "two files": (two, {"chunk_size": 2}),
}


class Interrupted(BaseException):
    """As a KeyboardInterrupt, which would end the tests."""


def interrupted(call: Any, at: int, *, modules: tuple[str, ...]) -> int:
    """Interrupt a call at one line of some of the room's modules; returns how many lines there were till then."""
    lines = 0

    def every_line(frame: Any, event: str, arg: Any) -> Any:
        nonlocal lines
        del frame, event, arg
        lines += 1
        if lines == at:
            raise Interrupted
        return every_line

    def every_call(frame: Any, event: str, arg: Any) -> Any:
        del event, arg
        code = frame.f_code
        # An exception in a generator that is being removed is not raised anywhere.
        wanted = code.co_filename.startswith(ROOM) and code.co_filename.endswith(modules)
        return every_line if wanted and code.co_name != "<genexpr>" else None

    before = sys.gettrace()
    sys.settrace(every_call)
    try:
        call()
    except Interrupted:
        pass
    finally:
        sys.settrace(before)
    return lines


# A file that is not closed any more is closed with its object.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("modules", [("files.py", "journal.py"), (".py",)], ids=["files", "room"])
@pytest.mark.parametrize("source", ["tensors", "loader"])
@pytest.mark.parametrize("kind", RUNS)
def test_a_run_that_is_interrupted_anywhere_resumes(
    kind: str, source: str, modules: tuple[str, ...], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(files, "SECONDS_BETWEEN_COMMITS", -1.0)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    func, options = RUNS[kind]

    def run(path: Path) -> Any:
        torch.manual_seed(0)
        batches = X if source == "tensors" else iter([X[:4], X[4:4], X[4:]])
        return ad.per_sample(func, (None, 0), **options)(W, batches, out=path)

    suffix = "" if kind == "two files" else ".npy"
    expected = _pytree.tree_leaves(run(tmp_path / f"whole{suffix}"))
    lines = interrupted(lambda: run(tmp_path / f"counted{suffix}"), -1, modules=modules)
    assert lines > 200
    for at in random.Random(0).sample(range(1, lines), 12):
        path = tmp_path / f"{at}{suffix}"
        assert interrupted(lambda path=path: run(path), at, modules=modules) == at  # type: ignore[misc]
        result = _pytree.tree_leaves(run(path))
        assert all(torch.equal(one, other) for one, other in zip(result, expected, strict=True)), at


def test_an_entry_that_is_written_before_the_interrupt_is_written_again(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """Batches may stand in a journal twice."""
    monkeypatch.setattr(files, "SECONDS_BETWEEN_COMMITS", -1.0)
    append = Journal.append
    left = 0

    def append_and_stop(self: Journal, entries: Any) -> None:
        nonlocal left
        append(self, entries)
        left -= 1
        if left == 0:
            raise Interrupted

    monkeypatch.setattr(Journal, "append", append_and_stop)

    def run() -> Any:
        return ad.per_sample(two, (None, 0), chunk_size=2)(W, iter([X[:2], X[2:4], X[4:4], X[4:]]), out=path)

    for entries in range(1, 7):
        path = tmp_path / str(entries)
        left = entries
        with pytest.raises(Interrupted):
            run()
        assert torch.equal(run()["a.b"], torch.stack([energy(W, x) for x in X]))


KILLS = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import autodiff as ad
from autodiff.samples import files

files.SECONDS_BETWEEN_COMMITS = 0.0
os.fsync = lambda file: None  # a process that is killed loses nothing that it wrote
X = torch.randn(300, 6, generator=torch.Generator().manual_seed(1))
W = torch.randn(9, 6, generator=torch.Generator().manual_seed(2))

def func(w, x):
    return torch.tanh(w @ x).square().sum() + torch.rand(())

def run(path):
    torch.manual_seed(0)
    curvature = ad.per_sample(
        ad.hessian(func), (None, 0), as_matrix=True, randomness="different", memory="200kB"
    )
    result = curvature(W, iter([X[:110], X[110:]]), out=path)
    return result, curvature.report.resumed_at

whole, _ = run("whole.npy")
began = time.perf_counter()
run("second.npy")
took = time.perf_counter() - began
numbers = random.Random(0)
killed = resumed = 0
for trial in range(6):
    for _ in range(3):
        child = os.fork()
        if child == 0:
            run(f"{trial}.npy")
            os._exit(0)
        time.sleep(numbers.random() * took)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
    result, resumed_at = run(f"{trial}.npy")
    assert torch.equal(result, whole), trial
    assert open(f"{trial}.npy", "rb").read() == open("whole.npy", "rb").read()
    resumed += resumed_at > 0
print(killed, resumed)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_run_that_is_killed_at_any_time_resumes(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", KILLS], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr
    killed, resumed = map(int, run.stdout.split())
    assert killed > 4
    assert resumed > 2
