"""The ``minmax`` weight method: one scale per output channel from the channel's own extremes.

Rows are worked on in blocks that stay in the cache, straight from the mapped checkpoint. For half-precision weights the
largest magnitude is found on the bit patterns: without the sign bit they order like the numbers they stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from slim_core.errors import InvalidModelError
from slim_core.quantization.affine import EPSILON, affine_parameters

__all__ = ["QuantizedWeight", "RowSource", "minmax_per_channel"]

_BLOCK_BYTES = 1 << 20
_SAMPLE_EVERY = 8


class RowSource(Protocol):
    """A matrix that can be read by rows: a tensor in memory or one that still lies in a file."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """Codes of a weight and what they mean.

    Args:
        codes: int8 ``(out, in)``.
        scale, offset: float32 ``(out, 1)``.
        sqnr_db: signal to quantization noise in decibels over every eighth block of rows (the first included).
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor
    sqnr_db: float


def magnitudes(rows: Tensor) -> Tensor:
    """The largest absolute value of every row, float32 ``(rows, 1)``; NaN where a row holds one."""
    if rows.dtype in (torch.bfloat16, torch.float16):
        bits = torch.bitwise_and(rows.view(torch.int16), 0x7FFF)
        return bits.amax(1, keepdim=True).view(rows.dtype).float()
    return rows.abs().amax(1, keepdim=True).float()


def _quantize_rows(rows: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    if symmetric:
        largest = magnitudes(rows)
        scale, offset = affine_parameters(-largest, largest, bits, symmetric=True)
    else:
        scale, offset = affine_parameters(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), bits, symmetric=False)
    # Into memory of its own: float32 rows are the mapped file itself.
    steps = torch.div(rows, scale, out=torch.empty(rows.shape, device=rows.device))
    return steps if symmetric else steps.add_(offset), scale, offset


def minmax_per_channel(
    weight: RowSource, *, bits: int, symmetric: bool, name: str, device: torch.device | None = None
) -> QuantizedWeight:
    """Quantize a weight row by row.

    Args:
        weight: float matrix ``(out, in)``.
        bits: width of the codes, at most 8.
        name: the tensor's name, for errors.
        device: where to compute; the whole matrix goes there at once if it is not the CPU.

    Raises:
        InvalidModelError: the weight holds NaN or infinity.
    """
    out, width = weight.shape
    if not out or not width:
        return QuantizedWeight(
            torch.empty(out, width, dtype=torch.int8), torch.full((out, 1), EPSILON), torch.zeros(out, 1), float("inf")
        )
    codes = torch.empty(out, width, dtype=torch.int8)
    scale, offset = torch.empty(out, 1), torch.empty(out, 1)
    half = 2 ** (bits - 1)
    accelerated = device is not None and device.type != "cpu"
    block = out if accelerated else max(1, _BLOCK_BYTES // max(width * 4, 1))

    def work(start: int) -> tuple[float, float]:
        stop = min(start + block, out)
        rows = weight.rows(start, stop)
        steps, s, z = _quantize_rows(rows.to(device) if accelerated else rows, bits, symmetric)
        sampled = (start // block) % _SAMPLE_EVERY == 0
        exact = steps.clone() if sampled else steps
        rounded = steps.round_()
        if not symmetric:  # a symmetric scale keeps every code inside by construction
            rounded.clamp_(-half, half - 1)
        codes[start:stop].copy_(rounded)
        scale[start:stop].copy_(s)
        offset[start:stop].copy_(z)
        if not sampled:
            return 0.0, 0.0
        return _energy(exact - z, s), _energy(exact - rounded, s)

    energies = _for_each_block(work, range(0, out, block))
    if not bool(torch.isfinite(scale).all()):
        row = int((~torch.isfinite(scale)).flatten().nonzero()[0])
        raise InvalidModelError(
            f"the weight holds NaN or infinity in row {row}", where=name, remedy="repair the checkpoint"
        )
    return QuantizedWeight(codes, scale, offset, decibels(energies))


def _energy(steps: Tensor, scale: Tensor) -> float:
    """Sum of ``(steps * scale)^2``; the squares of large weights do not fit a float32."""
    return float((steps.square_().sum(1, keepdim=True).cpu().double() * scale.cpu().double().square()).sum())


def decibels(energies: list[tuple[float, float]]) -> float:
    """``10 log10(signal / noise)`` of summed energies; infinite without noise."""
    signal, noise = (sum(pair) for pair in zip(*energies, strict=True))
    return float(10 * torch.log10(torch.tensor(signal / noise))) if noise > 0 else float("inf")


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads for row blocks, kept for the life of the process; each computes alone, so blocks run side by side."""
    return ThreadPoolExecutor(threads, "slim-rows", initializer=torch.set_num_threads, initargs=(1,))


def _for_each_block(work: Callable[[int], tuple[float, float]], starts: range) -> list[tuple[float, float]]:
    threads = torch.get_num_threads()
    if threads <= 1 or len(starts) <= 1:
        return [work(start) for start in starts]
    return list(_pool(threads).map(work, starts))
