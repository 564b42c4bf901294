"""Where to clip an activation: the range whose grid represents a histogram best.

Values inside a bin are taken to be spread evenly over it. The squared error of a grid is then exact, from the running
sums of counts, values and squares at the borders between its levels, however many bins there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from slim_core.quantization.statistics.histogram import Histogram

__all__ = ["Grid", "Metric", "clipping_range"]

Metric = Literal["mse", "percentile", "entropy"]
Grid = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From the ends of ranges ``(n,)`` to scales and offsets ``(n,)``, as they will be stored."""

_BITS = 8
_EXHAUSTIVE = 1024
_COARSE = 16
_AT_ONCE = 256


def clipping_range(
    seen: Histogram, grid: Grid, *, symmetric: bool, metric: Metric = "mse", percentile: float = 99.99
) -> tuple[Tensor, Tensor]:
    """The ends of the range to quantize with, two float32 tensors ``(1,)``; the range contains zero.

    Args:
        seen: not empty, finite.
        grid: what scheme a range makes.
        symmetric: whether the range is symmetric.
        metric: ``mse``: least squared error, of the scheme with its own rounding of scale and offset. ``entropy``:
            least Kullback-Leibler divergence of the represented from the observed distribution (Migacz, "8-bit
            inference with TensorRT", GTC 2017). ``percentile``: the middle ``percentile`` percent of the values.
            The first two are never worse than the extremes, by their own measure.
    """
    if metric == "percentile":
        low, high = _percentile(seen, percentile / 100, symmetric)
        return torch.tensor([min(low, 0.0)]), torch.tensor([max(high, 0.0)])
    cost = _SquaredError(seen) if metric == "mse" else _Divergence(seen)

    def costs(low: Tensor, high: Tensor) -> Tensor:
        found: list[Tensor] = []
        for first in range(0, len(low), _AT_ONCE):
            part = slice(first, first + _AT_ONCE)
            scale, offset = grid(low[part].float(), high[part].float())
            found.append(cost(scale.double(), offset.double()))
        return torch.cat(found)

    edges = seen.edges()
    zero = edges.new_zeros(1)
    if symmetric:
        low, high = _search(costs, zero, torch.cat([zero, edges.abs().sort().values]))
        return -high.float(), high.float()
    low, high = _search(costs, torch.cat([zero, edges[edges < 0].flip(0)]), torch.cat([zero, edges[edges > 0]]))
    return low.float(), high.float()


