"""``minmax`` for FP8: E4M3 weights with one scale per output channel."""

from __future__ import annotations

import torch

from slim_core.quantization.floating import e4m3_scale, e4m3_values, to_e4m3
from slim_core.quantization.row_blocks import decibels, for_each_block, rows_per_block
from slim_core.quantization.weights import QuantizedWeight, RowSource, refuse_infinite

__all__ = ["fp8_weight"]

_SAMPLE_EVERY = 8


def fp8_weight(weight: RowSource, *, name: str, device: torch.device | None = None) -> QuantizedWeight:
    """Quantize a weight row by row: ``scale = max|w| / 448``, elements cast with saturation, halves to even.

    Args:
        weight: float matrix ``(out, in)``.
        name: the tensor's name, for errors.
        device: where to compute.

    Returns:
        float8_e4m3fn codes ``(out, in)`` with scale and offset ``(out, 1)``; a row of zeros has the smallest normal
        float32 number as its scale.

    Raises:
        InvalidModelError: the weight holds NaN or infinity.
    """
    out, width = weight.shape
    codes = torch.empty(out, width, dtype=torch.float8_e4m3fn)
    scale = e4m3_scale(torch.zeros(out, 1))
    if not out or not width:
        return QuantizedWeight(codes, scale, torch.zeros_like(scale), float("inf"))
    step = rows_per_block(width, device)

    def work(start: int) -> tuple[float, float]:
        stop = min(start + step, out)
        rows = weight.rows(start, stop).to(device).float()
        found = e4m3_scale(rows.abs().amax(1, keepdim=True))
        steps = rows / found
        elements = to_e4m3(steps)
        codes[start:stop].copy_(elements)
        scale[start:stop].copy_(found)
        if (start // step) % _SAMPLE_EVERY:
            return 0.0, 0.0
        unit = found.double().square()
        noise = (e4m3_values(elements) - steps).square().sum(1, keepdim=True)
        signal = steps.square_().sum(1, keepdim=True)
        return float((signal.double() * unit).sum()), float((noise.double() * unit).sum())

    energies = for_each_block(work, range(0, out, step))
    refuse_infinite(scale, name)
    return QuantizedWeight(codes, scale, torch.zeros_like(scale), decibels(energies))
