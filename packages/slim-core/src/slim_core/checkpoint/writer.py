"""A sharded safetensors writer that needs no tensor before it starts and keeps none.

Name, dtype and shape of everything that will be written are known from the plan, so shards are laid out and their
headers written first; tensors then land at their offsets in any order. Bytes go to disk on a background thread behind
a bounded queue, so computing and writing overlap while memory stays small.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slim_core.checkpoint.header import StoredTensor, build_header
from slim_core.checkpoint.source import TensorMeta
from slim_core.errors import EnvError, UnexpectedError

__all__ = ["Shard", "ShardedWriter", "lay_out"]

FILE_MODE = 0o600
_QUEUE_BYTES = 16 << 20
_COPY_CHUNK = 64 << 20


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
    """
    parts: list[list[TensorMeta]] = [[]]
    pending = 0
    for tensor in tensors:
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

    Raises:
        EnvError: the disk is full or refuses a write; raised by the next call after the background write failed.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], done: Iterable[str] = ()) -> None:
        self._places: dict[str, tuple[int, int, TensorMeta]] = {}
        self._missing: set[str] = set()
        self._files: list[int] = []
        self._queue: queue.Queue[tuple[Callable[[], None], int] | None] = queue.Queue()
        self._room = threading.Condition()
        self._queued_bytes = 0
        self._error: OSError | None = None
        done = set(done)
        for shard in shards:
            path = folder / shard.file_name
            fresh = not (done and path.exists())
            fd = os.open(path, os.O_RDWR | os.O_CREAT | (os.O_TRUNC if fresh else 0), FILE_MODE)
            os.fchmod(fd, FILE_MODE)
            self._files.append(fd)
            try:
                os.pwrite(fd, shard.header, 0)
                os.truncate(fd, shard.nbytes)
            except OSError as error:
                raise _disk_error(error) from error
            for tensor in shard.tensors:
                self._places[tensor.name] = (fd, shard.offsets[tensor.name], tensor)
        self._missing = set(self._places) - done
        self._thread = threading.Thread(target=self._work, name="slim-writer", daemon=True)
        self._thread.start()

    def put(self, name: str, tensor: Tensor) -> None:
        """Queue a tensor for writing. It must not be changed afterwards.

        Raises:
            UnexpectedError: the plan has no such tensor, or another dtype or shape.
        """
        fd, offset, meta = self._claim(name)
        if tensor.dtype != meta.dtype or tuple(tensor.shape) != meta.shape:
            raise UnexpectedError(
                f"tensor is {tensor.dtype}{list(tensor.shape)}, the plan says {meta.dtype}{list(meta.shape)}", where=name
            )
        if meta.nbytes:
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            self._submit(lambda: _write_all(fd, memoryview(flat.numpy()), offset), meta.nbytes)

    def copy(self, name: str, stored: StoredTensor) -> None:
        """Copy a tensor byte for byte from another file, inside the kernel and without taking memory here."""
        fd, offset, meta = self._claim(name)
        if stored.nbytes != meta.nbytes or stored.dtype != meta.dtype:
            raise UnexpectedError(f"stored as {stored.dtype}{list(stored.shape)}, unlike the plan", where=name)
        if meta.nbytes:
            self._submit(lambda: _copy_all(stored, fd, offset), 0)

    def after_writing(self, action: Callable[[], None]) -> None:
        """Call ``action`` on the background thread once everything queued so far is in the file system."""
        self._submit(action, 0)

    def _claim(self, name: str) -> tuple[int, int, TensorMeta]:
        if self._error is not None:
            raise _disk_error(self._error)
        if name not in self._missing:
            state = "was already written" if name in self._places else "is not in the plan"
            raise UnexpectedError(f"the tensor {state}", where=name)
        self._missing.remove(name)
        return self._places[name]

    def _submit(self, job: Callable[[], None], nbytes: int) -> None:
        with self._room:
            self._room.wait_for(lambda: self._queued_bytes == 0 or self._queued_bytes + nbytes <= _QUEUE_BYTES)
            self._queued_bytes += nbytes
        self._queue.put((job, nbytes))

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            job, nbytes = item
            if self._error is None:
                try:
                    job()
                except OSError as error:
                    self._error = error
            del item, job
            with self._room:
                self._queued_bytes -= nbytes
                self._room.notify()
            self._queue.task_done()
        self._queue.task_done()

    def flush(self) -> None:
        """Wait until everything queued so far is in the file system.

        Raises:
            EnvError: a write failed.
        """
        self._queue.join()
        if self._error is not None:
            raise _disk_error(self._error)

    def finish(self) -> None:
        """Write what is queued, force it to disk and close the files.

        Raises:
            UnexpectedError: a tensor of the plan was never written.
            EnvError: a write failed.
        """
        self.flush()
        if self._missing:
            some = ", ".join(sorted(self._missing)[:3])
            raise UnexpectedError(f"{len(self._missing)} tensors of the plan were never written: {some}")
        try:
            for fd in self._files:
                os.fsync(fd)
        except OSError as error:
            raise _disk_error(error) from error
        self.close()

    def close(self) -> None:
        """Close the files without any check; what is queued is written first."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        for fd in self._files:
            os.close(fd)
        self._files.clear()


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(fd, data, offset)
        offset += written
        data = data[written:]


def _copy_all(stored: StoredTensor, fd: int, offset: int) -> None:
    source = os.open(stored.file, os.O_RDONLY)
    try:
        position, left = stored.begin, stored.nbytes
        while left:
            count = _copy_some(source, fd, position, offset, min(left, _COPY_CHUNK))
            position, offset, left = position + count, offset + count, left - count
    finally:
        os.close(source)


def _copy_some(source: int, target: int, position: int, offset: int, count: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            if copied := os.copy_file_range(source, target, count, position, offset):
                return copied
        except OSError:
            pass  # not between these two file systems; read and write instead
    data = os.pread(source, min(count, 1 << 20), position)
    if not data:
        raise OSError(5, "the source file ended early")
    _write_all(target, memoryview(data), offset)
    return len(data)


def _disk_error(error: OSError) -> EnvError:
    return EnvError(
        f"writing the output failed: {error.strerror or error}",
        where=str(error.filename) if error.filename else "save_path",
        remedy="free disk space or choose another save_path, then run again with --resume",
    )
