"""Results on disk: whole chunks or nothing, runs that resume bit for bit, and files of other runs."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

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


def test_a_run_whose_first_batch_failed_is_opened_by_another(tmp_path: Path) -> None:
    x = X.clone()
    x[:3] = float("nan")
    run = ad.per_sample(ad.hessian(square), (None, 0), on_error="nan")
    expected = run(W, iter([x[:2], x[2:4], x[4:]]), out=tmp_path / "h.npy")
    again = run(W, iter([x[:2], x[2:4], x[4:]]), out=tmp_path / "h.npy")
    assert_close(again, expected, equal_nan=True)


def test_samples_that_all_fail_behind_an_empty_batch() -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError("no number")

    with pytest.raises(ad.errors.SampleError, match="all 3 samples failed"):
        ad.per_sample(fails, on_error="nan")(iter([X[:0], X[:2], X[2:3]]))


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


@pytest.mark.parametrize(
    "tree",
    [
        {"a.b": 1, "a": {"b": 2}},
        {"w": 1, "W": 2, "w~1": 3},
        {"../outside": 1, "/absolute": 2, "..": 3, ".": 4, "a/b": 5, "a:b": 6, "a\0b": 7, "a\nb": 8},
        {"": 1, "result": 2, "journal": 3},
        {0: 1, 1: 2},
        {"0": 1, "1": {"x" * 300: 2}, "2": {"x" * 301: 3}},
        {("a", 1): 1, "\N{GREEK SMALL LETTER ALPHA}": 2, "e\N{COMBINING ACUTE ACCENT}": 3, "é": 4},
        [1, (2, {"b": 3}), None],
    ],
    ids=["dots", "case", "outside", "empty", "ints", "long", "not ascii", "nested"],
)
def test_every_tensor_has_a_file_of_its_own(tree: Any, tmp_path: Path) -> None:
    def func(x: Tensor) -> Any:
        return torch.utils._pytree.tree_map(lambda number: number if number is None else x * number, tree)

    folder = tmp_path / "inner" / "out"
    expected = ad.per_sample(func)(X[:, 0])
    result = ad.per_sample(func)(X[:, 0], out=folder)
    assert_close(result, expected)
    assert_close(ad.per_sample(func)(X[:, 0], out=folder), expected)
    count = sum(isinstance(leaf, Tensor) for leaf in torch.utils._pytree.tree_leaves(expected))
    assert len(contents(folder)) == count + 1
    assert contents(folder).keys() == {
        str(path.relative_to(tmp_path / "inner" / "out")) for path in folder.iterdir()
    }
    assert [path.name for path in tmp_path.iterdir()] == ["inner"]
    assert len({name.lower() for name in contents(folder)}) == count + 1


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (1, "1")])
def test_keys_that_look_alike_are_not_the_same_run(number: int, text: str, tmp_path: Path) -> None:
    keys: list[Any] = [number]
    func = ad.per_sample(lambda x: {sys.modules[__name__].KEYS[0]: x})
    sys.modules[__name__].KEYS = keys  # type: ignore[attr-defined]
    func(X, out=tmp_path / "out")
    keys[0] = text
    with pytest.raises(ResumeError, match=r"other keys.*result\[0\]|other keys.*result\[1\]"):
        func(X, out=tmp_path / "out")


@pytest.mark.usefixtures("every_chunk_is_entered")
@pytest.mark.parametrize("source", ["tensors", "loader"])
@pytest.mark.parametrize("rows", [None, 1])
def test_a_file_that_has_lost_its_end_is_refused(
    source: str, rows: int | None, tmp_path: Path, stop_after: Any
) -> None:
    path = tmp_path / "h.npy"
    options: dict[str, Any] = {"chunk_size": 3} if rows is None else {"row_chunk_size": rows}
    curvature = ad.per_sample(ad.hessian(stopping), (None, 0), **options)

    def run() -> Any:
        return curvature(W, X if source == "tensors" else iter([X[:10], X[10:]]), out=path)

    stop_after(2)
    with pytest.raises(Interrupted):
        run()
    stop_after(10**9)
    whole = path.read_bytes()
    for size in (len(whole) - 1, 128, 127, 5, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(ResumeError, match=r"Remove it and its journal to begin anew"):
            run()
    other = np.zeros((20, 3, 3), dtype=np.float64)
    np.save(path, other)
    with pytest.raises(ResumeError, match=r"holds numbers of shape .* and dtype float64"):
        run()
    path.write_bytes(whole)
    assert torch.equal(run(), torch.stack([ad.hessian(stopping)(W, x) for x in X]))


def test_of_many_files_one_is_missing(tmp_path: Path, stop_after: Any, every_chunk_is_entered: None) -> None:
    curvature = ad.per_sample(ad.hessian(lambda p, x: stopping(p[0], x) * p[1]), (None, 0), chunk_size=3)
    stop_after(2)
    with pytest.raises(Interrupted):
        curvature((W, torch.ones(())), X, out=tmp_path / "h")
    stop_after(10**9)
    (tmp_path / "h" / "0.1.npy").unlink()
    before = contents(tmp_path)
    with pytest.raises(ResumeError, match=r"0.1.npy is missing"):
        curvature((W, torch.ones(())), X, out=tmp_path / "h")
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("every_chunk_is_entered")
@pytest.mark.parametrize("source", ["tensors", "loader"])
@pytest.mark.parametrize("target", ["h.npy", "h"])
def test_whatever_happens_to_a_journal_the_result_is_right_or_refused(
    target: str, source: str, tmp_path: Path, stop_after: Any
) -> None:
    def run(folder: Path) -> Any:
        curvature = ad.per_sample(ad.hessian(stopping), (None, 0), chunk_size=3, on_error="nan")
        return curvature(W, x if source == "tensors" else iter([x[:7], x[7:]]), out=folder / target)

    x = X.clone()
    x[[2, 9]] = float("nan")
    journal = "h.npy.journal" if target == "h.npy" else "h/journal"
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    whole.mkdir()
    expected = run(whole)
    stop_after(5)
    with pytest.raises(Interrupted):
        run(torn)
    stop_after(10**9)
    text = (torn / journal).read_bytes()
    first = text.index(b"\n") + 1
    draw = random.Random(0)
    places = [*draw.sample(range(3, first), 6), *draw.sample(range(first, len(text)), 12)]
    damages: list[tuple[bytes, bool]] = [(text[:at], at < first) for at in (0, *places)]
    damages += [(text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :], at < first) for at in places]
    damages += [(text + b"\0" * 50, False), (text + text, False), (text[:-20] + b"\0" * 4096, False)]
    damages += [(b'{"a": 1}\n', True), (b"[1]\n\n", True), (b"precious", True), (b"\xff\xfe\n", True)]
    damages += [(b'{"per_sample": 1, "run": {}, "files": ["h.npy"]}\n', True)]
    for damaged, refused in damages:
        copy = tmp_path / "copy"
        shutil.copytree(torn, copy)
        (copy / journal).write_bytes(damaged)
        if refused:
            before = contents(copy)
            with pytest.raises(ResumeError, match=r"journal is damaged, of another version .* Remove both"):
                run(copy)
            assert contents(copy) == before
        else:
            assert torch.equal(run(copy).nan_to_num(7.0), expected.nan_to_num(7.0))
            assert all(
                (copy / name).read_bytes() == data
                for name, data in contents(whole).items()
                if not name.endswith("journal")
            )
        shutil.rmtree(copy)


def test_a_journal_grows_with_what_it_tells(tmp_path: Path, every_chunk_is_entered: None) -> None:
    """Every failure is entered once, and the state of random generators where it has changed."""

    def journal_of(samples: int) -> int:
        x = torch.full((samples,), float("nan"))
        x[0] = 1.0
        path = tmp_path / f"{samples}.npy"
        run = ad.per_sample(torch.sin, chunk_size=2, on_error="nan", randomness="same")
        run(x, out=path)
        assert list(run.report.failed) == list(range(1, samples))
        again = ad.per_sample(torch.sin, chunk_size=2, on_error="nan", randomness="same")
        again(x, out=path)
        assert again.report.failed == run.report.failed
        return path.with_name(path.name + ".journal").stat().st_size

    small, large = journal_of(200), journal_of(1000)
    assert (large - small) / 800 < 120 + len("the result holds infinities or NaN")


@pytest.mark.usefixtures("every_chunk_is_entered")
@pytest.mark.parametrize("target", ["h.npy", "h"])
@pytest.mark.parametrize("source", ["tensors", "loader"])
def test_a_run_on_a_full_disk_resumes(source: str, target: str, tmp_path: Path) -> None:
    """Every write in turn finds the disk full, and has written a part or nothing."""
    run = ad.per_sample(ad.hessian(lambda p, x: stopping(p[0], x) * p[1]), (None, 0), chunk_size=8)
    if target == "h.npy":
        run = ad.per_sample(ad.hessian(stopping), (None, 0), chunk_size=8)
    params: Any = W if target == "h.npy" else (W, torch.ones(()))

    def batches() -> Any:
        return X if source == "tensors" else iter([X[:9], X[9:]])

    expected = run(params, batches())
    write, open_of = io.FileIO.write, Path.open
    left = 0

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            nonlocal left
            if left == 0:
                raise OSError(28, "No space left on device")
            left -= 1
            return write(self, data if left else memoryview(data)[: len(data) // 2])

    def opened(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        return (
            Full(self, mode.replace("b", ""))
            if options.get("buffering") == 0
            else open_of(self, mode, *args, **options)
        )

    for writes in range(40):
        left = writes
        path = tmp_path / str(writes) / target
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Path, "open", opened)
            try:
                run(params, batches(), out=path)
                break
            except OSError as error:
                assert error.errno == 28  # noqa: PT017
        assert_close(run(params, batches(), out=path), expected, rtol=0, atol=0)
    assert writes > 5


def test_a_second_run_that_learns_its_chunks_resumes(tmp_path: Path) -> None:
    inner = ad.vmap(lambda x: x.sin(), chunk_size="auto")
    run = ad.per_sample(inner)
    first = run(X, out=tmp_path / "sin.npy")
    assert torch.equal(run(X, out=tmp_path / "sin.npy"), first)
    assert run.report.resumed_at == 20


def test_the_structure_of_the_arguments_is_part_of_the_run(tmp_path: Path) -> None:
    """Leaves in the same order under other names are other arguments."""
    run = ad.per_sample(lambda p, x: p["a"] - p["b"] + x["c"], (None, 0))
    one, two = torch.ones(()), torch.zeros(())
    run({"a": one, "b": two}, {"c": X}, out=tmp_path / "d.npy")
    with pytest.raises(ResumeError, match="other shared arguments"):
        run({"b": one, "a": two}, {"c": X}, out=tmp_path / "d.npy")
    sums = ad.per_sample(lambda x: x["a"] - 2 * x["b"])
    batches = [{"a": X, "b": X + 1}, {"a": X + 2, "b": X + 3}]
    sums(iter(batches), out=tmp_path / "e.npy")
    with pytest.raises(ResumeError, match="other samples in batch 1"):
        sums(iter([batches[0], {"b": X + 2, "a": X + 3}]), out=tmp_path / "e.npy")


@pytest.mark.parametrize("batches", [1, 3])
def test_fewer_or_more_batches_are_another_run(batches: int, tmp_path: Path) -> None:
    run = ad.per_sample(torch.sin)
    run(iter([X[:5], X[5:9]]), out=tmp_path / "s.npy")
    with pytest.raises(ResumeError, match="other samples"):
        run(iter([X[:5], X[5:9], X[9:]][:batches]), out=tmp_path / "s.npy")


def test_empty_batches_are_batches(tmp_path: Path) -> None:
    run = ad.per_sample(torch.sin)
    for _ in range(2):
        result = run(iter([X[:0], X[:5], X[:0], X[5:], X[:0]]), out=tmp_path / "s.npy")
        assert_close(result, X.sin())


def test_settings_of_torch_are_part_of_the_run(tmp_path: Path) -> None:
    run = ad.per_sample(lambda x: x * torch.tensor(0.1))
    run(X, out=tmp_path / "x.npy")
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(ResumeError, match="other settings of torch"):
            run(X, out=tmp_path / "x.npy")
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_cannot_be_compared_cannot_be_resumed(tmp_path: Path) -> None:
    numbers = (number for number in range(100))

    def func(x: Tensor) -> Tensor:
        return x * next(numbers)

    ad.per_sample(func, chunk_size=30)(X, out=tmp_path / "x.npy")
    with pytest.raises(
        ResumeError,
        match=r"cannot be resumed: among its code or captured values is numbers, a builtins.generator",
    ):
        ad.per_sample(func, chunk_size=30)(X, out=tmp_path / "x.npy")


def test_the_value_that_has_changed_is_named(tmp_path: Path) -> None:
    class Counting:
        def __init__(self) -> None:
            self.settings = {"calls": 0}

        def __call__(self, x: Tensor) -> Tensor:
            self.settings["calls"] += 1
            return x.sin()

    model = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Tanh())
    for func, place in (
        (Counting(), r"func.settings\['calls'\]"),
        (lambda x: model(x).sum() * x, r"model._modules\['0'\]._parameters\['weight'\]"),
    ):
        path = tmp_path / f"{type(func).__name__}.npy"
        ad.per_sample(func)(X, out=path)
        with torch.no_grad():
            model[0].weight += 1
        with pytest.raises(
            ResumeError, match=rf"with other code or captured values \(the first that differs is {place}\)"
        ):
            ad.per_sample(func)(X, out=path)


def test_results_that_were_moved_are_found(tmp_path: Path) -> None:
    run = ad.per_sample(torch.sin)
    run(X, out=tmp_path / "one.npy")
    (tmp_path / "one.npy").rename(tmp_path / "two.npy")
    (tmp_path / "one.npy.journal").rename(tmp_path / "two.npy.journal")
    assert_close(run(X, out=tmp_path / "two.npy"), X.sin())
    assert run.report.resumed_at == 20
    run(X, out=tmp_path / "folder")
    (tmp_path / "folder").rename(tmp_path / "moved")
    run(X, out=tmp_path / "moved")
    assert run.report.resumed_at == 20


def test_files_of_somebody_else_beside_a_journal(tmp_path: Path) -> None:
    """The results may be removed, to begin anew; what else is in the folder by then stays."""
    run = ad.per_sample(torch.sin)
    run(X, out=tmp_path / "s")
    (tmp_path / "s" / "notes.txt").write_text("mine")
    run(X, out=tmp_path / "s")
    assert run.report.resumed_at == 20
    (tmp_path / "s" / "result.npy").unlink()
    before = contents(tmp_path)
    with pytest.raises(ResumeError, match="holds other files than its journal lists"):
        run(X, out=tmp_path / "s")
    assert contents(tmp_path) == before
    (tmp_path / "s" / "notes.txt").unlink()
    assert_close(run(X, out=tmp_path / "s"), X.sin())


def test_paths_of_bytes(tmp_path: Path) -> None:
    assert_close(ad.per_sample(torch.sin)(X, out=os.fsencode(tmp_path / "s.npy")), X.sin())
    assert sorted(contents(tmp_path)) == ["s.npy", "s.npy.journal"]


def test_paths_that_move(tmp_path: Path, monkeypatch: Any, every_chunk_is_entered: None) -> None:
    """A relative path, and a function that changes the folder; symbolic links to files and folders."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def func(x: Tensor) -> Tensor:
        os.chdir(tmp_path / "elsewhere")
        return x.sin()

    run = ad.per_sample(func, chunk_size=6)
    assert_close(run(X, out="s.npy"), X.sin())
    monkeypatch.chdir(tmp_path)
    assert_close(run(X, out="s.npy"), X.sin())
    assert sorted(contents(tmp_path)) == ["s.npy", "s.npy.journal"]
    (tmp_path / "link.npy").symlink_to("s.npy")
    (tmp_path / "folder").symlink_to("elsewhere")
    plain = ad.per_sample(torch.sin)
    assert_close(run(X, out=tmp_path / "link.npy"), X.sin())
    assert run.report.resumed_at == 20
    for _ in range(2):
        assert_close(plain(X, out=tmp_path / "folder"), X.sin())
    assert (tmp_path / "elsewhere" / "journal").exists()
    with pytest.raises(ResumeError, match="has no journal"):
        plain(X, out=tmp_path / "s.npy.journal")


