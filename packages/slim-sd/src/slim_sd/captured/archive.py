"""Reading ``calib_data.pth`` safely: nothing of the file is run, and only what is asked for is in memory.

A file of ``torch.save`` is a zip archive of a pickle (the structure) and the bytes of the storages. The directory of
the archive and the names in the pickle are checked before anything is loaded. The structure is then loaded with
``weights_only=True`` onto the ``meta`` device, where tensors have no data, and every tensor is held against the
directory: so a file can neither run code, nor name more bytes than it has. Data is read record by record.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import stat
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import torch
from torch import Tensor

from slim_core.errors import EnvError, InvalidDatasetError, SecurityError, SlimError, UnsupportedError
from slim_core.sizes import human_size
from slim_sd.captured.pickled import DELETE, refuse_code
from slim_sd.captured.plain_values import DTYPES, MAX_DEPTH, describe_type

__all__ = ["MAX_FILE_BYTES", "RecordArchive", "StoredTensor", "directory_digest"]

MAX_FILE_BYTES = 64 << 30
"""The largest file that is read: twenty times what 50 steps at 720p with 121 frames make."""

_MAX_PICKLE_BYTES = 64 << 20
_MAX_VALUES = 1_000_000
_ALWAYS_MATERIALIZABLE = 16 << 20
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_DAMAGE = (
    *(RuntimeError, ValueError, AssertionError, LookupError, TypeError, AttributeError, EOFError, OverflowError),
    *(pickle.UnpicklingError, struct.error, MemoryError, zipfile.BadZipFile, NotImplementedError),
)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in the file: ``offset`` and ``nbytes`` are its storage's, the rest as torch has it."""

    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage_offset: int

    @property
    def extent(self) -> int:
        """Elements from the first to the last, both included."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))


class RecordArchive:
    """An opened file of records, checked as far as it can be without reading its data.

    ``records[i]`` are the values of record ``i``, with :class:`StoredTensor` for tensors; :meth:`load` reads them.
    The file stays open, so one that is replaced meanwhile does not matter. Symbolic links are followed.

    Raises:
        InvalidDatasetError: it is missing, not a regular file, damaged, or not a list of lists.
        SecurityError: it holds something that would run code, is too large, or claims more than it has.
        UnsupportedError: it holds tensors that are no calibration inputs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _open(path)
        try:
            self.nbytes = os.fstat(self._file.fileno()).st_size
            entries, content = self._directory()
            self.digest = _digest(entries, content)
            self._starts = {self._start(entry): entry.file_size for entry in entries if "/data/" in entry.filename}
            refuse_code(content, str(path))
            self._values = 0
            self.records = self._structure(self._load_structure())
        except BaseException as error:
            self._file.close()
            if isinstance(error, SlimError) or not isinstance(error, (*_DAMAGE, OSError)):
                raise
            self._damaged(error)

    def _damaged(self, error: BaseException) -> NoReturn:
        raise InvalidDatasetError(
            f"the file is damaged or was not written by torch.save ({_first_line(error)})",
            where=str(self.path),
            remedy=DELETE,
        ) from error

    def _directory(self) -> tuple[list[zipfile.ZipInfo], bytes]:
        """The entries of the archive and the pickle in it."""
        if self.nbytes > MAX_FILE_BYTES:
            raise SecurityError(
                f"the file has {human_size(self.nbytes)}, more than the {human_size(MAX_FILE_BYTES)} that are read",
                where=str(self.path),
                remedy="capture fewer steps, a smaller size or fewer frames",
            )
        first = self._file.read(2)
        if first[:1] == b"\x80":
            raise SecurityError(
                "the file is a bare pickle, which can run code when it is read", where=str(self.path), remedy=DELETE
            )
        with zipfile.ZipFile(self._file) as archive:
            entries = archive.infolist()
            names = [entry.filename for entry in entries]
            (pickled,) = (entry for entry in entries if entry.filename.split("/")[1:] == ["data.pkl"])
            if len(set(names)) < len(names) or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("entries are compressed or occur twice")
            if pickled.file_size > _MAX_PICKLE_BYTES:
                raise SecurityError(
                    f"the structure of the file takes {human_size(pickled.file_size)}",
                    where=str(self.path),
                    remedy=DELETE,
                )
            order = f"{pickled.filename.removesuffix('/data.pkl')}/byteorder"
            if order in names and archive.read(order) != b"little":
                raise UnsupportedError(
                    "the file was written on a big-endian machine", where=str(self.path), remedy=DELETE
                )
            return entries, archive.read(pickled)

    def _start(self, entry: zipfile.ZipInfo) -> int:
        """Where the data of an entry begins: behind its own header, which is not that of the directory."""
        header = os.pread(self._file.fileno(), _LOCAL_HEADER.size, entry.header_offset)
        magic, *_, name, extra = _LOCAL_HEADER.unpack(header)
        start = entry.header_offset + _LOCAL_HEADER.size + name + extra
        if magic != b"PK\x03\x04" or start + entry.file_size > self.nbytes:
            raise ValueError(f"{entry.filename} lies outside the file")
        return start

    def _load_structure(self) -> Any:
        self._file.seek(0)
        # On meta no data is read and no memory taken, whatever size the file claims.
        return torch.load(self._file, map_location="meta", weights_only=True)

    def _structure(self, loaded: Any) -> list[list[Any]]:
        if not isinstance(loaded, list):
            self._no_record(f"it holds {describe_type(loaded)} where a list of records belongs")
        records: list[list[Any]] = []
        for index, record in enumerate(cast("list[Any]", loaded)):
            if not isinstance(record, (list, tuple)):
                self._no_record(f"record {index} is {describe_type(record)}, not a list of arguments")
            records.append(
                [
                    self._checked(value, 0, f"record {index}, argument {position}")
                    for position, value in enumerate(cast("list[Any]", record))
                ]
            )
        if not records:
            self._no_record("it holds no record")
        return records

    def _checked(self, value: Any, depth: int, where: str) -> Any:
        """A loaded value with every tensor held against the directory."""
        self._values += 1
        if self._values > _MAX_VALUES or depth > MAX_DEPTH:
            raise SecurityError(
                f"more than {_MAX_VALUES} values, or lists in each other more than {MAX_DEPTH} deep",
                where=str(self.path),
                remedy=DELETE,
            )
        if isinstance(value, Tensor):
            return self._stored(value, where)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (list, tuple)):
            items = cast("list[Any]", value)
            made = [self._checked(item, depth + 1, f"{where}[{index}]") for index, item in enumerate(items)]
            return made if isinstance(value, list) else tuple(made)
        if isinstance(value, dict):
            entries = cast("dict[Any, Any]", value)
            if odd := [key for key in entries if not isinstance(key, (str, int))]:
                self._no_record(f"{where}: {describe_type(odd[0])} is the key of a dict")
            return {key: self._checked(item, depth + 1, f"{where}[{key!r}]") for key, item in entries.items()}
        return self._no_record(f"{where} is {describe_type(value)}, which is no calibration input")

    def _no_record(self, what: str) -> NoReturn:
        raise InvalidDatasetError(
            f"the file is not a list of records: {what}",
            where=str(self.path),
            remedy=f"a record is the list of arguments of one call of the transformer; {DELETE}",
        )

    def _stored(self, tensor: Tensor, where: str) -> StoredTensor:
        """Hold a tensor against the directory."""
        storage = tensor.untyped_storage()
        stored = StoredTensor(
            getattr(storage, "_checkpoint_offset", -1),
            storage.nbytes(),
            tensor.dtype,
            tuple(tensor.shape),
            tensor.stride(),
            int(tensor.storage_offset()),
        )
        size = tensor.element_size()
        if tensor.dtype not in DTYPES or min((stored.storage_offset, *stored.shape, *stored.stride)) < 0:
            raise ValueError(f"{where}: no tensor that torch.save writes")
        if stored.nbytes and self._starts.get(stored.offset) != stored.nbytes:
            raise SecurityError(
                f"{where} claims {human_size(stored.nbytes)} of data where the file has not as many",
                where=str(self.path),
                remedy=f"it is damaged or was made to do harm; {DELETE}",
            )
        outside = stored.extent and (stored.storage_offset + stored.extent) * size > stored.nbytes
        if outside or tensor.numel() * size > max(self.nbytes, _ALWAYS_MATERIALIZABLE):
            raise SecurityError(
                f"{where} claims a tensor of shape {list(stored.shape)}, which its data is too small for",
                where=str(self.path),
                remedy=f"it is damaged or was made to do harm; {DELETE}",
            )
        return stored

    def load(self, value: Any) -> Any:
        """A value of ``records`` with its tensors read into fresh memory, which may be written to."""
        return _map_tensors(value, self.read)

    def outline(self, value: Any) -> Any:
        """A value of ``records`` with tensors on ``meta``: shapes and types without data."""
        return _map_tensors(
            value,
            lambda stored: torch.empty_strided(stored.shape, stored.stride, dtype=stored.dtype, device="meta"),
        )

    def read(self, stored: StoredTensor) -> Tensor:
        """The tensor, on the CPU, shape and strides as they were saved.

        Raises:
            EnvError: the file cannot be read (any more).
        """
        data = torch.empty(stored.extent, dtype=stored.dtype)
        if stored.extent:
            buffer = data.view(torch.uint8).numpy().data
            position = stored.offset + stored.storage_offset * data.element_size()
            try:
                while buffer:
                    got = os.preadv(self._file.fileno(), [buffer], position)
                    if not got:
                        raise OSError(None, "it was cut off while it was in use")
                    buffer, position = buffer[got:], position + got
            except OSError as error:
                raise EnvError(
                    f"the calibration inputs cannot be read: {error.strerror}", where=str(self.path), remedy=DELETE
                ) from error
        return data.as_strided(stored.shape, stored.stride)


