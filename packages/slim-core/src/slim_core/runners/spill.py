"""Tensors that wait on disk: activations of samples that are not at work.

A tensor is given another storage, a mapped file that no longer has a name: whoever holds the tensor goes on holding it,
the system writes it to disk when it needs the memory, and the space is free again when the last holder is gone. So it
does not matter how many samples are suspended, or what their forwards keep on to.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import weakref
from functools import cache
from pathlib import Path
from tempfile import mkstemp
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from slim_core.errors import EnvError

__all__ = ["AT_LEAST", "Spill"]

AT_LEAST = 16 << 10
"""Bytes below which a tensor stays where it is."""

_DONTNEED = 4  # Linux: MADV_DONTNEED
_Key = tuple[torch.dtype, bytes]


class Spill:
    """Puts tensors into files.

    Args:
        folder: on the disk that has room for all of them; it holds none of them under a name.
        at_least: bytes below which a tensor stays where it is.
    """

    def __init__(self, folder: Path, at_least: int = AT_LEAST) -> None:
        self._folder = folder
        self._at_least = at_least
        self._files: dict[int, weakref.ref[torch.UntypedStorage]] = {}  # by address
        self._equal: dict[_Key, weakref.ref[torch.UntypedStorage]] = {}

    def hold(self, value: Any, *, share: bool = False) -> None:
        """Move all large tensors of a nested structure to disk, in place; those that are there already leave memory.

        Args:
            share: whether equal tensors may have one storage; nobody may write to them then.

        Raises:
            EnvError: the disk is full.
        """
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu" and tensor.layout == torch.strided:
                size = _extent(tensor) * tensor.element_size()
                if size >= self._at_least:
                    if not self._is_on_disk(tensor):
                        self._move(tensor, share)
                    _leave_memory(tensor.untyped_storage())

    @property
    def nbytes(self) -> int:
        """Of all that is on disk now."""
        return sum(storage.nbytes() for known in self._files.values() if (storage := known()) is not None)

    def _is_on_disk(self, tensor: Tensor) -> bool:
        known = self._files.get(tensor.untyped_storage().data_ptr())
        return known is not None and known() is not None

    def _move(self, tensor: Tensor, share: bool) -> None:
        """Give a tensor a storage in a file, with the same shape and strides.

        A view keeps the tensor that it is a view of, so that one moves, and the view goes along.
        """
        base = tensor._base  # pyright: ignore[reportPrivateUsage]
        if base is not None and _covers(base, tensor):
            if not self._is_on_disk(base):
                self._move_alone(base, share)
            storage, offset = base.untyped_storage(), tensor.storage_offset()
            with torch.no_grad():
                tensor.set_(storage, offset, tensor.shape, tensor.stride())  # pyright: ignore[reportArgumentType, reportCallIssue]
            return
        self._move_alone(tensor, share)

    def _move_alone(self, tensor: Tensor, share: bool) -> None:
        data = tensor.detach().as_strided((_extent(tensor),), (1,)).view(torch.uint8)
        key = (tensor.dtype, hashlib.sha256(data.numpy().data).digest()) if share else None
        known = self._equal.get(key) if key is not None else None
        storage = known() if known is not None else None
        if storage is None:
            storage = self._written(data)
            if key is not None:
                self._equal[key] = weakref.ref(storage)
        shape, strides = tensor.shape, tensor.stride()
        with torch.no_grad():
            tensor.set_(storage, 0, shape, strides)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def _written(self, data: Tensor) -> torch.UntypedStorage:
        """A storage in a file of its own, holding these bytes."""
        try:
            handle, name = mkstemp(prefix=".activations-", dir=self._folder)
            try:
                os.posix_fallocate(handle, 0, data.numel())  # a mapping of a full disk would kill the process
                from_file: Any = getattr(torch.UntypedStorage, "from_file")  # noqa: B009  # typed as what it is not
                storage: torch.UntypedStorage = from_file(name, shared=True, nbytes=data.numel())
            finally:
                os.unlink(name)
                os.close(handle)
        except OSError as error:
            raise EnvError(
                f"activations cannot be kept on disk: {error.strerror}",
                where=str(self._folder),
                remedy="make room there, or calibrate on fewer or shorter samples",
            ) from error
        self._files[storage.data_ptr()] = weakref.ref(storage)
        torch.empty(0, dtype=torch.uint8).set_(storage).copy_(data)  # pyright: ignore[reportArgumentType, reportCallIssue]
        return storage


def _covers(base: Tensor, view: Tensor) -> bool:
    """Whether the base begins where its storage does, and the view lies within it."""
    end = view.storage_offset() + _extent(view)
    return base.storage_offset() == 0 and end * view.element_size() <= _extent(base) * base.element_size()


def _extent(tensor: Tensor) -> int:
    """Elements from the first to the last, both included."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _leave_memory(storage: torch.UntypedStorage) -> None:
    """Let the pages of a mapped file go; they come back from the file when they are touched."""
    if (advise := _madvise()) is not None:
        advise(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), _DONTNEED)


@cache
def _madvise() -> Any:
    """The C library's ``madvise``; None where what it would do is not known to be harmless."""
    return getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None
