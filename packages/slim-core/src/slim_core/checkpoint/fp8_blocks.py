"""Sources whose linears are stored as FP8 with one scale per 128x128 block (``<name>.weight_scale_inv``).

The view decodes on reading, so the rest of Slim sees an ordinary bf16 checkpoint:
``w[r, c] = fp8[r, c] * scale_inv[r // B0, c // B1]``, computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from slim_core.checkpoint.header import StoredTensor
from slim_core.checkpoint.source import TensorMeta, TensorSource
from slim_core.errors import InvalidModelError

__all__ = ["Fp8BlockSource", "decode_fp8_blocks", "fp8_block_shape"]

_SUFFIX = "_scale_inv"
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def decode_fp8_blocks(weight: Tensor, scale_inv: Tensor, block: tuple[int, int], first_row: int = 0) -> Tensor:
    """Rows of a block-quantised weight in bf16.

    Args:
        weight: float8, ``(rows, columns)``: rows ``first_row ...`` of the stored matrix.
        scale_inv: ``(ceil(all_rows / block[0]), ceil(columns / block[1]))``: the factor of each block.
        block: rows and columns of a block.
        first_row: index of ``weight[0]`` in the stored matrix.
    """
    rows, columns = weight.shape
    row_block = torch.arange(first_row, first_row + rows) // block[0]
    factors = scale_inv.float()[row_block].repeat_interleave(block[1], dim=1)[:, :columns]
    return weight.float().mul_(factors).to(torch.bfloat16)


def fp8_block_shape(config: dict[str, Any]) -> tuple[int, int] | None:
    """The block shape that ``quantization_config`` of a ``config.json`` names, or None if it is no FP8 block format.

    Raises:
        InvalidModelError: it names something that is no block shape.
    """
    found = config.get("quantization_config")
    if not isinstance(found, dict):
        return None
    quantization = cast("dict[str, Any]", found)
    if quantization.get("quant_method") != "fp8":
        return None
    block = quantization.get("weight_block_size")
    if block is None:
        return 128, 128
    match block:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case _:
            raise InvalidModelError(
                f"must be two positive numbers, got {block!r:.100}",
                where="quantization_config.weight_block_size",
                remedy="correct it in config.json",
            )


class Fp8BlockSource:
    """A :class:`TensorSource` over another one that decodes block-quantised weights.

    Raises:
        InvalidModelError: a float8 weight has no factors, factors whose shape does not fit, or is no matrix.
    """

    def __init__(self, inner: TensorSource, block: tuple[int, int] = (128, 128)) -> None:
        self._inner = inner
        self._block = block
        self._encoded = {name for name in inner if name + _SUFFIX in inner and inner.meta(name).dtype in _FLOAT8}
        for name in inner:
            self._check(name)

    def _check(self, name: str) -> None:
        meta = self._inner.meta(name)
        if name not in self._encoded:
            if meta.dtype in _FLOAT8 and len(meta.shape) >= 2:
                raise InvalidModelError(
                    f"float8 tensor has no {name + _SUFFIX!r} beside it",
                    where=name,
                    remedy="a shard is missing, or the source is not block-quantized FP8",
                )
            return
        if len(meta.shape) != 2:
            raise InvalidModelError(f"block-quantized tensor is no matrix, its shape is {list(meta.shape)}", where=name)
        factors = self._inner.meta(name + _SUFFIX)
        want = tuple(-(-n // b) for n, b in zip(meta.shape, self._block, strict=True))
        if want != factors.shape:
            raise InvalidModelError(
                f"has shape {list(factors.shape)}, expected {list(want)} for blocks of {self._block}",
                where=factors.name,
                remedy="correct weight_block_size in config.json",
            )
        if not factors.dtype.is_floating_point:
            raise InvalidModelError(
                f"holds {factors.dtype}, expected a floating-point type",
                where=factors.name,
                remedy="only factors in floating point are known; start from another checkpoint",
            )

    def __contains__(self, name: object) -> bool:
        return name in self._inner and not self._is_factor(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._inner if not self._is_factor(name))

    def _is_factor(self, name: object) -> bool:
        return isinstance(name, str) and name.endswith(_SUFFIX) and name.removesuffix(_SUFFIX) in self._encoded

    def _visible(self, name: str) -> str:
        if self._is_factor(name):
            raise InvalidModelError(f"there is no tensor {name!r}: it is part of the weight beside it")
        return name

    def meta(self, name: str) -> TensorMeta:
        meta = self._inner.meta(self._visible(name))
        return TensorMeta(name, torch.bfloat16, meta.shape) if name in self._encoded else meta

    def load(self, name: str) -> Tensor:
        if name not in self._encoded:
            return self._inner.load(self._visible(name))
        return decode_fp8_blocks(self._inner.load(name), self._inner.load(name + _SUFFIX), self._block)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._encoded:
            return self._inner.rows(self._visible(name), start, stop)
        start, stop, _ = slice(start, stop).indices(self._inner.meta(name).shape[0])
        part = self._inner.rows(name, start, stop)
        return decode_fp8_blocks(part, self._inner.load(name + _SUFFIX), self._block, start)

    def stored(self, name: str) -> StoredTensor | None:
        return None if name in self._encoded else self._inner.stored(self._visible(name))

    def _with_factors(self, names: Iterable[str]) -> list[str]:
        names = list(names)
        return names + [name + _SUFFIX for name in names if name in self._encoded]

    def prefetch(self, names: Iterable[str]) -> None:
        self._inner.prefetch(self._with_factors(names))

    def release(self, names: Iterable[str]) -> None:
        self._inner.release(self._with_factors(names))

    def release_rows(self, name: str, start: int, stop: int) -> None:
        self._inner.release_rows(self._visible(name), start, stop)
