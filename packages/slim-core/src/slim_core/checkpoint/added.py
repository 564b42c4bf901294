"""A source with further tensors beside those that are stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from slim_core.checkpoint.header import StoredTensor
from slim_core.checkpoint.source import TensorMeta, TensorSource
from slim_core.errors import InvalidModelError

__all__ = ["AddedTensors"]


class AddedTensors:
    """A :class:`TensorSource` over another one, with tensors that are held in memory.

    Args:
        inner: the checkpoint.
        tensors: by name; they come last, and are only to be read.

    Raises:
        InvalidModelError: the checkpoint has a tensor of that name.
    """

    def __init__(self, inner: TensorSource, tensors: Mapping[str, Tensor]) -> None:
        if taken := next((name for name in tensors if name in inner), None):
            raise InvalidModelError("the checkpoint has a tensor of this name already", where=taken)
        self._inner = inner
        self._tensors = dict(tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors or name in self._inner

    def __iter__(self) -> Iterator[str]:
        yield from self._inner
        yield from self._tensors

    def meta(self, name: str) -> TensorMeta:
        if (tensor := self._tensors.get(name)) is not None:
            return TensorMeta(name, tensor.dtype, tuple(tensor.shape))
        return self._inner.meta(name)

    def load(self, name: str) -> Tensor:
        return self._tensors[name] if name in self._tensors else self._inner.load(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name in self._tensors:
            return self._tensors[name][start:stop]
        return self._inner.rows(name, start, stop)

    def stored(self, name: str) -> StoredTensor | None:
        return None if name in self._tensors else self._inner.stored(name)

    def prefetch(self, names: Iterable[str]) -> None:
        self._inner.prefetch([name for name in names if name not in self._tensors])

    def release(self, names: Iterable[str]) -> None:
        self._inner.release([name for name in names if name not in self._tensors])

    def release_rows(self, name: str, start: int, stop: int) -> None:
        if name not in self._tensors:
            self._inner.release_rows(name, start, stop)
