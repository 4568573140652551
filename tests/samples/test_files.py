"""Results on disk: whole chunks or nothing, runs that resume bit for bit, and files of other runs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import autodiff as ad
from autodiff import _torch
from autodiff.core.memory import Meter
from autodiff.errors import DtypeError, OptionError, ResumeError
from autodiff.samples import files
from problems import W, outer, square

if TYPE_CHECKING:
    from pathlib import Path

X = torch.arange(60.0).view(20, 3) / 10


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def every_chunk_is_entered(monkeypatch: Any) -> None:
    monkeypatch.setattr(files, "SECONDS_BETWEEN_COMMITS", -1.0)


class Interrupted(BaseException):
    """Not an Exception: nothing in between may take it for a failing sample."""


# A function whose code and captured values are the same in every run; the test decides when it stops.
STOP: dict[str, int] = {"after": 10**9, "calls": 0}


def stopping(w: Tensor, x: Tensor) -> Tensor:
    calls = sys.modules[__name__].STOP
    calls["calls"] += 1
    if calls["calls"] > calls["after"]:
        raise Interrupted
    return torch.sin(w @ x) * (w * x).sum().square()


@pytest.fixture
def stop_after() -> Any:
    def set_limit(calls: int) -> None:
        STOP.update(after=calls, calls=0)

    yield set_limit
    STOP.update(after=10**9, calls=0)


@pytest.mark.usefixtures("every_chunk_is_entered")
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "options", [{"memory": "1kB"}, {"chunk_size": 3}, {"row_chunk_size": 2}], ids=["auto", "chunks", "rows"]
)
@pytest.mark.parametrize("source", ["tensors", "loader"])
@pytest.mark.parametrize("target", ["h.npy", "h"])
def test_a_resumed_run_is_bit_for_bit_one_run(
    target: str, source: str, options: Any, stop: int, tmp_path: Path, stop_after: Any
) -> None:
    def run(folder: str) -> Any:
        curvature = ad.per_sample(ad.hessian(stopping), (None, 0), as_matrix=True, **options)
        batches = X if source == "tensors" else torch.utils.data.DataLoader(X, batch_size=7)
        result = curvature(W, batches, out=tmp_path / folder / target)
        return result, curvature.report

    (tmp_path / "one").mkdir()
    stop_after(10**9)
    one, _ = run("one")
    stop_after(stop)
    with pytest.raises(Interrupted):
        run("two")
    stop_after(10**9)
    two, report = run("two")
    assert torch.equal(one, two)
    whole, resumed = contents(tmp_path / "one"), contents(tmp_path / "two")
    arrays = [name for name in whole if name.endswith(".npy")]
    assert arrays
    assert all(whole[name] == resumed[name] for name in arrays)
    assert report.samples + report.resumed_at == 20
    assert report.resumed_at > 0 or stop == 1 or "row_chunk_size" in options
    # The run that is complete computes no chunk again.
    calls = STOP["calls"]
    three, report = run("two")
    assert torch.equal(one, three)
    assert STOP["calls"] - calls <= 1
    assert report.chunks == 0
    assert "nothing was left to do, 20 samples were there" in repr(report)


@pytest.mark.usefixtures("every_chunk_is_entered")
@pytest.mark.parametrize("stop", [2, 3, 4, 5, 8])
def test_a_reduced_run_resumes_where_a_sample_begins(stop: int, tmp_path: Path, stop_after: Any) -> None:
    """Rows of a sample that is not whole are not on disk: they are computed again."""
    curvature = ad.per_sample(ad.hessian(stopping), (None, 0), as_matrix=True, row_chunk_size=1)
    expected = curvature.map(torch.trace, W, X)
    stop_after(stop)
    with pytest.raises(Interrupted):
        curvature.map(torch.trace, W, X, out=tmp_path / "traces.npy")
    stop_after(10**9)
    assert torch.equal(curvature.map(torch.trace, W, X, out=tmp_path / "traces.npy"), expected)
    assert curvature.report.resumed_at == stop // 3


RUN = """
import sys, time, torch
import autodiff as ad
from autodiff.samples import files
files.SECONDS_BETWEEN_COMMITS = 0.0
torch.set_num_threads(1)
torch.manual_seed(int(sys.argv[2]))
w = {"a": torch.randn(9, 6), "b": torch.randn(2, 9)}
x = torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
def loss(w, x):
    return (w["b"] @ torch.tanh(w["a"] @ x)).square().sum()
