"""Reading tensors in blocks of rows, so that a folder of any size is checked in little memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from slim_core.checkpoint.source import TensorSource

__all__ = ["all_finite", "row_blocks"]

_BLOCK_ELEMENTS = 1 << 18
_HELD_ELEMENTS = 1 << 24


def row_blocks(shape: tuple[int, ...], held: Sequence[tuple[TensorSource, str]]) -> Iterator[tuple[int, int]]:
    """Blocks of rows that fit the cache; memory behind the tensors ``held`` is given back on the way and at the end."""
    width = 1
    for n in shape[1:]:
        width *= n
    step = max(1, _BLOCK_ELEMENTS // max(width, 1))
    touched = 0
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
        touched += step * width
        if touched >= _HELD_ELEMENTS:
            touched = 0
            _release(held)
    _release(held)


def _release(held: Sequence[tuple[TensorSource, str]]) -> None:
    for source, name in held:
        source.release([name])


def all_finite(rows: Tensor) -> bool:
    """NaN and infinity survive a sum; a sum that overflows by itself is looked at closely."""
    return bool(torch.isfinite(rows.sum(dtype=torch.float32))) or bool(torch.isfinite(rows.float()).all())