def _map_tensors(value: Any, change: Callable[[StoredTensor], Tensor]) -> Any:
    if isinstance(value, StoredTensor):
        return change(value)
    if isinstance(value, list):
        return [_map_tensors(item, change) for item in cast("list[Any]", value)]
    if isinstance(value, tuple):
        return tuple(_map_tensors(item, change) for item in cast("tuple[Any, ...]", value))
    if isinstance(value, dict):
        return {key: _map_tensors(item, change) for key, item in cast("dict[Any, Any]", value).items()}
    return value


def directory_digest(path: Path) -> str:
    """SHA-256 of a file's structure and of the names, sizes and CRC-32 of its storages; its data is not read."""
    with _open(path) as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        (pickled,) = (entry for entry in entries if entry.filename.split("/")[1:] == ["data.pkl"])
        return _digest(entries, archive.read(pickled))


def _digest(entries: list[zipfile.ZipInfo], content: bytes) -> str:
    digest = hashlib.sha256(content)
    for entry in entries:
        digest.update(f"{entry.filename}\0{entry.file_size}\0{entry.CRC}\0".encode())
    return digest.hexdigest()


def _open(path: Path) -> BinaryIO:
    try:
        # A pipe of that name must not make us wait.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidDatasetError(
            f"the calibration inputs cannot be read: {error.strerror}",
            where=str(path),
            remedy="check the path and its permissions",
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidDatasetError("is not a regular file", where=str(path), remedy="move it away")
    return os.fdopen(descriptor, "rb")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
