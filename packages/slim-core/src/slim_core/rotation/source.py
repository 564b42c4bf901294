"""A checkpoint whose tensors are transformed while they are read: norms fused into linears, rotations applied.

What happens to a tensor is a :class:`Chain`. The rest of Slim sees an ordinary checkpoint: whatever is loaded, run,
quantized or written goes through the view.

A tensor is given out in two precisions. :meth:`TransformedSource.rows` gives float32, which is what quantization should
see; :meth:`TransformedSource.load` rounds to the dtype that the tensor is stored and will be written in.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from slim_core.checkpoint.header import StoredTensor
from slim_core.checkpoint.source import TensorMeta, TensorSource
from slim_core.errors import InvalidModelError, UnsupportedError
from slim_core.quantization.row_blocks import rows_per_block
from slim_core.rotation.chains import (
    Chain,
    Fill,
    FoldNormBias,
    FuseNorm,
    RotateLeft,
    RotateRight,
    checked_meta,
    read_by,
)
from slim_core.rotation.norm_fusion import fold_norm_bias, fuse_norm, norm_gain

__all__ = ["TransformedSource"]

_T = TypeVar("_T")


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that make whole tensors. Those of ``row_blocks`` may be waiting for one of them to be finished."""
    return ThreadPoolExecutor(threads, "slim-transform", initializer=torch.set_num_threads, initargs=(1,))


