"""Results on disk: .npy files, and beside them a journal from which an interrupted run is resumed.

A chunk is written first and entered in the journal afterwards, so that all chunks in the journal are complete. The
files are not mapped while they are written, so that what is written takes no memory.
"""

from __future__ import annotations

import os
import re
import time
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from autodiff.errors import DtypeError, OptionError, ResumeError
from autodiff.samples.fingerprint import OPAQUE, difference, fingerprint
from autodiff.samples.journal import Journal
from autodiff.samples.results import nan, with_tensors
from autodiff.samples.sinks import Sink

if TYPE_CHECKING:
    from torch import Tensor

    from autodiff.core.specs import TensorSpec
    from autodiff.samples.results import JacobianRows, Result, Template

# Entries are written to the journal, and files to the disk, at most this often.
SECONDS_BETWEEN_COMMITS = 1.0
_VERSION = 2


class NpyFile:
    """One .npy file, written piece by piece: ``[samples, *spec.shape]`` in C order.

    It grows where ``samples`` is None. One that is there has had ``size`` bytes.
    """

    def __init__(self, path: Path, spec: TensorSpec, samples: int | None, mode: str, size: int) -> None:
        self.path, self._spec, self._samples = path, spec, samples
        self._dtype = _numpy_dtype(spec.dtype)
        self._start = 0
        self._file = path.open(mode, buffering=0)
        try:
            if mode == "w+b":
                self._write_header(samples or 0)
                self._file.truncate(self._start + (samples or 0) * spec.nbytes)
            else:
                self._check(size)
        except BaseException:
            self._file.close()
            raise

    def _write_header(self, samples: int) -> None:
        """The header; that of a growing file is padded by NumPy so that it can be written again."""
        import numpy as np  # noqa: PLC0415  torch works without it

        self._file.seek(0)
        shape = (samples, *self._spec.shape)
        described = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": shape,
        }
        np.lib.format.write_array_header_1_0(self._file, described)
        self._start = self._file.tell()

    def _check(self, size: int) -> None:
        import numpy as np  # noqa: PLC0415

        found = os.fstat(self._file.fileno()).st_size
        if found < size:
            self._raise_damaged(f"has {found} bytes, and had {size} when the journal was written")
        try:
            np.lib.format.read_magic(self._file)
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(self._file)
        except Exception as error:  # noqa: BLE001  it is parsed as Python, which fails in many ways
            if self._samples is not None or not self._file.writable():
                self._raise_damaged(f"has no header of a .npy file ({error})")
            self._write_header(0)  # it was cut short while it was written again
            return
        samples = shape[:1] if self._samples is None else (self._samples,)
        if (shape, fortran_order, dtype) != ((*samples, *self._spec.shape), False, self._dtype):
            self._raise_damaged(f"holds numbers of shape {shape} and dtype {dtype}")
        self._start = self._file.tell()

    def _raise_damaged(self, what: str) -> NoReturn:
        raise ResumeError(
            f"per_sample: {self.path} {what}. Expected the file as the interrupted run left it. Remove it and its "
            f"journal to begin anew, or choose another path."
        )

    def write(self, sample: int, offset: int, tensor: Tensor) -> None:
        """Write numbers of one sample or more, ``offset`` numbers behind the beginning of ``sample``."""
        whole = tensor.detach().to("cpu", self._spec.dtype).resolve_conj().resolve_neg().contiguous()
        data = memoryview(whole.reshape(-1).view(torch.uint8).numpy().data)
        self._file.seek(self._start + sample * self._spec.nbytes + offset * self._spec.dtype.itemsize)
        while data:
            data = data[self._file.write(data) :]

    def sync(self, samples: int) -> int:
        """Write everything to the disk; the header of a growing file says ``samples``. Returns the file's size."""
        if self._samples is None:
            self._write_header(samples)
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def mapped(self) -> Tensor:
        """The file as a tensor whose pages are read when they are used; writing to it leaves the file alone."""
        import numpy as np  # noqa: PLC0415

        array = np.load(self.path, mmap_mode="c")
        return torch.from_numpy(array)


