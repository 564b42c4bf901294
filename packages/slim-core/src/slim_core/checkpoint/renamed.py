"""A checkpoint whose tensors go by other names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from slim_core.checkpoint.header import StoredTensor
from slim_core.checkpoint.source import TensorMeta, TensorSource
from slim_core.errors import InvalidModelError

__all__ = ["RenamedSource"]


class RenamedSource:
    """The tensors of a source under new names.

    Args:
        stored_names: for every new name the one in the source; tensors that are not among them are left out.
    """

    def __init__(self, source: TensorSource, stored_names: Mapping[str, str]) -> None:
        self._source = source
        self._names = dict(stored_names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def _stored(self, name: str) -> str:
        try:
            return self._names[name]
        except KeyError:
            raise InvalidModelError(f"there is no tensor {name!r}") from None

    def meta(self, name: str) -> TensorMeta:
        return replace(self._source.meta(self._stored(name)), name=name)

    def load(self, name: str) -> Tensor:
        return self._source.load(self._stored(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        return self._source.rows(self._stored(name), start, stop)

    def stored(self, name: str) -> StoredTensor | None:
        return self._source.stored(self._stored(name))

    def prefetch(self, names: Iterable[str]) -> None:
        self._source.prefetch([self._stored(name) for name in names])

    def release(self, names: Iterable[str]) -> None:
        self._source.release([self._stored(name) for name in names])

    def release_rows(self, name: str, start: int, stop: int) -> None:
        self._source.release_rows(self._stored(name), start, stop)
