"""Names of the files of calibration inputs, and writing them so that only a complete pair ever has these names.

Beside the target lies a hidden working folder. Distinct tensors are appended to one file in it while the pipeline
runs; at the end they are copied into the archive, and archive and sidecar are renamed to their places.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn, cast

import torch
from torch import Tensor

from slim_core.checkpoint.folder_lock import empty_folder, lock_folder
from slim_core.errors import EnvError, InvalidDatasetError, SecurityError
from slim_core.logging import get_logger
from slim_sd.captured.archive import directory_digest

__all__ = ["FORMAT_VERSION", "Piece", "RecordWriter", "find_records", "json_values", "records_file", "sidecar_file"]

FORMAT_VERSION = 1
_ALIGNMENT = 64
_RELEASE_AFTER = 64 << 20
_logger = get_logger(__name__)


def records_file(folder: Path, expert: str | None = None) -> Path:
    """The file that is written: ``calib_data.pth``, or one per expert, ``calib_data_high_noise_model.pth``."""
    return folder / (f"calib_data_{expert}.pth" if expert else "calib_data.pth")


def find_records(folder: Path, expert: str | None = None, experts: Sequence[str] = ()) -> Path | None:
    """The file of calibration inputs in a folder: Slim's name, else one with a task in it, as msModelSlim writes it.

    Args:
        folder: it need not exist.
        expert: the transformer's name where a pipeline has several: ``calib_data_<task>_<expert>.pth`` is accepted.
        experts: names of all transformers, so that a file of one is not taken for that of a model with only one.

    Raises:
        InvalidDatasetError: there are several with a task and none without.
    """
    own = records_file(folder, expert)
    if own.exists() or own.is_symlink():
        return own
    ending = f"_{expert}.pth" if expert else "_.pth"
    other = tuple(f"_{name}.pth" for name in experts if name != expert)
    found = [
        path
        for path in sorted(folder.glob("calib_data_*.pth"))
        if path.name.endswith(ending) and not path.name.endswith(other)
    ]
    if len(found) > 1:
        raise InvalidDatasetError(
            f"there are several files of calibration inputs: {', '.join(path.name for path in found)}",
            where=str(folder),
            remedy=f"rename the one to use to {own.name}, or set dump_data_dir to a folder with one of them",
        )
    return found[0] if found else None


def sidecar_file(path: Path) -> Path:
    """``calib_data.json`` of ``calib_data.pth``: what was captured, from which model and with which settings."""
    return path.with_suffix(".json")


def json_values(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they come back from a sidecar: tuples are lists, what JSON has no form for is text."""
    return json.loads(json.dumps(dict(settings), default=str))


