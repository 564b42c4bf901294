"""Safetensors checkpoints, mapped into memory and read lazily.

Pages are touched only by what computes on them. :meth:`Checkpoint.prefetch` asks the kernel to read ahead,
:meth:`Checkpoint.release` drops the pages of tensors that are done with, so resident memory follows what is in use.
"""

from __future__ import annotations

import mmap
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from slim_core.checkpoint.header import StoredTensor, parse_object, read_header
from slim_core.checkpoint.source import TensorMeta
from slim_core.errors import InvalidModelError, UnexpectedError
from slim_core.phases import Busy

__all__ = ["READING_AHEAD", "Checkpoint"]

READING_AHEAD = Busy()
"""When this process was reading ahead of what it computes, from whatever checkpoint."""

_PAGE = mmap.ALLOCATIONGRANULARITY
# With the page that is touched the kernel maps those around it that it has: some 64 KiB, or all that it keeps together,
# which is a huge page at most.
_AROUND = 2 << 20
_AT_ONCE = 8 << 20
_AGAIN = "download the file again"


class Checkpoint:
    """The tensors of a model folder: one safetensors file, or shards named by an index.

    Every header is read and checked on construction, so a defect shows before any work starts.

    Args:
        folder: the model folder.
        index: name of the index file; without it the usual names are tried.

    Raises:
        InvalidModelError: no weights, a missing, truncated or malformed file, a tensor listed but absent, or stored
            twice.
    """

    def __init__(self, folder: Path, index: str | None = None) -> None:
        self.folder = folder
        files, listed = _find_files(folder, index)
        self._tensors: dict[str, StoredTensor] = {}
        for file in files:
            for tensor in read_header(file):
                if tensor.name in self._tensors:
                    raise InvalidModelError(
                        f"tensor {tensor.name!r} is stored twice, also in {self._tensors[tensor.name].file.name}",
                        where=str(file),
                        remedy="remove the left-over shard",
                    )
                self._tensors[tensor.name] = tensor
        if listed is not None:
            self._check_listing(listed)
        self._maps: dict[Path, mmap.mmap] = {}
        self._mapping = threading.Lock()
        self._reader: ThreadPoolExecutor | None = None
        _use_up_warning()

    def _check_listing(self, listed: dict[str, str]) -> None:
        for name, file in listed.items():
            stored = self._tensors.get(name)
            if stored is None or stored.file.name != file:
                raise InvalidModelError(
                    f"the index places tensor {name!r} in {file}, which does not hold it",
                    where=str(self.folder),
                    remedy="the index and the shards belong to different versions; download the folder again",
                )

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors, in a fixed order."""
        return sorted({tensor.file for tensor in self._tensors.values()})

    def stored(self, name: str) -> StoredTensor:
        """Where a tensor lies.

        Raises:
            InvalidModelError: there is no such tensor.
        """
        try:
            return self._tensors[name]
        except KeyError:
            raise InvalidModelError(f"there is no tensor {name!r}", where=str(self.folder)) from None

    def meta(self, name: str) -> TensorMeta:
        stored = self.stored(name)
        return TensorMeta(name, stored.dtype, stored.shape)

    def load(self, name: str) -> Tensor:
        """The tensor as a read-only view of the mapped file."""
        return self._view(self.stored(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._view(self._part(name, start, stop))

    def _part(self, name: str, start: int, stop: int) -> StoredTensor:
        """Where some rows of a tensor lie."""
        stored = self.stored(name)
        if not stored.shape:
            raise UnexpectedError("the tensor is a scalar and has no rows", where=name)
        start, stop, _ = slice(start, stop).indices(stored.shape[0])
        count = max(stop - start, 0)
        row = stored.nbytes // max(stored.shape[0], 1)
        return StoredTensor(
            name, stored.dtype, (count, *stored.shape[1:]), stored.file, stored.begin + start * row, count * row
        )

    def _map(self, file: Path) -> mmap.mmap:
        with self._mapping:
            if file not in self._maps:
                try:
                    with file.open("rb") as stream:
                        self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
                except OSError as error:
                    raise InvalidModelError(f"can no longer be read: {error.strerror}", where=str(file)) from error
            return self._maps[file]

    def _view(self, stored: StoredTensor) -> Tensor:
        if stored.nbytes == 0:
            return torch.empty(stored.shape, dtype=stored.dtype)
        flat = torch.frombuffer(self._map(stored.file), dtype=torch.uint8, count=stored.nbytes, offset=stored.begin)
        if stored.begin % stored.dtype.itemsize:
            flat = flat.clone()
        return flat.view(stored.dtype).view(stored.shape)

    def prefetch(self, names: Iterable[str]) -> None:
        if not hasattr(os, "posix_fadvise"):
            return
        # A length of 0 would mean: up to the end of the file.
        spans = [(s.file, s.begin, s.nbytes) for s in map(self.stored, names) if s.nbytes]
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="slim-prefetch")
        READING_AHEAD.begin()
        self._reader.submit(_read_ahead, spans).add_done_callback(lambda _: READING_AHEAD.end())

    def release(self, names: Iterable[str]) -> None:
        for name in names:
            self._give_back(self.stored(name))

    def release_rows(self, name: str, start: int, stop: int) -> None:
        self._give_back(self._part(name, start, stop))

    def _give_back(self, stored: StoredTensor) -> None:
        mapped = self._maps.get(stored.file)
        if mapped is None or not stored.nbytes:
            return
        start = max(0, stored.begin - _AROUND)
        start -= start % _PAGE
        stop = min(stored.begin + stored.nbytes + _AROUND, len(mapped))
        mapped.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def close(self) -> None:
        """Stop reading ahead. Mappings go with the last view of them."""
        if self._reader is not None:
            self._reader.shutdown(wait=False, cancel_futures=True)
            self._reader = None
        self._maps.clear()


@cache
def _use_up_warning() -> None:
    """Torch warns once per process about buffers that cannot be written to. Views of a checkpoint never are written."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(b"\0", dtype=torch.uint8)


