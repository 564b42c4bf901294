"""What the rest of Slim sees of a checkpoint: named tensors that are read when they are needed.

A :class:`TensorSource` hands out tensors whole or by rows. Row access is what keeps memory small: weight arithmetic
works on row blocks that fit the cache, straight from the mapped file.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from slim_core.checkpoint.header import StoredTensor

__all__ = ["LazyTensor", "PassingTensor", "TensorMeta", "TensorSource"]


@dataclass(frozen=True)
class TensorMeta:
    """Name, dtype and shape of a tensor as its reader will see it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class TensorSource(Protocol):
    """A checkpoint, or a view of one."""

    def __contains__(self, name: object) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def meta(self, name: str) -> TensorMeta:
        """Dtype and shape of a tensor, from headers only."""
        ...

    def load(self, name: str) -> Tensor:
        """The tensor on the CPU. It may be a view of the file, with any strides: never write to it."""
        ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of the first dimension, contiguous, same rules as :meth:`load`."""
        ...

    def stored(self, name: str) -> StoredTensor | None:
        """Where the bytes lie if the tensor is stored exactly as :meth:`load` returns it, else None."""
        ...

    def prefetch(self, names: Iterable[str]) -> None:
        """Start reading the bytes of these tensors; returns at once."""
        ...

    def release(self, names: Iterable[str]) -> None:
        """Give the memory behind these tensors back; views handed out stay valid and are read again on use."""
        ...

    def release_rows(self, name: str, start: int, stop: int) -> None:
        """:meth:`release` for rows ``start:stop`` of the first dimension alone."""
        ...


@dataclass(frozen=True)
class LazyTensor:
    """One tensor of a source, not yet read."""

    source: TensorSource
    meta: TensorMeta

    @property
    def shape(self) -> tuple[int, ...]:
        return self.meta.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.meta.dtype

    def load(self) -> Tensor:
        return self.source.load(self.meta.name)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.source.rows(self.meta.name, start, stop)

    def release(self) -> None:
        self.source.release((self.meta.name,))


@dataclass(frozen=True)
class PassingTensor(LazyTensor):
    """One that is read in passing: a thread that asks for rows gives those back that it asked for before."""

    last: threading.local = field(default_factory=threading.local)

    def rows(self, start: int, stop: int) -> Tensor:
        if (before := getattr(self.last, "rows", None)) is not None:
            self.source.release_rows(self.meta.name, *before)
        self.last.rows = start, stop
        return super().rows(start, stop)