def _search(costs: Callable[[Tensor, Tensor], Tensor], lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
    """The best pair of ends: of all if there are few, else from a coarse choice of them by ever smaller steps.

    Args:
        lows, highs: candidates, those closest to zero first.
    """
    if len(lows) * len(highs) <= _EXHAUSTIVE:
        i, j = (axis.flatten() for axis in torch.meshgrid(_all(lows), _all(highs), indexing="ij"))
    else:
        i, j = (axis.flatten() for axis in torch.meshgrid(_coarse(lows), _coarse(highs), indexing="ij"))
    # The extremes come first, so that nothing replaces them that is not better.
    values = costs(lows[i.flip(0)], highs[j.flip(0)])
    at = len(i) - 1 - int(values.argmin())
    best, x, y = float(values.min()), int(i[at]), int(j[at])
    if len(i) == len(lows) * len(highs):
        return lows[x : x + 1], highs[y : y + 1]
    moves = torch.cartesian_prod(torch.arange(-2, 3), torch.arange(-2, 3))
    step = max(len(lows), len(highs)) // _COARSE
    while step:
        near_x = (x + moves[:, 0] * step).clamp(0, len(lows) - 1)
        near_y = (y + moves[:, 1] * step).clamp(0, len(highs) - 1)
        values = costs(lows[near_x], highs[near_y])
        at = int(values.argmin())
        if float(values[at]) < best:
            best, x, y = float(values[at]), int(near_x[at]), int(near_y[at])
        else:
            step //= 2
    return lows[x : x + 1], highs[y : y + 1]


def _all(candidates: Tensor) -> Tensor:
    return torch.arange(len(candidates))


def _coarse(candidates: Tensor) -> Tensor:
    """Positions evenly from the first to the last, and some more towards the first."""
    last = len(candidates) - 1
    even = [round(last * i / (_COARSE - 1)) for i in range(_COARSE)]
    return torch.tensor(sorted({*even, *(last >> i for i in range(1, 12))}))


class _Running:
    """Counts, sums and sums of squares of all values below a point."""

    def __init__(self, seen: Histogram) -> None:
        assert seen.counts is not None
        self.counts = seen.counts.double()
        self.edges = seen.edges()
        self.start, self.width = seen.start, 2.0**seen.exponent
        a, b = self.edges[:-1], self.edges[1:]
        parts = torch.stack([torch.ones_like(a), (a + b) / 2, (a * a + a * b + b * b) / 3]) * self.counts
        self.sums = torch.nn.functional.pad(parts.cumsum(1), (1, 0))

    def below(self, point: Tensor) -> Tensor:
        """The three sums, ``(3, *point.shape)``."""
        index = (point / self.width).floor_().sub_(self.start).clamp_(0, len(self.counts) - 1).long()
        a, b = self.edges[index], self.edges[index + 1]
        at = torch.minimum(torch.maximum(point, a), b)
        share = torch.where(b > a, (at - a) / (b - a), (point > a).double()) * self.counts[index]
        parts = torch.stack([share, share * (a + at) / 2, share * (a * a + a * at + at * at) / 3])
        return self.sums[:, index] + parts


class _SquaredError:
    """Sums of squared errors of grids, each a scale and an offset."""

    def __init__(self, seen: Histogram) -> None:
        self._running = _Running(seen)
        self._total = self._running.sums[:, -1]

    def __call__(self, scale: Tensor, offset: Tensor) -> Tensor:
        levels = _levels(offset) * scale.unsqueeze(1)
        inner = self._running.below((levels[:, 1:] + levels[:, :-1]) / 2)
        ends = inner.new_zeros(3, len(scale), 1), self._total.view(3, 1, 1).expand(3, len(scale), 1)
        count, total, squares = torch.cat([ends[0], inner, ends[1]], dim=2).diff(dim=2)
        return (squares - 2 * levels * total + levels.square() * count).sum(1)


class _Divergence:
    """Divergences of what grids make of a histogram from it, each grid a scale and an offset.

    What a level stands for is spread evenly over the bins of its cell that are not empty; what lies beyond the last
    level counts as observed at the last bin inside that is not empty, and is missing in what is represented.
    Zeros, which are many after some activation functions, are left out: every grid represents them exactly.
    """

    def __init__(self, seen: Histogram) -> None:
        assert seen.counts is not None
        counts = _without_spike(seen.counts.double(), -seen.start)
        self._start, self._width, self._total = seen.start, 2.0**seen.exponent, counts.sum()
        self._counts = counts
        filled = (counts > 0).double()
        own = torch.xlogy(counts, counts)
        self._sums = torch.nn.functional.pad(torch.stack([counts, filled, own]).cumsum(1), (1, 0))
        position = torch.arange(len(counts))
        # The filled bin at or after, and the one before, every border.
        self._next = torch.where(counts > 0, position, len(counts)).flip(0).cummin(0).values.flip(0)
        self._last = torch.where(counts > 0, position, -1).cummax(0).values

    def __call__(self, scale: Tensor, offset: Tensor) -> Tensor:
        levels = _levels(offset)
        borders = torch.cat([levels - 0.5, levels[:, -1:] + 0.5], dim=1) * scale.unsqueeze(1)
        index = (borders / self._width).round_().sub_(self._start).clamp_(0, len(self._counts)).long()
        count, filled, own = self._sums[:, index].diff(dim=2)
        inside = count.sum(1)
        spread = count / filled.clamp(min=1)
        divergence = (own - torch.xlogy(count, spread)).sum(1)
        first = self._next[index[:, 0].clamp(max=len(self._counts) - 1)].clamp(max=len(self._counts) - 1)
        last = self._last[(index[:, -1] - 1).clamp(min=0)].clamp(min=0)
        below, above = self._sums[0, index[:, 0]], self._total - self._sums[0, index[:, -1]]
        for bin_, beyond, others in ((first, below, 0), (last, above, torch.where(first == last, below, 0))):
            cell = (torch.searchsorted(index, bin_.unsqueeze(1), right=True) - 1).clamp(0, count.shape[1] - 1)
            here = self._counts[bin_] + others
            divergence += torch.xlogy(here + beyond, here + beyond) - torch.xlogy(here, here)
            divergence -= torch.xlogy(beyond, spread.gather(1, cell).squeeze(1))
        divergence = divergence / self._total - self._total.log() + inside.log()
        # With less than a bin for every level only clipping is lost, and in the end not even that: no measure at all.
        whole = (inside == self._total) | (index[:, -1] - index[:, 0] >= levels.shape[1])
        return torch.where(whole & (inside > 0), divergence, torch.inf)


def _without_spike(counts: Tensor, zero: int) -> Tensor:
    """Counts where the bin of zero has no more than its neighbours."""
    around = [counts[i] for i in (zero - 1, zero + 1) if 0 <= i < len(counts)]
    if 0 <= zero < len(counts) and around:
        counts[zero] = torch.minimum(counts[zero], torch.stack(around).amax())
    return counts


def _levels(offset: Tensor) -> Tensor:
    """The values of all codes in units of the scale, ``(n, 256)``."""
    codes = torch.arange(-(2 ** (_BITS - 1)), 2 ** (_BITS - 1), dtype=torch.float64)
    return codes - offset.unsqueeze(1)


def _percentile(seen: Histogram, share: float, symmetric: bool) -> tuple[float, float]:
    """The ends of the middle ``share`` of all values; the same distance from zero if symmetric."""
    running = _Running(seen)
    total = float(running.sums[0, -1])

    def below(point: float) -> float:
        return float(running.below(torch.tensor([point], dtype=torch.float64))[0])

    if symmetric:
        size = max(-seen.minimum, seen.maximum)
        high = _first(lambda t: below(t) - below(-t) >= share * total, 0.0, size)
        return -high, high
    tail = (1 - share) / 2 * total
    low = _first(lambda t: below(t) > tail, seen.minimum, seen.maximum) if tail else seen.minimum
    high = _first(lambda t: below(t) >= total - tail, seen.minimum, seen.maximum) if tail else seen.maximum
    return low, high


def _first(reached: Callable[[float], bool], low: float, high: float) -> float:
    """Where a condition that holds from some point on begins to hold; ``high`` if nowhere before."""
    for _ in range(64):
        middle = (low + high) / 2
        if reached(middle):
            high = middle
        else:
            low = middle
    return high
