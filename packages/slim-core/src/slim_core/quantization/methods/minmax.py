"""The ``minmax`` weight method: one scale per output channel, or per group of its columns, from the extremes.

Rows are worked on in blocks that stay in the cache, straight from the mapped checkpoint. For half-precision weights the
largest magnitude is found on the bit patterns: without the sign bit they order like the numbers they stand for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slim_core.quantization.affine import EPSILON, affine_parameters, by_groups
from slim_core.quantization.row_blocks import decibels, for_each_block, rows_per_block, scratch
from slim_core.quantization.weights import QuantizedWeight, RowSource, refuse_infinite

__all__ = ["minmax_weight"]

# The error is measured on every eighth block of rows, and there on about as many rows.
_SAMPLE_EVERY, _SAMPLED_ROWS = 8, 64


def magnitudes(rows: Tensor) -> Tensor:
    """The largest absolute value along the last dimension, float32 ``(..., 1)``; NaN where there is one."""
    if rows.dtype in (torch.bfloat16, torch.float16):
        bits = torch.bitwise_and(rows.view(torch.int16), 0x7FFF, out=scratch(rows.shape, torch.int16, rows.device))
        return bits.amax(-1, keepdim=True).view(rows.dtype).float()
    return rows.abs().amax(-1, keepdim=True).float()


def _quantize_rows(rows: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    if symmetric:
        largest = magnitudes(rows)
        scale, offset = affine_parameters(-largest, largest, bits, symmetric=True)
    else:
        scale, offset = affine_parameters(
            rows.amin(-1, keepdim=True), rows.amax(-1, keepdim=True), bits, symmetric=False
        )
    # Into memory of its own: float32 rows are the mapped file itself.
    steps = torch.div(rows, scale, out=scratch(rows.shape, torch.float32, rows.device))
    return steps if symmetric else steps.add_(offset), scale, offset


def minmax_weight(
    weight: RowSource, *, bits: int, symmetric: bool, name: str, group_size: int = 0, device: torch.device | None = None
) -> QuantizedWeight:
    """Quantize a weight row by row.

    Args:
        weight: float matrix ``(out, in)``.
        bits: width of the codes, at most 8.
        name: the tensor's name, for errors.
        group_size: columns that share a scale, a divisor of ``in``; 0: all of them.
        device: where to compute.

    Raises:
        InvalidModelError: the weight holds NaN or infinity.
    """
    out, width = weight.shape
    groups = width // group_size if group_size else 1
    if not out or not width:
        shape = out, max(groups, 1)
        return QuantizedWeight(
            torch.empty(out, width, dtype=torch.int8), torch.full(shape, EPSILON), torch.zeros(shape), float("inf")
        )
    codes = scratch((out, width), torch.int8)
    scale, offset = torch.empty(out, groups), torch.empty(out, groups)
    half = 2 ** (bits - 1)
    block = rows_per_block(width, device)

    def work(start: int) -> tuple[float, float]:
        stop = min(start + block, out)
        steps, s, z = _quantize_rows(by_groups(weight.rows(start, stop).to(device), groups), bits, symmetric)
        sampled = slice(None, None, max(1, (stop - start) // _SAMPLED_ROWS))
        exact = None if (start // block) % _SAMPLE_EVERY else _copied(steps[sampled])
        rounded = steps.round_()
        if not symmetric:  # a symmetric scale keeps every code inside by construction
            rounded.clamp_(-half, half - 1)
        codes[start:stop].copy_(rounded.flatten(1))
        scale[start:stop].copy_(s.squeeze(2))
        offset[start:stop].copy_(z.squeeze(2))
        if exact is None:
            return 0.0, 0.0
        s, z = s[sampled], z[sampled]
        return _energy(_copied(exact).sub_(z), s), _energy(exact.sub_(rounded[sampled]), s)

    energies = for_each_block(work, range(0, out, block))
    refuse_infinite(scale, name)
    return QuantizedWeight(codes, scale, offset, decibels(energies))


def _copied(values: Tensor) -> Tensor:
    return scratch(values.shape, values.dtype, values.device).copy_(values)


def _energy(steps: Tensor, scale: Tensor) -> float:
    """Sum of ``(steps * scale)^2``; the squares of large weights do not fit a float32."""
    return float((steps.square_().sum(-1, keepdim=True).cpu().double() * scale.cpu().double().square()).sum())
