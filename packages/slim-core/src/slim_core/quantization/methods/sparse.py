"""The ``sparse`` weight method: int8 codes most of which fit four bits, for the W8A8S layers that engines compress.

In every row a few large weights are *protected*. The scale of the row is chosen for the others: the largest of them
becomes 7, so that they all fit -7..7, while protected ones use the whole width of int8. Few distinct codes make a
weight that compresses well. Nothing is clipped: a row whose protected weights are too large for that scale gets a wider
one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slim_core.quantization.affine import EPSILON
from slim_core.quantization.row_blocks import decibels, energy, for_each_block, rows_per_block
from slim_core.quantization.weights import QuantizedWeight, RowSource, refuse_infinite

__all__ = ["FRACTION", "SIGMA_FACTOR", "sparse_weight"]

FRACTION = 0.01
SIGMA_FACTOR = 3.0
_NARROW, _WIDE = 7, 127


def sparse_weight(
    weight: RowSource,
    *,
    fraction: float = FRACTION,
    use_sigma: bool = False,
    sigma_factor: float = SIGMA_FACTOR,
    name: str,
    device: torch.device | None = None,
) -> QuantizedWeight:
    """Quantize a weight row by row.

    ``s = max(m / 7, max|w| / 127)``, where ``m`` is the largest magnitude that is not protected, and
    ``q = round(w / s)``. A row of zeros has the scale 1, any other at least float32 epsilon.

    Args:
        weight: float matrix ``(out, in)``.
        fraction: share of every row that is protected: its largest magnitudes, rounded up to a whole number.
        use_sigma: protect what is further from the row's mean than ``sigma_factor`` standard deviations instead.
        name: the tensor's name, for errors.
        device: where to compute.

    Raises:
        InvalidModelError: the weight holds NaN or infinity.
    """
    out, width = weight.shape
    codes, scale = torch.empty(out, width, dtype=torch.int8), torch.ones(out, 1)
    if not out or not width:
        return QuantizedWeight(codes, scale, torch.zeros(out, 1), float("inf"))
    block = rows_per_block(width, device)
    protected = math.ceil(fraction * width - 1e-9)

    def work(start: int) -> tuple[float, float]:
        stop = min(start + block, out)
        rows = weight.rows(start, stop).to(device).float()
        magnitude = rows.abs()
        largest = magnitude.amax(1, keepdim=True)
        refuse_infinite(largest, name, start)
        narrow = _within(rows, magnitude, sigma_factor) if use_sigma else _below(magnitude, protected)
        s = torch.maximum(narrow / _NARROW, largest / _WIDE).clamp_(min=EPSILON).masked_fill_(largest == 0, 1)
        q = torch.div(rows, s, out=magnitude).round_()
        codes[start:stop].copy_(q)
        scale[start:stop].copy_(s)
        return energy(rows), energy(q.mul_(s).sub_(rows))

    energies = for_each_block(work, range(0, out, block))
    return QuantizedWeight(codes, scale, torch.zeros(out, 1), decibels(energies))


def _below(magnitude: Tensor, count: int) -> Tensor:
    """The largest magnitude ``(rows, 1)`` after the ``count`` largest of each row; 0 if there are no more."""
    if count >= magnitude.shape[1]:
        return torch.zeros_like(magnitude[:, :1])
    return magnitude.topk(count + 1, dim=1).values[:, -1:]


def _within(rows: Tensor, magnitude: Tensor, factor: float) -> Tensor:
    """The largest magnitude ``(rows, 1)`` of what is at most ``factor`` standard deviations from its row's mean.

    Moments are float64, so that the squares of large weights fit and a constant row has no deviation.
    """
    exact = rows.double()
    deviation, mean = torch.std_mean(exact, dim=1, correction=0, keepdim=True)
    protected = exact.sub_(mean).abs_() > factor * deviation
    return magnitude.masked_fill(protected, 0).amax(1, keepdim=True)
