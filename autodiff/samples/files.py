"""Results on disk: .npy files, and beside them a journal from which an interrupted run is resumed.

A chunk is written first and entered in the journal afterwards, so that all chunks in the journal are complete. The
files are not mapped while they are written, so that what is written takes no memory.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from autodiff.errors import DtypeError, OptionError, ResumeError
from autodiff.samples.results import nan, with_tensors
from autodiff.samples.sinks import Sink

if TYPE_CHECKING:
    from torch import Tensor

    from autodiff.core.specs import TensorSpec
    from autodiff.samples.results import JacobianRows, Result, Template

# Entries are written to the journal, and files to the disk, at most this often.
SECONDS_BETWEEN_COMMITS = 1.0
_VERSION = 1


class NpyFile:
    """One .npy file, written piece by piece: ``[samples, *spec.shape]`` in C order."""

    def __init__(self, path: Path, spec: TensorSpec, samples: int | None, *, new: bool) -> None:
        import numpy as np  # noqa: PLC0415  torch works without it

        self.path, self._spec = path, spec
        self._dtype = _numpy_dtype(spec.dtype)
        self._grows, self._start = samples is None, 0
        self._file = path.open("w+b" if new else "r+b", buffering=0)
        if new:
            self._write_header(0 if samples is None else samples)
            if samples is not None:
                self._file.truncate(self._start + samples * spec.nbytes)
        else:
            np.lib.format.read_magic(self._file)
            np.lib.format.read_array_header_1_0(self._file)
            self._start = self._file.tell()

    def _write_header(self, samples: int) -> None:
        """The header; that of a growing file is padded by NumPy so that it can be written again."""
        import numpy as np  # noqa: PLC0415

        self._file.seek(0)
        shape = (samples, *self._spec.shape)
        described = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": shape,
        }
        np.lib.format.write_array_header_1_0(self._file, described)
        self._start = self._file.tell()

    def write(self, sample: int, offset: int, tensor: Tensor) -> None:
        """Write numbers of one sample or more, ``offset`` numbers behind the beginning of ``sample``."""
        whole = tensor.detach().to("cpu", self._spec.dtype).resolve_conj().resolve_neg().contiguous()
        data = memoryview(whole.reshape(-1).view(torch.uint8).numpy().data)
        self._file.seek(self._start + sample * self._spec.nbytes + offset * self._spec.dtype.itemsize)
        while data:
            data = data[self._file.write(data) :]

    def sync(self, samples: int) -> None:
        """Write everything to the disk; the header of a growing file says that it holds ``samples``."""
        if self._grows:
            self._write_header(samples)
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def mapped(self) -> Tensor:
        """The file as a tensor whose pages are read when they are used; writing to it leaves the file alone."""
        import numpy as np  # noqa: PLC0415

        array = np.load(self.path, mmap_mode="c")
        return torch.from_numpy(array)


class FileSink(Sink):
    """Results in ``path``: one .npy file, or a folder of one for each leaf.

    ``header`` identifies the run: a file of another run is an error. ``resumed`` is the journal's last
    entry, from which to continue, None for a new run.
    """

    def __init__(self, path: str | os.PathLike[str], header: dict[str, Any], samples: int | None) -> None:
        self._path = Path(path)
        self._samples, self._header = samples, header
        self._single = self._path.suffix == ".npy"
        beside = self._path.with_name(self._path.name + ".journal")
        self._journal_path = beside if self._single else self._path / "journal"
        self._arrays: list[NpyFile] = []
        self._pending: list[str] = []
        self._committed = time.monotonic()
        self._batches: dict[int, str] = {}
        self.finished = 0  # samples
        self.resumed: dict[str, Any] | None = None
        self.failed: dict[int, str] = {}
        self.complete = False
        self._entries = self._read()

    # The journal.

    def _read(self) -> list[dict[str, Any]]:
        """Entries of an earlier run, after a check that it is this one."""
        if not self._journal_path.exists():
            if self._path.exists() and (self._single or any(self._path.iterdir())):
                raise ResumeError(
                    f"per_sample: {self._path} exists, but has no journal of per_sample beside it. Expected a path "
                    f"that is free, or that of an interrupted run. Remove it, or choose another path."
                )
            return []
        text = self._journal_path.read_text()
        whole = text[: text.rfind("\n") + 1]  # the last entry may have been cut short
        entries = [json.loads(line) for line in whole.splitlines()]
        if not entries or not self._files_exist(entries[0]):
            return []
        self._check(entries[0]["run"])
        self._journal_size = len(whole.encode())
        for entry in entries[1:]:
            if "batch" in entry:
                self._batches[entry["batch"]] = entry["samples"]
            else:
                self.resumed = entry
                self.failed.update({int(sample): why for sample, why in entry["failed"].items()})
                self.complete = entry["complete"]
        self.finished = 0 if self.resumed is None else self.resumed["sample"]
        return entries

    def _files_exist(self, entry: dict[str, Any]) -> bool:
        return all((self._path.parent / name).exists() for name in entry["files"])

    def _check(self, run: dict[str, Any]) -> None:
        for what, value in self._header.items():
            if run.get(what) != value:
                self._raise_other_run(what, "function, arguments and options")

    def _raise_other_run(self, what: str, expected: str) -> NoReturn:
        raise ResumeError(
            f"per_sample: {self._path} holds results of another run, with other {what}. Expected the same {expected}. "
            f"Choose another path, or remove {self._path.name} and its journal."
        )

    def begin_batch(self, first: int, samples: str) -> None:
        """Enter a batch by its fingerprint, or check that it is the one of the earlier run."""
        known = self._batches.get(first)
        if known is None:
            self._batches[first] = samples
            self._pending.append(json.dumps({"batch": first, "samples": samples}))
        elif known != samples:
            self._raise_other_run(f"samples from number {first} on", "samples in the same order")

    def commit(self, state: dict[str, Any], failed: dict[int, str], *, complete: bool = False) -> None:
        """Enter a state: everything before its position is done, and the run can be resumed from it."""
        self.finished = state["sample"]
        self._pending.append(json.dumps({**state, "failed": failed, "complete": complete}))
        if complete or time.monotonic() - self._committed > SECONDS_BETWEEN_COMMITS:
            self.flush()

    def flush(self) -> None:
        """Write the results to the disk, and then the journal's entries about them."""
        if not self._arrays or not self._pending:
            return
        for array in self._arrays:
            array.sync(self.finished)
        with self._journal_path.open("a") as journal:
            journal.write("".join(f"{line}\n" for line in self._pending))
            journal.flush()
            os.fsync(journal.fileno())
        self._pending.clear()
        self._committed = time.monotonic()

    def close(self) -> None:
        """Close the files."""
        self.flush()
        for array in self._arrays:
            array.close()

    # The results.

    def open(self, template: Template) -> None:
        super().open(template)
        specs, names = template.tensors(), self._names(template)
        for spec in specs:
            _numpy_dtype(spec.dtype)
        new = not self._entries
        if not new:
            os.truncate(self._journal_path, self._journal_size)
        else:
            if not self._single:
                self._path.mkdir(parents=True, exist_ok=True)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            files = [str(path.relative_to(self._path.parent)) for path in names]
            first = json.dumps({"per_sample": _VERSION, "run": self._header, "files": files})
            # The journal first: a run that is interrupted in between has no file, and starts again.
            self._journal_path.write_text(f"{first}\n")
        self._arrays = [
            NpyFile(path, spec, self._samples, new=new) for path, spec in zip(names, specs, strict=True)
        ]

    def _names(self, template: Template) -> list[Path]:
        places = template.paths()
        if not self._single:
            return [self._path / f"{place or 'result'}.npy" for place in places]
        if len(places) != 1:
            raise OptionError(
                f"per_sample: out={str(self._path)!r} is one .npy file, but the result has {len(places)} tensors. Use "
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
