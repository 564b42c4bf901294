"""Extremes and sums of every input channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ChannelStatistics"]


@dataclass
class ChannelStatistics:
    """Statistics of the channels ``(channels,)`` over all tokens; None before anything was seen.

    Args:
        minimum, maximum: float32 extremes.
        total, magnitude: float64 sums of the values and of their absolute values.
        tokens: how many tokens were seen.
    """

    minimum: Tensor | None = None
    maximum: Tensor | None = None
    total: Tensor | None = None
    magnitude: Tensor | None = None
    tokens: int = 0

    def update(self, x: Tensor) -> None:
        """Take in activations ``(..., channels)``."""
        rows = x.detach().reshape(-1, x.shape[-1])
        if not len(rows):
            return
        low, high = rows.amin(0).float(), rows.amax(0).float()
        total = rows.sum(0, dtype=torch.float64)
        magnitude = rows.abs().sum(0, dtype=torch.float64)
        self._add(low, high, total, magnitude, len(rows))

    def merge(self, other: ChannelStatistics) -> None:
        """Add what another one saw."""
        if other.minimum is None or other.maximum is None or other.total is None or other.magnitude is None:
            return
        self._add(other.minimum, other.maximum, other.total, other.magnitude, other.tokens)

    def _add(self, low: Tensor, high: Tensor, total: Tensor, magnitude: Tensor, tokens: int) -> None:
        if self.minimum is None or self.maximum is None or self.total is None or self.magnitude is None:
            self.minimum, self.maximum, self.total, self.magnitude = low, high, total, magnitude
        else:
            self.minimum, self.maximum = torch.minimum(self.minimum, low), torch.maximum(self.maximum, high)
            self.total, self.magnitude = self.total + total, self.magnitude + magnitude
        self.tokens += tokens
