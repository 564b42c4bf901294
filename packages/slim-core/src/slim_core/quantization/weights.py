"""What the weight methods take and give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from slim_core.errors import InvalidModelError
from slim_core.quantization.affine import dequantize_groups

__all__ = ["QuantizedWeight", "RowSource", "all_rows", "sqnr"]


class RowSource(Protocol):
    """A matrix that can be read by rows: a tensor in memory or one that still lies in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """Integer codes of a weight and what they mean: ``(codes - offset) * scale``.

    Args:
        codes: int8 ``(out, in)``.
        scale, offset: float32 ``(out, groups)``; a group is a run of ``in / groups`` columns.
        sqnr_db: signal to quantization noise in decibels; may be an estimate from a part of the rows.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    sqnr_db: float

    def dequantized(self) -> Tensor:
        """float32 ``(out, in)``."""
        return dequantize_groups(self.codes, self.scale, self.offset)


def all_rows(weight: RowSource, name: str, device: torch.device | None = None) -> Tensor:
    """The whole weight as a new float32 matrix ``(out, in)`` on a device, for methods that work on all of it.

    Raises:
        InvalidModelError: it holds NaN or infinity; names the tensor and the row.
    """
    stored = weight.rows(0, weight.shape[0])
    matrix = stored.to(device=device, dtype=torch.float32, copy=True)
    if not bool(torch.isfinite(matrix.sum())) and not bool((finite := torch.isfinite(matrix).all(1)).all()):
        row = int((~finite).nonzero()[0])
        raise InvalidModelError(
            f"the weight holds NaN or infinity in row {row}", where=name, remedy="repair the checkpoint"
        )
    return matrix


def sqnr(exact: Tensor, approximate: Tensor) -> float:
    """Signal to noise in decibels of a float32 matrix; infinite without noise, 0 without signal."""
    signal = float(exact.square().sum(dtype=torch.float64))
    noise = float((approximate - exact).square().sum(dtype=torch.float64))
    if noise == 0:
        return float("inf")
    return float(10 * torch.log10(torch.tensor(signal / noise, dtype=torch.float64))) if signal else 0.0
