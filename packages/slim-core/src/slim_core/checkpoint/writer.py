"""A sharded safetensors writer that needs no tensor before it starts and keeps none.

Name, dtype and shape of everything that will be written are known from the plan, so shards are laid out and their
headers written first; tensors then land at their offsets in any order. Bytes go to disk on background threads behind a
bounded queue, so computing and writing overlap while memory stays small.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from errno import EIO
from pathlib import Path

import torch
from torch import Tensor

from slim_core.checkpoint.background import BackgroundJobs
from slim_core.checkpoint.header import StoredTensor, build_header
from slim_core.checkpoint.source import TensorMeta
from slim_core.errors import EnvError, InvalidModelError, SlimError, UnexpectedError, UnsupportedError

__all__ = ["QUEUE_BYTES", "Shard", "ShardedWriter", "lay_out"]

FILE_MODE = 0o600
_THREADS = 2
QUEUE_BYTES = 8 << 20
_COPY_CHUNK = 64 << 20
_CARRY_CHUNK = 1 << 20


@dataclass(frozen=True)
class Shard:
    """One output file: its name, its header, and where each tensor begins."""

    file_name: str
    header: bytes
    offsets: dict[str, int]
    tensors: tuple[TensorMeta, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


def lay_out(tensors: Sequence[TensorMeta], stem: str, part_bytes: int) -> list[Shard]:
    """Distribute tensors over shards in the order given.

    A shard is closed before the tensor that would bring it to ``part_bytes`` or beyond, so it stays below that limit
    unless it holds a single larger tensor. ``part_bytes`` 0 means one file named ``<stem>.safetensors``; otherwise
    files are ``<stem>-00001-of-0000N.safetensors``, also when there is only one.

    Raises:
        UnsupportedError: safetensors cannot hold the dtype of a tensor.
        UnexpectedError: two tensors have the same name.
    """
    parts: list[list[TensorMeta]] = [[]]
    pending = 0
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise UnexpectedError("two tensors of the plan have this name", where=tensor.name)
        names.add(tensor.name)
        if part_bytes and parts[-1] and pending + tensor.nbytes >= part_bytes:
            parts.append([])
            pending = 0
        parts[-1].append(tensor)
        pending += tensor.nbytes
    shards: list[Shard] = []
    for number, part in enumerate(parts, 1):
        name = f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors" if part_bytes else f"{stem}.safetensors"
        header, offsets = build_header((t.name, t.dtype, t.shape) for t in part)
        shards.append(Shard(name, header, offsets, tuple(part)))
    return shards


class ShardedWriter:
    """Writes the tensors of ``shards`` into ``folder``.

    Args:
        done: names that an earlier, interrupted run has already written; their bytes are kept.
        own: the names that are written here, where others write the rest into the same files; None: all.
        joins: whether another process has begun the files; this one only adds to them.
        waiting: makes a context to be in while a call waits for the disk.

    Raises:
        EnvError: the disk is full or refuses a write. A background failure, of whatever kind, is raised by the next
            call; what was queued behind it is dropped.
        UnsupportedError: a file that holds tensors of ``done``, or one to join, is gone or is not the one that was
            begun.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        done: Iterable[str] = (),
        *,
        own: Iterable[str] | None = None,
        joins: bool = False,
        waiting: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._folder = folder
        self._waiting = waiting
        self._places: dict[str, tuple[int, int, TensorMeta]] = {}
        self._files: list[int] = []
        self._rows: dict[str, int] = {}
        self._closed = False
        self._joins = joins
        done = set(done)
        try:
            for shard in shards:
                self._open(shard, resumed=joins or any(tensor.name in done for tensor in shard.tensors))
        except BaseException as error:
            self._close_files()
            if isinstance(error, OSError):
                raise self._disk_error(error) from error
            raise
        self._missing = (set(self._places) if own is None else set(own)) - done
        self._jobs = BackgroundJobs(_THREADS, QUEUE_BYTES, waiting)

    def _open(self, shard: Shard, resumed: bool) -> None:
        path = self._folder / shard.file_name
        if resumed and not _was_begun(path, shard):
            if self._joins:
                raise UnsupportedError(
                    "this process cannot see the file that the first one has begun",
                    where=str(path),
                    remedy="use a save_path on a file system that all hosts share",
                )
            raise UnsupportedError(
                "this file of the interrupted run is gone or was changed",
                where=str(path),
                remedy="run without --resume to start over",
            )
        fd = os.open(path, os.O_RDWR | os.O_CREAT | (0 if resumed else os.O_TRUNC), FILE_MODE)
        self._files.append(fd)
        os.fchmod(fd, FILE_MODE)
        if not resumed:
            _write_all(fd, memoryview(shard.header), 0)
            os.truncate(fd, shard.nbytes)
        for tensor in shard.tensors:
            self._places[tensor.name] = (fd, shard.offsets[tensor.name], tensor)

    def put(self, name: str, tensor: Tensor) -> None:
        """Queue a tensor for writing. It must not be changed afterwards.

        Raises:
            UnexpectedError: the plan has no such tensor, or another dtype or shape.
        """
        fd, offset, meta = self._place(name)
        if tensor.is_meta:
            raise UnexpectedError("the tensor has no values", where=name)
        if tensor.dtype != meta.dtype or tuple(tensor.shape) != meta.shape:
            raise UnexpectedError(
                f"tensor is {tensor.dtype}{list(tensor.shape)}, the plan says {meta.dtype}{list(meta.shape)}",
                where=name,
            )
        if meta.nbytes:
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            self._submit(lambda: _write_all(fd, data, offset), meta.nbytes)
        self._missing.remove(name)

    def put_rows(self, name: str, rows: Tensor) -> None:
        """Queue the next rows of a tensor for writing; it is complete when its last row was queued.

        Raises:
            UnexpectedError: the plan has no such tensor, or another dtype or shape.
        """
        fd, offset, meta = self._place(name)
        first = self._rows.get(name, 0)
        fits = rows.dtype == meta.dtype and tuple(rows.shape[1:]) == meta.shape[1:]
        if not fits or first + len(rows) > meta.shape[0]:
            raise UnexpectedError(
                f"{len(rows)} rows of {rows.dtype}{list(rows.shape)} from row {first} on do not fit the plan, "
                f"{meta.dtype}{list(meta.shape)}",
                where=name,
            )
        data = rows.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        begin = offset + first * (meta.nbytes // max(meta.shape[0], 1))
        self._submit(lambda: _write_all(fd, data, begin), len(data))
        self._rows[name] = first + len(rows)
        if self._rows[name] == meta.shape[0]:
            self._missing.remove(name)

    def copy(self, name: str, stored: StoredTensor) -> None:
        """Copy a tensor byte for byte from another file, inside the kernel and without taking memory here.

        Raises:
            UnexpectedError: the plan has no such tensor, or another dtype or shape.
        """
        fd, offset, meta = self._place(name)
        if stored.dtype != meta.dtype or stored.shape != meta.shape:
            raise UnexpectedError(
                f"stored as {stored.dtype}{list(stored.shape)}, the plan says {meta.dtype}{list(meta.shape)}",
                where=name,
            )
        for start in range(0, meta.nbytes, _COPY_CHUNK):
            count = min(_COPY_CHUNK, meta.nbytes - start)
            self._submit(lambda start=start, count=count: _copy_part(stored, start, count, fd, offset + start), 0)
        self._missing.remove(name)

    def after_writing(self, action: Callable[[], None]) -> int:
        """Call ``action`` on a background thread once everything queued so far is in the file system.

        It is not called if a write has failed. What it raises surfaces like a failed write.

        Returns:
            A number for :meth:`wait_for`.
        """
        return self._submit(action, 0, barrier=True)

    def wait_for(self, action: int) -> None:
        """Wait until an action of :meth:`after_writing` is over.

        Raises:
            EnvError: a write failed.
        """
        self._jobs.await_job(action)
        self._raise_failure()

    def _place(self, name: str) -> tuple[int, int, TensorMeta]:
        self._raise_failure()
        if name not in self._missing:
            state = "was already written" if name in self._places else "is not in the plan"
            raise UnexpectedError(f"the tensor {state}", where=name)
        return self._places[name]

    def _submit(self, job: Callable[[], None], nbytes: int, *, barrier: bool = False) -> int:
        if self._closed:
            raise UnexpectedError("the writer is closed", where=str(self._folder))
        number = self._jobs.submit(job, nbytes, barrier=barrier)
        self._raise_failure()
        return number

    def _raise_failure(self) -> None:
        match self._jobs.error:
            case None:
                return
            case SlimError() as error:
                raise error
            case OSError() as error:
                raise self._disk_error(error) from error
            case error:
                raise UnexpectedError(f"the background writer failed: {error!r}") from error

    @property
    def busy_seconds(self) -> float:
        """Seconds in which bytes were on their way to the file system, or forced to disk."""
        return self._jobs.busy.seconds

    def flush(self) -> None:
        """Wait until everything queued so far is in the file system.

        Raises:
            EnvError: a write failed.
        """
        self._jobs.drain()
        self._raise_failure()

    def finish(self, on_file: Callable[[], None] = lambda: None) -> None:
        """Write what is queued, force it to disk and close the files.

        Args:
            on_file: called for each file.

        Raises:
            UnexpectedError: a tensor of the plan was never written.
            EnvError: a write failed.
        """
        self.flush()
        if self._missing:
            some = ", ".join(sorted(self._missing)[:3])
            raise UnexpectedError(f"{len(self._missing)} tensors of the plan were never written: {some}")
        try:
            with self._waiting():
                for fd in self._files:
                    with self._jobs.busy.within():
                        os.fsync(fd)
                    on_file()
        except OSError as error:
            raise self._disk_error(error) from error
        self.close()

    def close(self) -> None:
        """Close the files without any check; what is queued is written first."""
        self._closed = True
        self._jobs.stop()
        self._close_files()

    def _close_files(self) -> None:
        while self._files:
            with suppress(OSError):
                os.close(self._files.pop())

    def _disk_error(self, error: OSError) -> EnvError:
        return EnvError(
            f"writing the output failed: {error.strerror or error}",
            where=str(error.filename or self._folder),
            remedy="free disk space, then run again with --resume (without, if no unit was finished yet)",
        )


def _was_begun(path: Path, shard: Shard) -> bool:
    try:
        with path.open("rb") as stream:
            return path.stat().st_size == shard.nbytes and stream.read(len(shard.header)) == shard.header
    except FileNotFoundError:
        return False


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        if not written:
            raise OSError(EIO, "the file system takes no more bytes")
        offset += written
        data = data[written:]


def _copy_part(stored: StoredTensor, start: int, count: int, fd: int, offset: int) -> None:
    """Copy ``count`` bytes of a stored tensor from its byte ``start`` on."""
    try:
        source = os.open(stored.file, os.O_RDONLY)
    except OSError as error:
        raise _source_error(stored, error) from error
    try:
        position = stored.begin + start
        while count:
            done = _copy_some(source, fd, position, offset, count)
            if not done:
                done = _carry_some(stored, source, fd, position, offset, min(count, _CARRY_CHUNK))
            position, offset, count = position + done, offset + done, count - done
    finally:
        os.close(source)


def _copy_some(source: int, target: int, position: int, offset: int, count: int) -> int:
    """Copy inside the kernel; 0 if that is not possible here, e.g. between two file systems."""
    if hasattr(os, "copy_file_range"):
        with suppress(OSError):
            return os.copy_file_range(source, target, count, position, offset)
    return 0


def _carry_some(stored: StoredTensor, source: int, target: int, position: int, offset: int, count: int) -> int:
    try:
        data = os.pread(source, count, position)
    except OSError as error:
        raise _source_error(stored, error) from error
    if not data:
        raise _source_error(stored, OSError(EIO, "the file ended early"))
    _write_all(target, memoryview(data), offset)
    return len(data)


def _source_error(stored: StoredTensor, error: OSError) -> InvalidModelError:
    return InvalidModelError(f"tensor {stored.name!r} can no longer be read: {error.strerror}", where=str(stored.file))