class FileSink(Sink):
    """Results in ``path``: one .npy file, or a folder of one for each tensor of the result.

    ``header`` identifies the run: a file of another run is an error. ``resumed`` is the state from which to
    continue, None for a new run.
    """

    def __init__(
        self, path: str | bytes | os.PathLike[Any], header: dict[str, str], samples: int | None
    ) -> None:
        given = Path(os.fsdecode(path))
        self._single = given.suffix == ".npy"
        # Absolute, as the function may change the folder in which the process runs.
        self._path = given.resolve()
        self._folder = self._path.parent if self._single else self._path
        beside = self._path.with_name(self._path.name + ".journal")
        self._journal = Journal(beside if self._single else self._path / "journal")
        self._samples, self._header = samples, header
        self._arrays: list[NpyFile] = []
        self._batches: list[str] = []  # fingerprints
        self._entered = 0  # how many of them are in the journal
        self._state: dict[str, Any] = {}  # the last one in the journal
        self._pending: dict[str, Any] | None = None  # the next one
        self._new_failures: dict[int, str] = {}
        self._committed = time.monotonic()
        self._sizes: list[int] = []
        self.resumed: dict[str, Any] | None = None
        self.failed: dict[int, str] = {}
        self.complete = False
        try:
            self._resume()
        except BaseException:
            self._journal.close()
            raise

    # The journal.

    def _resume(self) -> None:
        """Find the state of an earlier run, after a check that it is this one."""
        entries = self._journal.entries
        if not entries:
            self._check_free()
            return
        first, *others = entries
        files = [self._file(name) for _, name, _, _ in first.get("files", [])]
        if not any(file.exists() for file in files):
            # Whoever removes the files wants new ones.
            self._check_free()
            self._journal.restart()
            return
        if first["per_sample"] != _VERSION:
            self._raise_foreign()
        for what, value in self._header.items():
            self._check(what, first["run"].get(what, ""), value, "function, arguments and options")
        for entry in others:
            if "batch" in entry:
                # By its number: one may be entered twice where a run was interrupted meanwhile.
                self._batches[entry["batch"] :] = [entry["samples"]]
            else:
                self.failed.update({int(sample): why for sample, why in entry.pop("failed").items()})
                self._state.update(entry)
        self._entered = len(self._batches)
        if not self._state:
            return  # a run that ended before it had anything to continue from
        for file in files:
            if not file.exists():
                raise ResumeError(
                    f"per_sample: {file} is missing, but the journal lists it. Expected all files of the interrupted "
                    f"run. Remove {self._path.name} to begin anew, or choose another path."
                )
        self._sizes, self.complete = self._state["sizes"], self._state["complete"]
        self.resumed = self._state
        if not self.complete:
            self._journal.hold()

    def _check_free(self) -> None:
        """Whether nothing of somebody else's would be overwritten."""
        journal = self._journal.path
        if self._path.is_dir() and not self._single:
            taken = any(path != journal for path in self._path.iterdir())
        else:
            taken = self._path.exists()
        listed = bool(self._journal.entries)
        if journal.exists() and not listed and (taken or not self._journal.mine):
            self._raise_foreign()
        if taken:
            what = (
                "holds other files than its journal lists"
                if listed
                else "exists, but has no journal of per_sample beside it"
            )
            raise ResumeError(
                f"per_sample: {self._path} {what}. Expected a path that is free, or that of an interrupted run. Remove "
                f"it, or choose another path."
            )

    def _raise_foreign(self) -> NoReturn:
        raise ResumeError(
            f"per_sample: {self._journal.path} is damaged, of another version of autodiff, or somebody else's: it does "
            f"not begin as a journal does, so that nobody knows what is in {self._path.name}. Remove both to begin "
            f"anew, or choose another path."
        )

    def _check(self, what: str, known: str, value: str, expected: str) -> None:
        opaque = next((text for text in (value, known) if text.startswith(OPAQUE)), None)
        if opaque is not None:
            raise ResumeError(
                f"per_sample: {self._path} holds results of a run that cannot be resumed: among its {what} is "
                f"{opaque.removeprefix(OPAQUE)}, of which nobody knows whether it is the same. Expected functions of "
                f"numbers, strings, tensors, modules, and objects of them. Leave it out, or choose another path."
            )
        if known != value:
            place = difference(value, known)
            what += "" if place is None else f" (the first that differs is {place})"
            raise ResumeError(
                f"per_sample: {self._path} holds results of another run, with other {what}. Expected the same "
                f"{expected}. Choose another path, or remove {self._path.name} and its journal."
            )

    def begin_batch(self, index: int, samples: str) -> None:
        """Enter a batch by its fingerprint, or check that it is the one of the earlier run."""
        if index == len(self._batches):
            if self.complete:
                self._check("samples: more than there were", "", samples, "samples in the same order")
            self._batches.append(samples)
            return
        self._check(f"samples in batch {index}", self._batches[index], samples, "samples in the same order")

    def end_batches(self, count: int) -> None:
        """Check that there were as many batches as in the earlier run."""
        if count < len(self._batches):
            self._check(f"samples: {len(self._batches)} batches", "", str(count), "samples in the same order")

    def commit(self, state: dict[str, Any], failed: dict[int, str], *, complete: bool = False) -> None:
        """Enter a state: everything before its position is done, and the run can be resumed from it."""
        self._pending = {**state, "complete": complete}
        # They are in the order in which they failed.
        for sample in takewhile(lambda sample: sample not in self.failed, reversed(failed)):
            self._new_failures[sample] = failed[sample]
        self.failed.update(self._new_failures)
        if complete or time.monotonic() - self._committed > SECONDS_BETWEEN_COMMITS:
            self.flush()

    def flush(self) -> None:
        """Write the results to the disk, and then the journal's entries about them."""
        if not self._arrays or self._pending is None:
            return
        state = {**self._pending, "sizes": [array.sync(self._pending["sample"]) for array in self._arrays]}
        new = enumerate(self._batches[self._entered :], self._entered)
        batches = [{"batch": number, "samples": samples} for number, samples in new]
        # Only what has changed: the state of random generators is large.
        changed = {key: value for key, value in state.items() if self._state.get(key, _MISSING) != value}
        self._journal.append([*batches, {**changed, "failed": dict(sorted(self._new_failures.items()))}])
        self._entered, self._state, self._pending = len(self._batches), state, None
        self._new_failures = {}
        self._committed = time.monotonic()

    def close(self) -> None:
        """Close the files."""
        try:
            self.flush()
        finally:
            for array in self._arrays:
                array.close()
            self._journal.close()

    # The results.

    def open(self, template: Template) -> None:
        super().open(template)
        specs = template.tensors()
        for spec in specs:
            _numpy_dtype(spec.dtype)
        paths = self._paths(template)
        files = [
            [place, "" if self._single else path.name, str(spec.dtype), list(spec.shape)]
            for place, path, spec in zip(template.places(), paths, specs, strict=True)
        ]
        constants = fingerprint(template.constants())
        first = {"per_sample": _VERSION, "run": self._header, "files": files, "constants": constants}
        if self.resumed is None:
            self._begin(first, paths)
            mode = "w+b"
        else:
            known = self._journal.entries[0]
            if (files, constants) != (known["files"], known["constants"]):
                raise ResumeError(
                    f"per_sample: {self._path} holds results with other keys, shapes, dtypes or constants than the "
                    f"result has now: {known['files']} before, {files} now. Expected a function that gives the same "
                    f"as before. Choose another path, or remove {self._path.name} and its journal."
                )
            mode = "rb" if self.complete else "r+b"
        for path, spec, size in zip(paths, specs, self._sizes or [0] * len(paths), strict=True):
            self._arrays.append(NpyFile(path, spec, self._samples, mode, size))

    def _begin(self, first: dict[str, Any], paths: list[Path]) -> None:
        """Begin a journal; files of a run that ended before it had entered anything are removed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._journal.hold()
        known = self._journal.entries[0]["files"] if self._journal.entries else []
        for _, name, _, _ in known:
            self._file(name).unlink(missing_ok=True)
        for path in paths:
            if path.exists():
                raise ResumeError(
                    f"per_sample: {path} exists, but does not belong to this run. Expected a path that is free. Remove "
                    f"it, or choose another path."
                )
        # The journal first: a run that is interrupted in between has no file, and starts again.
        self._journal.restart()
        self._journal.append([first])

    def _file(self, name: str) -> Path:
        return self._path if self._single else self._folder / name

    def _paths(self, template: Template) -> list[Path]:
        names = template.names()
        if not self._single:
            return [self._folder / name for name in file_names(names)]
        if len(names) != 1:
            raise OptionError(
                f"per_sample: out={str(self._path)!r} is one .npy file, but the result has {len(names)} tensors. Use "
                f"as_matrix=True for one matrix a sample, or name a folder (no .npy) for a file a tensor."
            )
        return [self._path]

    def put(self, start: int, stop: int, result: Result) -> None:
        del stop
        for array, leaf in zip(self._arrays, result.tensors(), strict=True):
            sample = start
            for portion in leaf.portions():
                array.write(sample, 0, portion)
                sample += len(portion)

    def put_rows(self, sample: int, rows: JacobianRows) -> None:
        for leaf, first, piece in rows.pieces:
            self._arrays[leaf].write(sample, first * (piece.numel() // max(len(piece), 1)), piece)

    def put_nan(self, sample: int) -> None:
        assert self.template is not None
        for array, spec in zip(self._arrays, self.template.tensors(), strict=True):
            array.write(sample, 0, nan(spec, sample).expand(spec.shape))

    def tree(self) -> Any:
        assert self.template is not None
        return with_tensors(self.template, [array.mapped() for array in self._arrays])


_MISSING = object()


def file_names(places: list[str]) -> list[str]:
    """A file name for each place in a tree: the place itself where every file system can hold it, and no two are alike.

    >>> file_names(["2.bias", "2.weight"]), file_names(["w", "W", "../w", ""])
    (['2.bias.npy', '2.weight.npy'], ['w.npy', 'W~1.npy', '_._w~2.npy', 'result.npy'])
    """
    names: list[str] = []
    taken: set[str] = set()
    for position, place in enumerate(places):
        name = re.sub(r"[^A-Za-z0-9_.-]|^\.", "_", place or "result")[:100]
        # Some file systems do not distinguish capital letters.
        if name != (place or "result") or name.lower() in taken:
            name = f"{name}~{position}"
        taken.add(name.lower())
        names.append(f"{name}.npy")
    return names


def _numpy_dtype(dtype: torch.dtype) -> Any:
    try:
        return torch.empty(0, dtype=dtype).numpy().dtype
    except TypeError:
        raise DtypeError(
            f"per_sample: .npy files have no {dtype}. Expected a dtype that NumPy has; convert the result, as in "
            f"lambda *args: func(*args).float()."
        ) from None
    except RuntimeError as error:
        raise OptionError(
            f"per_sample: writing to disk needs NumPy, which torch cannot find ({error}). Install it: pip install "
            f"'autodiff[disk]'."
        ) from None
