"""What the weight methods take and give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from slim_core.errors import InvalidModelError
from slim_core.quantization.affine import dequantize_groups
from slim_core.quantization.microscaling import mx_dequantized
from slim_core.quantization.row_blocks import decibels

__all__ = ["InMemory", "MxWeight", "QuantizedWeight", "RowSource", "all_rows", "refuse_infinite", "sqnr"]


class RowSource(Protocol):
    """A matrix that can be read by rows: a tensor in memory or one that still lies in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class InMemory:
    """A matrix in memory as a :class:`RowSource`."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.matrix.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.matrix[start:stop]


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """Codes of a weight and what they mean: ``(codes - offset) * scale``.

    Args:
        codes: int8 ``(out, in)``; float8_e4m3fn for FP8, with one group and no offset.
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


@dataclass(frozen=True, eq=False)
class MxWeight:
    """A weight in a microscaling format: ``elements * 2^(exponents - 127)``, times ``outer`` if there is one.

    Args:
        elements: ``(out, in)``: float8_e4m3fn numbers (MXFP8), or uint8 codes 0..15 of E2M1 numbers (MXFP4).
        exponents: uint8 ``(out, ceil(in / 32))``, of blocks of 32 columns.
        sqnr_db: signal to quantization noise in decibels; may be an estimate from a part of the rows.
        outer: float32 ``(out, outer blocks, 1)``, the outer scales of a dual-scale weight.
    """

    elements: Tensor
    exponents: Tensor
    sqnr_db: float
    outer: Tensor | None = None

    def dequantized(self) -> Tensor:
        """float32 ``(out, in)``."""
        return mx_dequantized(self.elements, self.exponents, self.outer)


def all_rows(weight: RowSource, name: str, device: torch.device | None = None) -> Tensor:
    """The whole weight as a new float32 matrix ``(out, in)`` on a device, for methods that work on all of it.

    Raises:
        InvalidModelError: it holds NaN or infinity; names the tensor and the row.
    """
    stored = weight.rows(0, weight.shape[0])
    matrix = stored.to(device=device, dtype=torch.float32, copy=True)
    if not bool(torch.isfinite(matrix.sum())):  # large numbers add up to infinity too
        refuse_infinite(matrix, name)
    return matrix


def refuse_infinite(values: Tensor, name: str, first: int = 0, *, what: str = "weight") -> None:
    """Refuse rows of a weight for what is in them, or for numbers that show it: their extremes, or their scales.

    Args:
        values: ``(rows, ...)``.
        name: the tensor.
        first: which row of the weight the first of these is.
        what: what the tensor is to its linear.

    Raises:
        InvalidModelError: NaN or infinity is among them; names the tensor and the row.
    """
    finite = torch.isfinite(values).flatten(1).all(1)
    if not bool(finite.all()):
        row = first + int((~finite).nonzero()[0])
        raise InvalidModelError(
            f"the {what} holds NaN or infinity in row {row}", where=name, remedy="repair the checkpoint"
        )


def sqnr(exact: Tensor, approximate: Tensor) -> float:
    """Signal to noise in decibels of a float32 matrix, as :func:`~slim_core.quantization.row_blocks.decibels` has it.

    Works on a few rows at a time: the squares of all would be as large as the matrix.
    """
    signal = noise = 0.0
    step = max(1, (1 << 20) // max(exact[0].numel(), 1)) if len(exact) else 1
    for start in range(0, len(exact), step):
        rows = exact[start : start + step]
        signal += float(rows.square().sum(dtype=torch.float64))
        noise += float((approximate[start : start + step].float() - rows).square_().sum(dtype=torch.float64))
    return decibels([(signal, noise)])