def test_a_complete_run_needs_no_permission_to_write(tmp_path: Path, monkeypatch: Any) -> None:
    run = ad.per_sample(torch.sin)
    run(X, out=tmp_path / "s.npy")
    open_of = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        assert mode in ("r", "rb")
        return open_of(self, mode, *args, **options)

    monkeypatch.setattr(Path, "open", opened)
    assert_close(run(X, out=tmp_path / "s.npy"), X.sin())


def test_a_run_of_another_thread_is_not_disturbed(tmp_path: Path, every_chunk_is_entered: None) -> None:
    path = tmp_path / "s.npy"
    entered, go_on = threading.Event(), threading.Event()

    def waits() -> Any:
        yield X[:5]
        yield X[5:9]
        entered.set()
        assert go_on.wait(60)
        yield X[9:]

    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(ad.per_sample(torch.sin)(waits(), out=path)))
    thread.start()
    assert entered.wait(60)
    with pytest.raises(ResumeError, match="being written by another run"):
        ad.per_sample(torch.sin)(iter([X[:5], X[5:9], X[9:]]), out=path)
    go_on.set()
    thread.join()
    assert_close(results[0], X.sin())
    assert_close(ad.per_sample(torch.sin)(iter([X[:5], X[5:9], X[9:]]), out=path), X.sin())
