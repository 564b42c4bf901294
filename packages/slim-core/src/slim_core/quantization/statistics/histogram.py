"""How often which values occur in a tensor: the same counts however the calibration set is cut and ordered.

Bins are ``2^exponent`` wide and begin at multiples of that, so two neighbours make exactly one bin of the next width.
The exponent is the smallest that lets the extremes seen so far fit into :data:`BINS` bins. What is counted after all
samples is therefore a function of all values alone: not of their order, of batches, or of the ranks that counted them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from slim_core.quantization.statistics.problems import not_finite, not_observed

__all__ = ["BINS", "Histogram"]

BINS = 32768
_CHUNK = 1 << 18
# Below, a bin would be finer than float32 numbers of this size, or its width not a normal float32 number.
_MANTISSA_BITS = 24
_LEAST_EXPONENT = -126


@dataclass
class Histogram:
    """Counts of the values of a tensor; None before any was seen.

    Args:
        counts: int64 ``(bins,)``, on the CPU; bin i covers ``[start + i, start + i + 1) * 2^exponent``.
        minimum, maximum: the extremes.
        finite: whether neither NaN nor infinity was seen; if it was, nothing else is of any use.
    """

    counts: Tensor | None = None
    start: int = 0
    exponent: int = _LEAST_EXPONENT
    minimum: float = math.inf
    maximum: float = -math.inf
    finite: bool = True

    def update(self, x: Tensor) -> None:
        """Take in activations of any shape."""
        if not x.numel():
            return
        flat = x.detach().reshape(-1)
        low, high = (float(value.float()) for value in torch.aminmax(flat))
        if not (math.isfinite(low) and math.isfinite(high)):
            self.finite = False
            return
        minimum, maximum = min(self.minimum, low), max(self.maximum, high)
        exponent = _exponent(minimum, maximum, BINS)
        start, stop = _bin(low, exponent), _bin(high, exponent) + 1
        counts = torch.zeros(stop - start, dtype=torch.int64, device=x.device)
        for first in range(0, len(flat), _CHUNK):
            index = _bins(flat[first : first + _CHUNK].float(), exponent).sub_(start).to(torch.int32)
            counts += torch.bincount(index, minlength=len(counts))
        self.merge(Histogram(counts.cpu(), start, exponent, low, high))

    def merge(self, other: Histogram) -> None:
        """Add what another one saw."""
        self.finite = self.finite and other.finite
        if other.counts is None:
            return
        minimum, maximum = min(self.minimum, other.minimum), max(self.maximum, other.maximum)
        exponent = _exponent(minimum, maximum, BINS)
        start, stop = _bin(minimum, exponent), _bin(maximum, exponent) + 1
        counts = torch.zeros(stop - start, dtype=torch.int64)
        for part in (self, other):
            if part.counts is not None:
                _add(counts, part.counts, part.start, start, exponent - part.exponent)
        self.counts, self.start, self.exponent = counts, start, exponent
        self.minimum, self.maximum = minimum, maximum

    def seen(self, name: str, bins: int = BINS) -> Histogram:
        """The same in at most ``bins`` bins (2 or more).

        Args:
            name: the linear, for errors.

        Raises:
            SpecError: nothing was observed.
            InvalidModelError: NaN or infinity was observed.
        """
        if not self.finite:
            raise not_finite(name)
        if self.counts is None:
            raise not_observed(name)
        exponent = max(self.exponent, _exponent(self.minimum, self.maximum, bins))
        start, stop = _bin(self.minimum, exponent), _bin(self.maximum, exponent) + 1
        counts = torch.zeros(stop - start, dtype=torch.int64)
        _add(counts, self.counts, self.start, start, exponent - self.exponent)
        return Histogram(counts, start, exponent, self.minimum, self.maximum)

    def edges(self) -> Tensor:
        """Where the bins begin, and where the last ends: float64 ``(bins + 1,)``, drawn in to the extremes."""
        assert self.counts is not None
        edges = (torch.arange(len(self.counts) + 1, dtype=torch.float64) + self.start) * 2.0**self.exponent
        edges[0], edges[-1] = self.minimum, self.maximum
        return edges


def _bins(x: Tensor, exponent: int) -> Tensor:
    """:func:`_bin` of float32 values, as float32: it holds them exactly, because they have at most 24 bits."""
    scaled = x * 2.0**-exponent
    if exponent > 0:  # the smallest numbers become zero, also those below it
        return scaled.floor().sub_(((x < 0) & (scaled == 0)).float())
    return scaled.floor_()


def _bin(value: float, exponent: int) -> int:
    return math.floor(math.ldexp(value, -exponent))


def _exponent(low: float, high: float, bins: int) -> int:
    """The smallest exponent with which values from ``low`` to ``high`` fall into at most ``bins`` bins."""
    size = max(abs(low), abs(high))
    exponent = max(_LEAST_EXPONENT, math.frexp(size)[1] - _MANTISSA_BITS if size else _LEAST_EXPONENT)
    if high > low:
        exponent = max(exponent, math.frexp((high - low) / bins)[1] - 1)
    while _bin(high, exponent) - _bin(low, exponent) >= bins:
        exponent += 1
    return exponent


def _add(target: Tensor, counts: Tensor, start: int, target_start: int, shift: int) -> None:
    """Add counts, whose bins are ``2^-shift`` times as wide, into those of ``target``."""
    # int64 shifts by 63 at most, which any index survives only as its sign.
    index = (torch.arange(len(counts)) + start) >> min(shift, 63)
    target.index_add_(0, index - target_start, counts)
