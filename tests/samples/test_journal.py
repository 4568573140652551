"""Journals: what damage leaves of them, and who may write to them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from autodiff.errors import ResumeError
from autodiff.samples.journal import Journal

if TYPE_CHECKING:
    from pathlib import Path

ENTRIES: list[dict[str, Any]] = [
    {"per_sample": 2, "run": {"options": "x"}, "files": [["result", "h.npy", "torch.float32", [3]]]},
    {"batch": "abc"},
    {"sample": 3, "row": 0, "failed": {"2": 'said "no", \\ and a line\nmore'}},
    {"sample": 6, "failed": {}},
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "journal"
    append(path, ENTRIES[:1])
    append(path, ENTRIES[1:3])
    append(path, ENTRIES[3:])
    return path


def append(path: Path, entries: list[dict[str, Any]]) -> None:
    with contextlib.closing(Journal(path)) as journal:
        journal.hold()
        journal.append(entries)


def test_entries_are_read_as_they_were_written(path: Path) -> None:
    assert Journal(path).entries == ENTRIES


def test_a_journal_that_is_cut_short_keeps_its_beginning(path: Path) -> None:
    whole = path.read_bytes()
    ends = [at for at, byte in enumerate(whole, 1) if byte == ord("\n")]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        count = sum(end <= size for end in ends)
        journal = Journal(path)
        assert journal.entries == ENTRIES[:count]
        assert journal.mine


def test_what_is_appended_to_a_torn_journal_can_be_read(path: Path) -> None:
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        kept = Journal(path).entries
        append(path, [{"sample": 9}])
        assert Journal(path).entries == [*kept, {"sample": 9}]


def test_no_changed_byte_goes_unnoticed(path: Path) -> None:
    whole = path.read_bytes()
    for at, byte in enumerate(whole[:-1]):
        for other in (byte ^ 1, byte ^ 128, 0, ord("\n")):
            if other != byte:
                path.write_bytes(whole[:at] + bytes([other]) + whole[at + 1 :])
                assert Journal(path).entries == ENTRIES[: whole[:at].count(b"\n")]


def test_lines_that_are_missing_or_exchanged_are_noticed(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[2], lines[3]]))
    assert Journal(path).entries == ENTRIES[:1]
    path.write_bytes(b"".join([lines[0], lines[2], lines[1], lines[3]]))
    assert Journal(path).entries == ENTRIES[:1]


def test_an_entry_that_could_not_be_written_is_written_again(path: Path, monkeypatch: Any) -> None:
    """As on a disk that is full: half of a line is there."""
    journal = Journal(path)
    journal.hold()
    file: Any = journal._file

    class Full:
        def __getattr__(self, name: str) -> Any:
            return getattr(file, name)

        def write(self, data: Any) -> int:
            if len(data) < 20:
                raise OSError(28, "No space left on device")
            return int(file.write(data[:10]))

    journal._file = Full()  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space"):
        journal.append([{"sample": 9}])
    journal._file = file
    journal.append([{"sample": 9}])
    journal.close()
    assert Journal(path).entries == [*ENTRIES, {"sample": 9}]


@pytest.mark.parametrize("text", ["precious", '{"a": 1}\n', "[]", "\0\0\0\0"])
def test_other_files_are_nobody_s_journals(text: str, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_text(text)
    journal = Journal(path)
    assert (journal.entries, journal.mine) == ([], False)


OTHER = """
import pathlib, sys
from autodiff.errors import ResumeError
from autodiff.samples.journal import Journal
journal = Journal(pathlib.Path(sys.argv[1]))
try:
    journal.hold()
    print("held", flush=True)
    sys.stdin.readline()
except ResumeError as error:
    print(error)
"""


def test_one_process_writes_at_a_time(path: Path) -> None:
    command = [sys.executable, "-c", OTHER, str(path)]
    mine = Journal(path)
    mine.hold()
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "journal is being written by another run. Expected a path of one run at a time" in run.stdout
    with pytest.raises(ResumeError, match="being written"):
        Journal(path)
    mine.close()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ResumeError, match="being written"):
            Journal(path).hold()
        other.kill()
    append(path, [])  # a process that was killed holds nothing


def test_a_journal_that_another_run_has_continued_is_not_written_to(path: Path) -> None:
    mine = Journal(path)
    append(path, [{"sample": 9}])
    with pytest.raises(ResumeError, match="being written"):
        mine.hold()
    assert Journal(path).entries == [*ENTRIES, {"sample": 9}]
