"""Sources that store the matrices of several linears in one tensor: the experts of a layer stacked along the first
dimension, gate and up side by side.

The view cuts them apart while they are read, so the rest of Slim sees one matrix per linear. Each reads only its own
part of the file.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from slim_core.checkpoint.header import StoredTensor
from slim_core.checkpoint.source import TensorMeta, TensorSource
from slim_core.errors import InvalidModelError

__all__ = ["Slice", "SlicedSource"]


@dataclass(frozen=True)
class Slice:
    """A matrix ``(out, in)`` or a vector ``(out,)`` inside a stored stack of them.

    Args:
        stack: name of the stored tensor: ``(count, out, in)``, ``(count, in, out)`` or ``(count, out)``.
        index: which one of the stack.
        outputs: which of its output features, with a positive step.
        transposed: it is stored as ``(count, in, out)``.
    """

    stack: str
    index: int
    outputs: range
    transposed: bool = False


class SlicedSource:
    """A :class:`TensorSource` over another one in which stacked tensors are replaced by their slices.

    Args:
        inner: the checkpoint.
        slices: what takes the place of the stacks, by the name it is seen under. A stack disappears if one slice of it
            is seen.

    Raises:
        InvalidModelError: a slice has a name that is taken, or does not lie inside its stack.
    """

    def __init__(self, inner: TensorSource, slices: Mapping[str, Slice]) -> None:
        self._inner = inner
        self._slices = dict(slices)
        self._stacks = {part.stack for part in slices.values()}
        self._metas = {name: self._meta(name, part) for name, part in self._slices.items()}
        self._turned: tuple[tuple[str, int], Tensor] | None = None
        self._turning = threading.Lock()

    def _meta(self, name: str, part: Slice) -> TensorMeta:
        if name in self._inner and name not in self._stacks:
            raise InvalidModelError(
                f"is stored, and also part of {part.stack!r}", where=name, remedy="remove the left-over shard"
            )
        stack = self._inner.meta(part.stack)
        if len(stack.shape) not in ((3,) if part.transposed else (2, 3)):
            raise InvalidModelError(f"is no stack of matrices, its shape is {list(stack.shape)}", where=part.stack)
        available = stack.shape[2] if part.transposed else stack.shape[1]
        inside = not len(part.outputs) or (part.outputs[0] >= 0 and part.outputs[-1] < available)
        if not (0 <= part.index < stack.shape[0] and inside):
            raise InvalidModelError(
                f"entry {part.index}, outputs {part.outputs} are not inside its shape {list(stack.shape)}",
                where=part.stack,
            )
        width = stack.shape[1:2] if part.transposed else stack.shape[2:]
        return TensorMeta(name, stack.dtype, (len(part.outputs), *width))

    def __contains__(self, name: object) -> bool:
        return name in self._slices or (name in self._inner and name not in self._stacks)

    def __iter__(self) -> Iterator[str]:
        yield from (name for name in self._inner if name not in self._stacks)
        yield from self._slices

    def _whole(self, name: str) -> str:
        """The name of a tensor that is not cut."""
        if name in self._stacks:
            raise InvalidModelError(f"there is no tensor {name!r}: it is seen in slices")
        return name

    def meta(self, name: str) -> TensorMeta:
        return self._metas[name] if name in self._metas else self._inner.meta(self._whole(name))

    def load(self, name: str) -> Tensor:
        """A view of the file where the arithmetic can use it as it lies, transposed if it is stored so; else a copy."""
        part = self._slices.get(name)
        if part is None:
            return self._inner.load(self._whole(name))
        if part.outputs.step > 1:
            return self.rows(name, 0, len(part.outputs))
        entry = self._entry(part)
        return _cut(entry.t() if part.transposed else entry, part.outputs)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        part = self._slices.get(name)
        if part is None:
            return self._inner.rows(self._whole(name), start, stop)
        start, stop, _ = slice(start, stop).indices(len(part.outputs))
        entry = self._turned_entry(part) if part.transposed else self._entry(part)
        return _cut(entry, part.outputs[start : max(start, stop)]).contiguous()

    def _entry(self, part: Slice) -> Tensor:
        """The entry of the stack that a slice is part of, as it is stored."""
        return self._inner.rows(part.stack, part.index, part.index + 1)[0]

    def _turned_entry(self, part: Slice) -> Tensor:
        """An entry that is stored by columns, by rows. The last one is kept, because rows are asked for in blocks, and
        the linears that share an entry one after the other; each time all of its pages would be touched.
        """
        key = part.stack, part.index
        with self._turning:
            if self._turned is None or self._turned[0] != key:
                self._turned = None
                self._turned = key, self._entry(part).t().contiguous()
            return self._turned[1]

    def stored(self, name: str) -> StoredTensor | None:
        part = self._slices.get(name)
        if part is None:
            return self._inner.stored(self._whole(name))
        stack = self._inner.stored(part.stack)
        if stack is None or part.transposed or part.outputs.step != 1:
            return None
        meta = self._metas[name]
        row = prod(meta.shape[1:]) * meta.dtype.itemsize
        first = part.index * stack.shape[1] + part.outputs.start
        return StoredTensor(name, meta.dtype, meta.shape, stack.file, stack.begin + first * row, meta.nbytes)

    def prefetch(self, names: Iterable[str]) -> None:
        parts = [(name, self._slices.get(name)) for name in names]
        self._inner.prefetch(dict.fromkeys(part.stack if part else self._whole(name) for name, part in parts))

    def release(self, names: Iterable[str]) -> None:
        whole: list[str] = []
        entries: dict[tuple[str, int], None] = {}
        for name in names:
            part = self._slices.get(name)
            if part is None:
                whole.append(self._whole(name))
            else:
                entries[part.stack, part.index] = None
        self._inner.release(whole)
        for stack, index in entries:
            self._inner.release_rows(stack, index, index + 1)
        with self._turning:
            # Where it is the only one, the next of its linears follows.
            if self._turned is not None and list(entries) != [self._turned[0]]:
                self._turned = None

    def release_rows(self, name: str, start: int, stop: int) -> None:
        if name in self._slices:  # no finer than one entry of the stack
            self.release((name,))
        else:
            self._inner.release_rows(self._whole(name), start, stop)


def _cut(entry: Tensor, outputs: range) -> Tensor:
    return entry[outputs.start : outputs.stop : outputs.step]