def _read_ahead(spans: list[tuple[Path, int, int]]) -> None:
    """Ask the kernel for these bytes, then wait until it has them."""
    for file, begin, length in spans:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, begin, length, os.POSIX_FADV_WILLNEED)
            with suppress(OSError):
                _pass_by(fd, begin, begin + length)
        finally:
            os.close(fd)


def _pass_by(fd: int, begin: int, end: int) -> None:
    """Send bytes of a file nowhere, which copies none but waits for every page; stops when the program ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        while begin < end and threading.main_thread().is_alive():
            begin += os.sendfile(nowhere, fd, begin, min(end - begin, _AT_ONCE)) or end
    finally:
        os.close(nowhere)


def _find_files(folder: Path, index: str | None) -> tuple[list[Path], dict[str, str] | None]:
    if not folder.is_dir():
        raise InvalidModelError(
            "the model folder does not exist or is not a folder",
            where=str(folder),
            remedy="point --model_path to the model folder",
        )
    indices = [folder / index] if index else _weights(folder, ".safetensors.index.json")
    if len(indices) > 1:
        raise InvalidModelError(
            f"several index files: {', '.join(path.name for path in indices)}",
            where=str(folder),
            remedy="keep the one that belongs to the model",
        )
    if indices:
        listed = _read_index(indices[0])
        files = [folder / name for name in sorted(set(listed.values()))]
        for file in files:
            if not file.is_file():
                raise InvalidModelError(
                    f"shard {file.name} is missing", where=str(indices[0]), remedy="download the folder again"
                )
        return files, listed
    files = _weights(folder, ".safetensors")
    if not files:
        found = sorted(path.name for path in folder.glob("*.bin"))
        raise InvalidModelError(
            "no safetensors weights" + (f", only {found[0]}" if found else ""),
            where=str(folder),
            remedy="convert the checkpoint to safetensors" if found else "point --model_path to the model folder",
        )
    return files, None


def _weights(folder: Path, ending: str) -> list[Path]:
    """Visible weight files, or indices of such. ``consolidated*`` is Mistral's second copy of the same weights."""
    endings = (".safetensors", ".safetensors.index.json")
    found = sorted(p for p in folder.iterdir() if p.name.endswith(endings) and not p.name.startswith("."))
    found = [path for path in found if not path.name.startswith("consolidated")] or found
    return [path for path in found if path.name.endswith(ending)]


def _read_index(path: Path) -> dict[str, str]:
    try:
        listed: Any = parse_object(path.read_bytes())["weight_map"]
        if not isinstance(listed, dict) or not listed:
            raise ValueError("weight_map is empty or not an object")
    except OSError as error:
        raise InvalidModelError(f"cannot be read: {error.strerror}", where=str(path), remedy=_AGAIN) from error
    except KeyError:
        raise InvalidModelError("not a safetensors index: no weight_map", where=str(path), remedy=_AGAIN) from None
    except ValueError as error:
        raise InvalidModelError(f"not a safetensors index: {error}", where=str(path), remedy=_AGAIN) from error
    placed = cast("dict[str, Any]", listed)
    for name, file in placed.items():
        if not isinstance(file, str) or file in ("", "..") or Path(file).name != file:
            raise InvalidModelError(
                f"tensor {name!r} is placed outside the folder: {file!r}", where=str(path), remedy=_AGAIN
            )
    return placed
