"""Extremes of a whole tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slim_core.quantization.statistics.problems import not_finite, not_observed

__all__ = ["TensorRange", "observe_range"]


@dataclass
class TensorRange:
    """Extremes of all values of a tensor over the calibration set.

    ``minimum`` and ``maximum`` are over everything; the sums make the mean of the extremes per sample
    (``aggregation_type: mean``).
    """

    minimum: float = float("inf")
    maximum: float = float("-inf")
    sum_of_minima: float = 0.0
    sum_of_maxima: float = 0.0
    samples: int = 0
    tokens: int = 0

    def merge(self, other: TensorRange) -> None:
        """Add what another one saw."""
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)
        self.sum_of_minima += other.sum_of_minima
        self.sum_of_maxima += other.sum_of_maxima
        self.samples += other.samples
        self.tokens += other.tokens

    def bounds(self, aggregation: str, name: str) -> tuple[Tensor, Tensor]:
        """The range to quantize with, two float32 tensors of shape ``(1,)``.

        Args:
            aggregation: ``max`` for the overall extremes, ``mean`` for the mean of each sample's.
            name: the linear, for errors.

        Raises:
            SpecError: nothing was observed.
            InvalidModelError: NaN or infinity was observed.
        """
        if not self.tokens:
            raise not_observed(name)
        low, high = self.minimum, self.maximum
        if aggregation == "mean":
            low, high = self.sum_of_minima / self.samples, self.sum_of_maxima / self.samples
        if not (low > float("-inf") and high < float("inf")):
            raise not_finite(name)
        return torch.tensor([low]), torch.tensor([high])


def observe_range(x: Tensor) -> TensorRange:
    """The range of one batch of activations ``(batch, ..., channels)``; every batch row is one sample."""
    if not x.numel():
        return TensorRange()
    batch = x.detach().reshape(x.shape[0], -1) if x.dim() > 2 else x.detach().reshape(1, -1)
    minima, maxima = batch.amin(1).cpu().double(), batch.amax(1).cpu().double()
    low, high = float(minima.min()), float(maxima.max())
    if low != low or high != high:
        low, high = float("-inf"), float("inf")
    return TensorRange(low, high, float(minima.sum()), float(maxima.sum()), len(batch), x.numel() // x.shape[-1])