class TransformedSource:
    """A :class:`TensorSource` over another one in which some tensors are transformed.

    A chain under a new name adds a tensor: an untied head that is made of the embedding, a bias that was not there.
    Chains read the inner source, never each other; sources may be stacked. Methods may be called from several threads.

    Args:
        inner: the checkpoint.
        chains: by the name that the result is seen under.

    Raises:
        InvalidModelError: a chain begins with, or reads, a tensor that is not there.
        UnsupportedError: a step does not fit its tensor; names the tensor.
    """

    def __init__(self, inner: TensorSource, chains: Mapping[str, Chain]) -> None:
        self._inner = inner
        self.chains = {
            name: replace(chain, origin=name) if chain.origin is None and name in inner else chain
            for name, chain in chains.items()
        }
        self._metas = {name: checked_meta(inner, name, chain) for name, chain in self.chains.items()}
        self._threads = torch.get_num_threads()
        self._last: tuple[str, Tensor] | None = None
        self._keeping = threading.Lock()

    def __contains__(self, name: object) -> bool:
        return name in self.chains or name in self._inner

    def __iter__(self) -> Iterator[str]:
        yield from self._inner
        yield from (name for name in self.chains if name not in self._inner)

    def meta(self, name: str) -> TensorMeta:
        """Dtype and shape that the tensor will be written in; its rows are float32 if it is transformed."""
        return self._metas[name] if name in self._metas else self._inner.meta(name)

    def load(self, name: str) -> Tensor:
        """The tensor in the dtype of its meta; made of blocks of rows, without a float32 copy, where every row can be
        made by itself.

        Raises:
            InvalidModelError: the stored tensor holds NaN or infinity.
            UnsupportedError: the result does not fit into float16.
        """
        chain = self.chains.get(name)
        if chain is None or not chain.steps:
            return self._inner.load(name if chain is None else chain.origin or name)
        meta = self._metas[name]
        if self._by_rows(name):
            result = torch.empty(meta.shape, dtype=meta.dtype)
            step = rows_per_block(meta.shape[1], None)

            def work(start: int) -> None:
                result[start : start + step] = self._row_block(chain, start, start + step)

            self._for_each(work, range(0, meta.shape[0], step))
        else:
            with self._keeping:
                kept = self._last[1] if self._last is not None and self._last[0] == name else None
            result = (self._whole(name, chain) if kept is None else kept).to(meta.dtype)
        if meta.dtype == torch.float16 and not bool(torch.isfinite(result).all()):
            raise UnsupportedError(
                "is too large for float16 once it is transformed", where=name, remedy="start from a bfloat16 checkpoint"
            )
        return result

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor; float32 if it is transformed. Where one row takes all of the matrix, the last such matrix
        is kept until another one is asked for or it is released.

        Raises:
            InvalidModelError: the stored tensor holds NaN or infinity.
        """
        chain = self.chains.get(name)
        if chain is None or not chain.steps:
            return self._inner.rows(name if chain is None else chain.origin or name, start, stop)
        start, stop, _ = slice(start, stop).indices(self._metas[name].shape[0])
        stop = max(start, stop)
        if self._by_rows(name):
            return self._row_block(chain, start, stop)
        with self._keeping:
            if self._last is None or self._last[0] != name:
                self._last = None
                self._last = name, self._whole(name, chain)
            return self._last[1][start:stop]

    def _by_rows(self, name: str) -> bool:
        """Whether a row of the result depends on that row of the stored tensor alone."""
        steps = self.chains[name].steps
        return len(self._metas[name].shape) == 2 and not any(isinstance(step, RotateLeft) for step in steps)

    def _for_each(self, work: Callable[[int], _T], starts: range) -> list[_T]:
        if self._threads <= 1 or len(starts) <= 1:
            return [work(start) for start in starts]
        return list(_pool(self._threads).map(work, starts))

    def _row_block(self, chain: Chain, start: int, stop: int) -> Tensor:
        """Rows with everything applied that acts on columns; may be a view of the file if nothing does."""
        assert chain.origin is not None
        rows = self._inner.rows(chain.origin, start, stop).float()
        _check_finite(rows, chain.origin, start)
        for step in chain.steps:
            match step:
                case FuseNorm(norms, plus_one):
                    rows = fuse_norm(rows, norm_gain([self._norm(norm) for norm in norms], plus_one=plus_one))
                case RotateRight(rotation):
                    rows = rotation.right(rows)
                case _:
                    pass
        return rows

    def _norm(self, name: str) -> Tensor:
        vector = self._inner.load(name).float()
        _check_finite(vector, name, 0)
        return vector

    def _whole(self, name: str, chain: Chain) -> Tensor:
        """All of a tensor, float32, in memory of its own."""
        shape = self._metas[name].shape
        if len(shape) == 1:
            return self._vector(chain, shape[0])
        result = torch.empty(shape)
        height, width = rows_per_block(shape[1], None), rows_per_block(shape[0], None)

        def across(start: int) -> None:
            result[start : start + height] = self._row_block(chain, start, start + height)

        def down(start: int) -> None:
            columns = result[:, start : start + width]
            for step in chain.steps:
                if isinstance(step, RotateLeft):
                    columns.copy_(step.rotation.left(columns))

        # What acts on columns and what acts on rows commute.
        self._for_each(across, range(0, shape[0], height))
        self._for_each(down, range(0, shape[1], width))
        return result

    def _vector(self, chain: Chain, length: int) -> Tensor:
        if chain.origin is None:
            vector = torch.zeros(length, dtype=torch.float64)
        else:
            vector = self._inner.load(chain.origin).double()
            _check_finite(vector, chain.origin, 0)
        for step in chain.steps:
            match step:
                case FoldNormBias():
                    vector = vector + self._folded(step)
                case RotateLeft(rotation):
                    vector = rotation.left(vector)
                case Fill(value):
                    vector = torch.full_like(vector, value)
                case _:
                    pass
        return vector.float()

    def _folded(self, step: FoldNormBias) -> Tensor:
        """``W b``, float64."""
        norm_bias = self._norm(step.norm_bias)
        rows, width = self._inner.meta(step.weight).shape
        height = rows_per_block(width, None)

        def work(start: int) -> Tensor:
            block = self._inner.rows(step.weight, start, start + height).float()
            _check_finite(block, step.weight, start)
            return fold_norm_bias(block, norm_bias)

        return torch.cat(self._for_each(work, range(0, rows, height)))

    def stored(self, name: str) -> StoredTensor | None:
        """None for what is transformed; where the bytes lie for everything else, mere second names included."""
        chain = self.chains.get(name)
        if chain is None:
            return self._inner.stored(name)
        return self._inner.stored(chain.origin) if chain.origin is not None and not chain.steps else None

    def _read_for(self, names: Iterable[str]) -> list[str]:
        """The stored tensors that reading these takes."""
        needed: dict[str, None] = {}
        for name in names:
            chain = self.chains.get(name)
            needed |= dict.fromkeys([name] if chain is None else read_by(chain))
        return list(needed)

    def prefetch(self, names: Iterable[str]) -> None:
        self._inner.prefetch(self._read_for(names))

    def release(self, names: Iterable[str]) -> None:
        names = list(names)
        with self._keeping:
            if self._last is not None and self._last[0] in names:
                self._last = None
        self._inner.release(self._read_for(names))

    def release_rows(self, name: str, start: int, stop: int) -> None:
        """Rows of the stored tensor; none where all of them may be needed again."""
        chain = self.chains.get(name)
        if chain is None:
            self._inner.release_rows(name, start, stop)
        elif chain.origin is not None and self._by_rows(name):
            self._inner.release_rows(chain.origin, start, stop)


def _check_finite(values: Tensor, name: str, first_row: int) -> None:
    """A rotation would spread one NaN over all it touches."""
    if not bool(torch.isfinite(values.sum())) and not bool((finite := torch.isfinite(values)).all()):
        row = first_row + int((~finite).nonzero()[0, 0])
        raise InvalidModelError(f"holds NaN or infinity in row {row}", where=name, remedy="repair the checkpoint")
