"""Sources whose linears are stored as FP8 with one scale per 128x128 block (``<name>.weight_scale_inv``).

The view decodes on reading, so the rest of Slim sees an ordinary bf16 checkpoint:
``w[r, c] = fp8[r, c] * scale_inv[r // B0, c // B1]``, computed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from slim_core.checkpoint.header import StoredTensor
from slim_core.checkpoint.source import TensorMeta, TensorSource
from slim_core.errors import InvalidModelError

__all__ = ["Fp8BlockSource", "decode_fp8_blocks", "fp8_block_shape"]

_SUFFIX = "_scale_inv"


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
    return (weight.float() * factors).to(torch.bfloat16)


def fp8_block_shape(config: dict[str, Any]) -> tuple[int, int] | None:
    """The block shape that ``quantization_config`` of a ``config.json`` names, or None if it is no FP8 block format."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "fp8":
        return None
    rows, columns = quantization.get("weight_block_size") or (128, 128)
    return int(rows), int(columns)


class Fp8BlockSource:
    """A :class:`TensorSource` over another one that decodes block-quantised weights.

    Raises:
        InvalidModelError: a float8 weight has no factors, or factors whose shape does not fit.
    """

    def __init__(self, inner: TensorSource, block: tuple[int, int] = (128, 128)) -> None:
        self._inner = inner
        self._block = block
        self._encoded = {
            name for name in inner if name + _SUFFIX in inner and inner.meta(name).dtype == torch.float8_e4m3fn
        }
        for name in inner:
            self._check(name)

    def _check(self, name: str) -> None:
        meta = self._inner.meta(name)
        if meta.dtype == torch.float8_e4m3fn and len(meta.shape) == 2 and name not in self._encoded:
            raise InvalidModelError(f"float8 tensor {name!r} has no {name + _SUFFIX!r} beside it")
        if name in self._encoded:
            want = tuple(-(-n // b) for n, b in zip(meta.shape, self._block, strict=True))
            have = self._inner.meta(name + _SUFFIX).shape
            if want != have:
                raise InvalidModelError(
                    f"tensor {name + _SUFFIX!r} has shape {list(have)}, expected {list(want)} for blocks of {self._block}"
                )

    def __contains__(self, name: object) -> bool:
        return name in self._inner and not self._is_factor(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._inner if not self._is_factor(name))

    def _is_factor(self, name: object) -> bool:
        return isinstance(name, str) and name.endswith(_SUFFIX) and name.removesuffix(_SUFFIX) in self._encoded

    def meta(self, name: str) -> TensorMeta:
        meta = self._inner.meta(name)
        return TensorMeta(name, torch.bfloat16, meta.shape) if name in self._encoded else meta

    def load(self, name: str) -> Tensor:
        if name not in self._encoded:
            return self._inner.load(name)
        return decode_fp8_blocks(self._inner.load(name), self._inner.load(name + _SUFFIX), self._block)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        part = self._inner.rows(name, start, stop)
        if name not in self._encoded:
            return part
        return decode_fp8_blocks(part, self._inner.load(name + _SUFFIX), self._block, start)

    def stored(self, name: str) -> StoredTensor | None:
        return None if name in self._encoded else self._inner.stored(name)

    def _with_factors(self, names: Iterable[str]) -> list[str]:
        names = list(names)
        return names + [name + _SUFFIX for name in names if name in self._encoded]

    def prefetch(self, names: Iterable[str]) -> None:
        self._inner.prefetch(self._with_factors(names))

    def release(self, names: Iterable[str]) -> None:
        self._inner.release(self._with_factors(names))
