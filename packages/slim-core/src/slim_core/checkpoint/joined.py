"""Sources that store one parameter in several tensors, which the model has as one: convolutions of query, key and value
side by side, for instance.

The view shows the whole under a name of its own, besides the parts, which are what is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from slim_core.checkpoint.header import StoredTensor
from slim_core.checkpoint.source import TensorMeta, TensorSource
from slim_core.errors import InvalidModelError

__all__ = ["JoinedSource"]


class JoinedSource:
    """A :class:`TensorSource` over another one that also knows tensors which lie in several parts.

    Iterating gives what is stored, so no part comes twice.

    Args:
        inner: the checkpoint.
        joined: names of the parts, in the order in which they follow each other along the first dimension, by the name
            of the whole.

    Raises:
        InvalidModelError: parts do not fit together, or the whole is stored as well.
    """

    def __init__(self, inner: TensorSource, joined: Mapping[str, Sequence[str]]) -> None:
        self._inner = inner
        self._joined = {name: tuple(parts) for name, parts in joined.items()}
        self._metas = {name: self._meta(name, parts) for name, parts in self._joined.items()}

    def _meta(self, name: str, parts: tuple[str, ...]) -> TensorMeta:
        if name in self._inner:
            raise InvalidModelError(
                f"is stored, and its parts too ({parts[0]!r})", where=name, remedy="remove the left-over shard"
            )
        metas = [self._inner.meta(part) for part in parts]
        if len({(meta.dtype, meta.shape[1:]) for meta in metas}) != 1 or not metas[0].shape:
            shapes = ", ".join(f"{meta.name!r} {list(meta.shape)}" for meta in metas)
            raise InvalidModelError(
                f"its parts do not fit together: {shapes}", where=name, remedy="the shards are of different models"
            )
        return TensorMeta(name, metas[0].dtype, (sum(meta.shape[0] for meta in metas), *metas[0].shape[1:]))

    def _parts(self, names: Iterable[str]) -> list[str]:
        return [part for name in names for part in self._joined.get(name, (name,))]

    def __contains__(self, name: object) -> bool:
        return name in self._joined or name in self._inner

    def __iter__(self) -> Iterator[str]:
        return iter(self._inner)

    def meta(self, name: str) -> TensorMeta:
        return self._metas.get(name) or self._inner.meta(name)

    def load(self, name: str) -> Tensor:
        parts = self._joined.get(name)
        return self._inner.load(name) if parts is None else torch.cat([self._inner.load(part) for part in parts])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._joined:
            return self._inner.rows(name, start, stop)
        found: list[Tensor] = []
        start, stop, _ = slice(start, stop).indices(self._metas[name].shape[0])
        for part in self._joined[name]:
            count = self._inner.meta(part).shape[0]
            if start < count and stop > 0:
                found.append(self._inner.rows(part, max(start, 0), min(stop, count)))
            start, stop = start - count, stop - count
        meta = self._metas[name]
        return torch.cat(found) if found else torch.empty(0, *meta.shape[1:], dtype=meta.dtype)

    def stored(self, name: str) -> StoredTensor | None:
        return None if name in self._joined else self._inner.stored(name)

    def prefetch(self, names: Iterable[str]) -> None:
        self._inner.prefetch(self._parts(names))

    def release(self, names: Iterable[str]) -> None:
        self._inner.release(self._parts(names))

    def release_rows(self, name: str, start: int, stop: int) -> None:
        if name in self._joined:
            self.release((name,))
        else:
            self._inner.release_rows(name, start, stop)
