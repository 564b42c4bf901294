"""What is known of the inputs of a linear: requested by processors, gathered in the one forward of a unit.

Statistics are kept in float32, can be merged in any order, and are finalised once.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slim_core.errors import InvalidModelError, SpecError

__all__ = ["InputObserver", "TensorRange"]


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
            raise SpecError(
                "no calibration sample reached this linear, so its activation range is unknown",
                where=name,
                remedy="use a larger calibration set, or exclude the linear or quantize it per_token",
            )
        low, high = self.minimum, self.maximum
        if aggregation == "mean":
            low, high = self.sum_of_minima / self.samples, self.sum_of_maxima / self.samples
        if not (low > float("-inf") and high < float("inf")):
            raise InvalidModelError(
                "its activations hold NaN or infinity", where=name, remedy="check the model and the calibration set"
            )
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


@dataclass
class InputObserver:
    """Watches the inputs of some linears while a unit runs.

    Linears that are given the very same tensor (q, k and v; gate and up) share the work and end with equal ranges.
    """

    ranges: dict[str, TensorRange] = field(default_factory=dict[str, TensorRange])
    _handles: list[Any] = field(default_factory=list[Any])
    _last: tuple[weakref.ref[Tensor], TensorRange] | None = None

    def watch(self, name: str, linear: nn.Module) -> None:
        """Start observing a linear."""
        self.ranges.setdefault(name, TensorRange())

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.ranges[name].merge(self._range_of(args[0] if args else kwargs["input"]))

        self._handles.append(linear.register_forward_pre_hook(hook, with_kwargs=True))

    def _range_of(self, x: Tensor) -> TensorRange:
        if self._last is not None and self._last[0]() is x:
            return self._last[1]
        seen = observe_range(x)
        self._last = (weakref.ref(x), seen)
        return seen

    def stop(self) -> None:
        """Stop observing; what was seen stays."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._last = None
