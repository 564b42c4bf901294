"""Sources that store a parameter in another arrangement of rows than the model has: in several tensors, which the model
has as one (convolutions of query, key and value side by side, for instance), or as some rows of a larger tensor (query
of a fused ``qkv``), whose halves may alternate for rotary embeddings.

The view shows each parameter under a name of its own, besides what is stored, which is what is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slim_core.checkpoint.header import StoredTensor
from slim_core.checkpoint.source import TensorMeta, TensorSource
from slim_core.errors import InvalidModelError

__all__ = ["JoinedSource", "Part"]


@dataclass(frozen=True)
class Part:
    """What a parameter has of a stored tensor.

    Args:
        name: of the tensor.
        rows: which of its rows, one after the other; None: all.
        heads: rows are those of so many heads, and the pairs of rows that rotary embeddings turn together, which follow
            each other where they are stored, are to lie half a head apart; 0: they stay as they are.
        back: the other way round: what lies half a head apart is to follow each other.
    """

    name: str
    rows: range | None = None
    heads: int = 0
    back: bool = False

    def arranged(self, stored: Tensor) -> Tensor:
        """These rows as the model has them."""
        if not self.heads:
            return stored
        halves = (2, -1) if self.back else (-1, 2)
        pairs = stored.reshape(self.heads, *halves, *stored.shape[1:])
        return pairs.transpose(1, 2).reshape(stored.shape)


def _as_part(part: str | Part) -> Part:
    return Part(part) if isinstance(part, str) else part


class JoinedSource:
    """A :class:`TensorSource` over another one that also knows tensors which lie in several parts.

    Iterating gives what is stored, so no part comes twice.

    Args:
        inner: the checkpoint.
        joined: the parts, or the names of whole tensors, in the order in which they follow each other along the first
            dimension, by the name of the whole.

    Raises:
        InvalidModelError: parts do not fit together, or the whole is stored as well.
    """

    def __init__(self, inner: TensorSource, joined: Mapping[str, Sequence[str | Part]]) -> None:
        self._inner = inner
        self._joined = {name: tuple(_as_part(part) for part in parts) for name, parts in joined.items()}
        self._metas = {name: self._meta(name, parts) for name, parts in self._joined.items()}

    def _meta(self, name: str, parts: tuple[Part, ...]) -> TensorMeta:
        if name in self._inner:
            raise InvalidModelError(
                f"is stored, and its parts too ({parts[0].name!r})", where=name, remedy="remove the left-over shard"
            )
        metas = [self._inner.meta(part.name) for part in parts]
        if len({(meta.dtype, meta.shape[1:]) for meta in metas}) != 1 or not metas[0].shape:
            shapes = ", ".join(f"{meta.name!r} {list(meta.shape)}" for meta in metas)
            raise InvalidModelError(
                f"its parts do not fit together: {shapes}", where=name, remedy="the shards are of different models"
            )
        for part, meta in zip(parts, metas, strict=True):
            rows = self._rows_of(part)
            if rows.stop > meta.shape[0] or (part.heads and len(rows) % (2 * part.heads)):
                heads = f" of {part.heads} heads" if part.heads else ""
                raise InvalidModelError(
                    f"rows {rows.start} to {rows.stop}{heads} do not fit into its shape {list(meta.shape)}",
                    where=part.name,
                    remedy="the weights and config.json do not belong together",
                )
        count = sum(len(self._rows_of(part)) for part in parts)
        return TensorMeta(name, metas[0].dtype, (count, *metas[0].shape[1:]))

    def _rows_of(self, part: Part) -> range:
        return range(self._inner.meta(part.name).shape[0]) if part.rows is None else part.rows

    def _load(self, part: Part) -> Tensor:
        if part.rows is None:
            return part.arranged(self._inner.load(part.name))
        return part.arranged(self._inner.rows(part.name, part.rows.start, part.rows.stop))

    def _parts(self, names: Iterable[str]) -> list[str]:
        return [part.name for name in names for part in self._joined.get(name, (Part(name),))]

    def __contains__(self, name: object) -> bool:
        return name in self._joined or name in self._inner

    def __iter__(self) -> Iterator[str]:
        return iter(self._inner)

    def meta(self, name: str) -> TensorMeta:
        return self._metas.get(name) or self._inner.meta(name)

    def load(self, name: str) -> Tensor:
        parts = self._joined.get(name)
        if parts is None:
            return self._inner.load(name)
        return self._load(parts[0]) if len(parts) == 1 else torch.cat([self._load(part) for part in parts])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._joined:
            return self._inner.rows(name, start, stop)
        found: list[Tensor] = []
        start, stop, _ = slice(start, stop).indices(self._metas[name].shape[0])
        for part in self._joined[name]:
            rows = self._rows_of(part)
            count = len(rows)
            if start < count and stop > 0:
                first, last = max(start, 0), min(stop, count)
                if part.heads:  # rows of a head do not lie together
                    found.append(self._load(part)[first:last])
                else:
                    found.append(self._inner.rows(part.name, rows.start + first, rows.start + last))
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