@dataclass(eq=False)
class Piece:
    """A tensor of a record: its shape, and where its bytes lie in the working file once they are written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = -1


@dataclass
class RecordWriter:
    """Writes ``path`` and its sidecar from tensors that are handed over one by one.

    Use as a context; whatever is not put in place by :meth:`finish` is removed at its end. What a killed capture left
    is removed by the next one.

    Raises:
        SecurityError: ``path`` is a folder or another thing that is no file.
        EnvError: another process is capturing to the same path, or the folder cannot be written to.
    """

    path: Path
    folder: Path = field(init=False)
    written: int = field(default=0, init=False)
    _known: dict[tuple[torch.dtype, bytes], int] = field(
        init=False, default_factory=dict[tuple[torch.dtype, bytes], int]
    )
    _lock: int | None = field(default=None, init=False)
    _file: BinaryIO | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.folder = self.path.parent / f".{self.path.name}.slim-capture"

    def __enter__(self) -> RecordWriter:
        if self.path.exists() and not self.path.is_file():
            raise SecurityError("is not a file, and is not replaced", where=str(self.path), remedy="move it away")
        with self._errors():
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._take_folder()
                self._file = (self.folder / "tensors").open("w+b")
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._cannot(error)

    def _cannot(self, error: OSError) -> NoReturn:
        raise EnvError(
            f"calibration inputs cannot be written: {error.strerror or error}",
            where=str(self.path),
            remedy="make room (the inputs are written twice), or set dump_data_dir to a folder on another disk",
        ) from error

    def _take_folder(self) -> None:
        """Create and lock the folder, and remove what a killed capture left in it."""
        self._lock = lock_folder(
            self.folder,
            "another run is capturing calibration inputs here",
            "wait until it has ended, or set another dump_data_dir",
        )
        empty_folder(self.folder)

    def close(self) -> None:
        """Remove what is not finished."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None
        if self._lock is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    def add(self, piece: Piece, tensor: Tensor) -> None:
        """Append a tensor's bytes, unless equal ones of the same type are there already.

        Args:
            piece: gets the place.
            tensor: contiguous, on the CPU.
        """
        if not tensor.numel():
            return
        data = tensor.view(-1).view(torch.uint8).numpy().data
        key = (tensor.dtype, hashlib.sha256(data).digest())
        offset = self._known.get(key)
        if offset is None:
            file = cast("BinaryIO", self._file)
            with self._errors():
                offset = -(-self.written // _ALIGNMENT) * _ALIGNMENT
                file.write(bytes(offset - self.written))
                file.write(data)
            self.written = offset + data.nbytes
            self._known[key] = offset
        piece.offset = offset

    def finish(self, records: Sequence[Sequence[Any]], description: Mapping[str, Any]) -> None:
        """Write the archive and its sidecar, and put both in place.

        Args:
            records: per call the list of arguments, with :class:`Piece` for tensors.
            description: what the sidecar says besides the archive's size and digest.
        """
        archive, sidecar = self.folder / "records.pth", self.folder / "records.json"
        with self._errors():
            self._write_archive(records, archive)
            size, digest = archive.stat().st_size, directory_digest(archive)
            with sidecar.open("w", encoding="utf-8") as stream:
                about = {
                    "format_version": FORMAT_VERSION,
                    **description,
                    "records": len(records),
                    "file": {"size": size, "digest": digest},
                }
                json.dump(about, stream, indent=2, ensure_ascii=False)
                stream.write("\n")
                stream.flush()
                os.fsync(stream.fileno())
            # In this order a run killed between the two leaves a sidecar that does not belong to the archive, never an
            # archive that nobody would check.
            os.replace(sidecar, sidecar_file(self.path))
            os.replace(archive, self.path)
            _sync_folder(self.path.parent)

    def _write_archive(self, records: Sequence[Sequence[Any]], path: Path) -> None:
        file = cast("BinaryIO", self._file)
        file.flush()
        # Written to by nobody from here on; a mapping for writing only spares a warning of torch.
        mapped = mmap.mmap(file.fileno(), self.written) if self.written else None
        storages: dict[tuple[torch.dtype, int], Tensor] = {}

        def tensor(piece: Piece) -> Tensor:
            count = torch.Size(piece.shape).numel()
            if not count:
                return torch.empty(piece.shape, dtype=piece.dtype)
            key = (piece.dtype, piece.offset)
            if key not in storages:
                storages[key] = torch.frombuffer(mapped, dtype=piece.dtype, count=count, offset=piece.offset)
            return storages[key].view(piece.shape)

        with path.open("wb") as target:
            output = _Output(target, mapped)
            try:
                torch.save([_with_tensors(list(record), tensor) for record in records], cast("IO[bytes]", output))
            except RuntimeError as error:
                raise output.error or error from error
            target.flush()
            os.fsync(target.fileno())


class _Output:
    """Where torch.save writes to. Pages of the working file are given back as they are copied.

    torch.save turns an error of ``write`` into a RuntimeError of its own: the true one is kept.
    """

    def __init__(self, file: BinaryIO, mapped: mmap.mmap | None) -> None:
        self._file = file
        self._mapped = mapped
        self._copied = 0
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self._copied += len(data)
        if self._mapped is not None and self._copied >= _RELEASE_AFTER:
            # Those of a shared mapping of a file: they come back from the file if they are needed again.
            self._mapped.madvise(mmap.MADV_DONTNEED)
            self._copied = 0
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def _with_tensors(value: Any, tensor: Any) -> Any:
    if isinstance(value, Piece):
        return tensor(value)
    if isinstance(value, list):
        return [_with_tensors(item, tensor) for item in cast("list[Any]", value)]
    if isinstance(value, tuple):
        return tuple(_with_tensors(item, tensor) for item in cast("tuple[Any, ...]", value))
    if isinstance(value, dict):
        return {key: _with_tensors(item, tensor) for key, item in cast("dict[Any, Any]", value).items()}
    return value


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