curvature = ad.per_sample(ad.hessian(loss), (None, 0), as_matrix=True, memory="1MiB")
pieces = iter(lambda: curvature(w, x, out=sys.argv[1]), None)
if sys.argv[3] == "slow":
    write = files.NpyFile.write
    def slowly(self, *args):
        write(self, *args)
        print("written", flush=True)
        time.sleep(0.05)
    files.NpyFile.write = slowly
next(pieces)
print("done", curvature.report.resumed_at, curvature.report.smallest, curvature.report.largest, flush=True)
"""


def start(path: Path, *, seed: int = 0, slow: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", RUN, str(path), str(seed), "slow" if slow else "fast"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(run: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = run.communicate(timeout=120)
    return run.returncode, out, err


def test_killed_and_started_again(tmp_path: Path) -> None:
    """SIGKILL in mid-run, twice; then other parameters, which must leave the file alone."""
    one, two = tmp_path / "one.npy", tmp_path / "two.npy"
    assert finished(start(one))[0] == 0
    for written in (3, 4):
        run = start(two, slow=True)
        assert run.stdout is not None
        for _ in range(written):
            assert run.stdout.readline() == "written\n"
        run.send_signal(signal.SIGKILL)
        assert finished(run)[0] == -signal.SIGKILL
        assert not json.loads((tmp_path / "two.npy.journal").read_text().splitlines()[-1]).get("complete")
    before = contents(tmp_path)
    code, _, err = finished(start(two, seed=1))
    assert code == 1
    assert "ResumeError: per_sample: " in err
    assert "another run, with other shared arguments" in err
    assert contents(tmp_path) == before
    code, out, _ = finished(start(two))
    assert code == 0
    assert out.split()[0] == "done"
    assert int(out.split()[1]) > 0
    assert two.read_bytes() == one.read_bytes()
    assert_close(torch.from_numpy(np.load(two)).shape, torch.Size([400, 72, 72]))


def test_random_functions_resume_with_their_numbers(
    tmp_path: Path, stop_after: Any, every_chunk_is_entered: None
) -> None:
    def noisy(w: Tensor, x: Tensor) -> Tensor:
        return stopping(w, x) + torch.rand(())

    for randomness in ("same", "different"):
        results = []
        for name, stop in ((f"{randomness}-one.npy", 10**9), (f"{randomness}-two.npy", 3)):
            torch.manual_seed(5)
            run = ad.per_sample(noisy, (None, 0), randomness=randomness, chunk_size=3)
            stop_after(stop)
            try:
                run(W, X, out=tmp_path / name)
            except Interrupted:
                torch.manual_seed(99)
                stop_after(10**9)
                run(W, X, out=tmp_path / name)
                assert run.report.resumed_at == 9
            results.append(np.load(tmp_path / name))
        assert np.array_equal(*results)


@pytest.mark.parametrize(
    "change", ["function", "captured", "shared", "samples", "options", "reduce", "in_dims"]
)
def test_files_of_another_run_are_refused(change: str, tmp_path: Path, stop_after: Any) -> None:
    def made(scale: Tensor, power: int = 2, **options: Any) -> Any:
        def func(w: Tensor, x: Tensor) -> Tensor:
            return scale * (w @ x) ** power + stopping(w, x)

        def cubic(w: Tensor, x: Tensor) -> Tensor:
            return scale * (w @ x) ** 3

        return ad.per_sample(ad.hessian(func if power == 2 else cubic), (None, 0), chunk_size=3, **options)

    path = tmp_path / "h.npy"
    one = torch.ones(())
    stop_after(2)
    with pytest.raises(Interrupted):
        made(one)(W, X, out=path)
    stop_after(10**9)
    before = contents(tmp_path)
    changed = {
        "function": lambda: made(one, 3)(W, X, out=path),
        "captured": lambda: made(torch.full((), 2.0))(W, X, out=path),
        "shared": lambda: made(one)(W + 1, X, out=path),
        "samples": lambda: made(one)(W, X + 1, out=path),
        "options": lambda: made(one, on_error="nan")(W, X, out=path),
        "in_dims": lambda: ad.per_sample(made(one)._func, (None, 1), chunk_size=3)(
            W, X.T.contiguous(), out=path
        ),
        "reduce": lambda: made(one).map(torch.trace, W, X, out=path),
    }
    with pytest.raises(ResumeError, match="holds results of another run") as caught:
        changed[change]()
    assert {"function": "code", "captured": "captured", "shared": "shared arguments"}.get(change, "") in str(
        caught.value
    )
    assert contents(tmp_path) == before
    made(one)(W, X, out=path)


def test_a_file_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "h.npy"
    path.write_bytes(b"precious")
    with pytest.raises(ResumeError, match="has no journal"):
        ad.per_sample(ad.hessian(square), (None, 0))(W, X, out=path)
    assert contents(tmp_path) == {"h.npy": b"precious"}
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    with pytest.raises(ResumeError, match="has no journal"):
        ad.per_sample(ad.hessian(square), (None, 0))(W, X, out=tmp_path / "folder")


def test_a_torn_entry_and_a_removed_file(
    tmp_path: Path, stop_after: Any, every_chunk_is_entered: None
) -> None:
    path, journal = tmp_path / "h.npy", tmp_path / "h.npy.journal"
    curvature = ad.per_sample(ad.hessian(stopping), (None, 0), chunk_size=3)
    expected = curvature(W, X)
    stop_after(3)
    with pytest.raises(Interrupted):
        curvature(W, X, out=path)
    stop_after(10**9)
    with journal.open("a") as torn:
        torn.write('{"sample": 15, "row": 0, "pl')
    assert torch.equal(curvature(W, X, out=path), expected)
    assert curvature.report.resumed_at == 9
    assert all(json.loads(line) for line in journal.read_text().splitlines())
    # Whoever removes the file wants a new one, the journal notwithstanding.
    path.unlink()
    assert torch.equal(curvature(W, X, out=path), expected)
    assert curvature.report.resumed_at == 0
    # A run that was cut short while it wrote the journal's first line begins anew.
    path.unlink()
    journal.write_text('{"per_sam')
    assert torch.equal(curvature(W, X, out=path), expected)


@pytest.mark.parametrize("stop", [1, 2])
def test_samples_that_all_fail_after_a_stop_are_filled(
    stop: int, tmp_path: Path, stop_after: Any, every_chunk_is_entered: None
) -> None:
    """The resumed run sees no sample that shows what a result looks like, and knows it all the same."""
    x = X[:12].clone()
    x[3 * stop :] = float("nan")
    curvature = ad.per_sample(ad.hessian(stopping), (None, 0), chunk_size=3, on_error="nan")
    expected = curvature(W, x)
    assert expected[3 * stop :].isnan().all()
    stop_after(stop)
    with pytest.raises(Interrupted):
        curvature(W, x, out=tmp_path / "h.npy")
    stop_after(10**9)
    assert_close(curvature(W, x, out=tmp_path / "h.npy"), expected, equal_nan=True)
    assert list(curvature.report.failed) == list(range(3 * stop, 12))


def test_a_run_whose_rest_raises_is_filled(
    tmp_path: Path, stop_after: Any, every_chunk_is_entered: None
) -> None:
    """As above, where the function raises on every sample that is left: no piece has a result."""

    def fails_later(w: Tensor, x: Tensor) -> Tensor:
        if bool(_torch.fully_unwrapped(x).isnan().any()):
            raise ValueError("no number")
        return stopping(w, x)

    x = X[:9].clone()
    x[3:] = float("nan")
    curvature = ad.per_sample(ad.hessian(fails_later), (None, 0), chunk_size=3, on_error="nan")
    expected = curvature(W, x)
    path = tmp_path / "h.npy"
    with pytest.MonkeyPatch.context() as patched:
        commit = files.FileSink.commit

        def commit_and_stop(self: Any, *args: Any, **options: Any) -> None:
            commit(self, *args, **options)
            raise Interrupted

        patched.setattr(files.FileSink, "commit", commit_and_stop)
        with pytest.raises(Interrupted):
            curvature(W, x, out=path)
    assert_close(curvature(W, x, out=path), expected, equal_nan=True)
    assert curvature.report.resumed_at == 3


def test_a_complete_run_of_rows_is_opened_by_a_row(tmp_path: Path) -> None:
    """A sample that is too large as a whole is not computed as a whole to see what it looks like."""
    x = torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    curvature = ad.per_sample(ad.hessian(lambda x: (x**3).sum()), memory="60kB")
    expected = curvature(x, out=tmp_path / "h.npy")
    with Meter(torch.device("cpu")) as meter:
        again = curvature(x, out=tmp_path / "h.npy")
    assert torch.equal(again, expected)
    assert meter.peak < 60_000 < 200 * 200 * 4


def test_one_file_holds_one_tensor(tmp_path: Path) -> None:
    curvature = ad.per_sample(ad.hessian(lambda p, x: (p[0] @ x) * p[1]), (None, 0))
    with pytest.raises(OptionError, match=r"one .npy file, but the result has 4 tensors.*as_matrix=True"):
        curvature((W, torch.ones(())), X, out=tmp_path / "h.npy")
    assert contents(tmp_path) == {}
    result = curvature((W, torch.ones(())), X, out=tmp_path / "deep" / "h")
    assert_close(result[0][1], X)
    assert sorted(contents(tmp_path / "deep" / "h")) == [
        "0.0.npy",
        "0.1.npy",
        "1.0.npy",
        "1.1.npy",
        "journal",
    ]


def test_what_numpy_cannot_hold_is_said_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(DtypeError, match=r"have no torch.bfloat16.*\.float\(\)"):
        ad.per_sample(lambda x: x.bfloat16())(X, out=tmp_path / "h.npy")
    assert contents(tmp_path) == {}


def test_complex_results_and_numpy_memmaps(tmp_path: Path) -> None:
    z = torch.complex(X, X.flip(0))
    squares = ad.per_sample(lambda z: (z * z).conj(), chunk_size=7)
    assert_close(squares(z, out=tmp_path / "z.npy"), (z * z).conj().resolve_conj())
    room = np.lib.format.open_memmap(tmp_path / "room.npy", mode="w+", dtype=np.float32, shape=(20, 3, 3))
    ad.per_sample(ad.hessian(square), (None, 0), chunk_size=6)(W, X, out=room)
    room.flush()
    assert_close(torch.from_numpy(np.load(tmp_path / "room.npy")), outer(X))


def test_the_mapped_result_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "h.npy"
    result = ad.per_sample(ad.hessian(square), (None, 0))(W, X, out=str(path))
    result.zero_()
    assert_close(torch.from_numpy(np.load(path)), outer(X))


def test_a_failing_run_keeps_what_it_has(tmp_path: Path, every_chunk_is_entered: None) -> None:
    x = X.clone()
    x[13] = float("nan")
    curvature = ad.per_sample(ad.hessian(square), (None, 0), chunk_size=4)
    with pytest.raises(ad.errors.SampleError, match="sample 13"):
        curvature(W, x, out=tmp_path / "h.npy")
    assert_close(torch.from_numpy(np.load(tmp_path / "h.npy"))[:12], outer(X)[:12])
