"""Extremes and sums of every input channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from slim_core.quantization.statistics.problems import not_finite
from slim_core.quantization.statistics.sums import shortened

__all__ = ["ChannelStatistics"]

_BLOCK_ELEMENTS, _CHANNELS = 1 << 18, 64


@dataclass
class ChannelStatistics:
    """Statistics of the channels ``(channels,)`` over all tokens; None before anything was seen.

    Args:
        minimum, maximum: float32 extremes.
        total, magnitude, square: float64 sums of the values, of their absolute values and of their squares; of each
            forward with 24 significant bits, so that they do not depend on the order of forwards.
        tokens: how many tokens were seen.
    """

    minimum: Tensor | None = None
    maximum: Tensor | None = None
    total: Tensor | None = None
    magnitude: Tensor | None = None
    square: Tensor | None = None
    tokens: int = 0

    def update(self, x: Tensor) -> None:
        """Take in activations ``(..., channels)``."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if not len(rows):
            return
        total, magnitude, square = torch.empty(3, rows.shape[1], dtype=torch.float64, device=rows.device).unbind(0)
        step = max(_CHANNELS, _BLOCK_ELEMENTS // len(rows))
        for start in range(0, rows.shape[1], step):  # a few at a time: the work in float64 stays small
            some = slice(start, start + step)
            wide = rows[:, some].to(torch.float64, copy=True)
            total[some] = wide.sum(0)
            magnitude[some] = wide.abs_().sum(0)
            square[some] = wide.square_().sum(0)
        sums = (shortened(total), shortened(magnitude), shortened(square))
        self.merge(ChannelStatistics(rows.amin(0).float(), rows.amax(0).float(), *sums, len(rows)))

    def merge(self, other: ChannelStatistics) -> None:
        """Add what another one saw."""
        self.minimum = _joined(torch.minimum, self.minimum, other.minimum)
        self.maximum = _joined(torch.maximum, self.maximum, other.maximum)
        self.total = _joined(torch.add, self.total, other.total)
        self.magnitude = _joined(torch.add, self.magnitude, other.magnitude)
        self.square = _joined(torch.add, self.square, other.square)
        self.tokens += other.tokens

    def settle(self) -> None:
        """All has been seen: round the sums, so that not even their last bit tells in which order they were made."""
        self.total, self.magnitude, self.square = (
            None if sums is None else shortened(sums) for sums in (self.total, self.magnitude, self.square)
        )

    def rescaled(self, scale: Tensor, shift: Tensor | None = None) -> ChannelStatistics:
        """The statistics of ``(x - shift) / scale``, with a positive scale ``(channels,)``.

        After a shift the sum of absolute values is not known.
        """
        if self.minimum is None or self.maximum is None or self.total is None or self.square is None:
            return ChannelStatistics()
        low, high, total, square = self.minimum, self.maximum, self.total, self.square
        scale = scale.to(low.device)
        exact = scale.double()
        magnitude = self.magnitude
        if shift is not None:
            shift = shift.to(low.device)
            z = shift.double()
            low, high, magnitude = low - shift, high - shift, None
            square = square - 2 * z * total + self.tokens * z.square()
            total = total - self.tokens * z
        return ChannelStatistics(
            low / scale,
            high / scale,
            total / exact,
            None if magnitude is None else magnitude / exact,
            square / exact.square(),
            self.tokens,
        )

    def absmax(self) -> Tensor | None:
        """The largest absolute value of every channel, float32 ``(channels,)``; None if nothing was seen."""
        if self.minimum is None or self.maximum is None:
            return None
        return torch.maximum(self.minimum.abs(), self.maximum.abs())

    def mean_square(self, name: str) -> Tensor | None:
        """``E[x^2]`` of every channel, float64 ``(channels,)``; None if nothing was seen.

        Args:
            name: the linear, for errors.

        Raises:
            InvalidModelError: NaN or infinity was observed.
        """
        if self.square is None:
            return None
        if not bool(torch.isfinite(self.square).all()):
            raise not_finite(name)
        return self.square / self.tokens


def _joined(join: Callable[[Tensor, Tensor], Tensor], one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return join(one, other)
