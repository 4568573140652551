"""The journal of a run on disk: entries, each a line of JSON with a checksum over all lines up to it.

Entries are only ever appended. Whatever a crash or a bad disk does to the file, the lines that are valid from its
beginning on describe a state from which the run can continue; the others are dropped. Provides `Journal`.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakValueDictionary

from autodiff.errors import ResumeError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from io import FileIO
    from pathlib import Path

_FIRST = b'{"per_sample": '


class Journal:
    """The entries of earlier runs, and a file to append more to.

    ``mine`` says whether the file, if there is one, is a journal or was to become one when its run was cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self._file: FileIO | None = None
        # Up to where the file is valid, the checksum of that part, and the size of the whole.
        self._size = self._checksum = self._found = 0
        if path in _held:  # to open and close the file would give up the lock of this process
            self._raise_held()
        data = path.read_bytes() if path.exists() else b""
        self.mine = data.startswith(_FIRST) or _FIRST.startswith(data)
        self._read(data)

    def _read(self, data: bytes) -> None:
        self._found = len(data)
        for line in data.split(b"\n")[:-1]:  # what follows the last end of a line was cut short
            text, _, checksum = line.rpartition(_SEAL)
            if checksum != b'%08x"}' % zlib.crc32(text, self._checksum):
                break
            self.entries.append(json.loads(text + b"}"))
            self._checksum = zlib.crc32(text, self._checksum)
            self._size += len(line) + 1

    def hold(self) -> None:
        """Keep other runs from writing to the file, until `close`."""
        if self._file is not None:
            return
        if _held.setdefault(self.path, self) is not self:
            self._raise_held()
        self._file = self.path.open("ab", buffering=0)
        try:
            if fcntl is not None:
                # A lock of this process, which its forked children, such as a loader's workers, do not inherit.
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                self._raise_held()
            # Otherwise the file system has no locks.
        if os.fstat(self._file.fileno()).st_size != self._found:
            self._raise_held()

    def _raise_held(self) -> NoReturn:
        self.close()
        raise ResumeError(
            f"per_sample: {self.path} is being written by another run. Expected a path of one run at a time. Wait "
            f"until that run has ended, or choose another path."
        )

    def restart(self) -> None:
        """Forget all entries."""
        self.entries.clear()
        self._size = self._checksum = 0

    def append(self, entries: list[dict[str, Any]]) -> None:
        """Write entries to the disk. Where that fails, they can be appended again."""
        assert self._file is not None
        lines, checksum = b"", self._checksum
        for entry in entries:
            text = json.dumps(entry)[:-1].encode()
            checksum = zlib.crc32(text, checksum)
            lines += text + _SEAL + b'%08x"}\n' % checksum
        self._file.truncate(self._size)
        remaining = memoryview(lines)
        while remaining:
            remaining = remaining[self._file.write(remaining) :]
        os.fsync(self._file.fileno())
        self._size, self._checksum = self._size + len(lines), checksum

    def close(self) -> None:
        """Close the file, and let other runs write to it."""
        if _held.get(self.path) is self:
            del _held[self.path]
        if self._file is not None:
            self._file.close()


_SEAL = b', "checksum": "'
# The journals to which this process writes, by their paths: a process is not locked out by its own locks.
_held: WeakValueDictionary[Path, Journal] = WeakValueDictionary()
