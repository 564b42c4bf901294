"""The scale and offset of a static activation, from what was observed of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slim_core.quantization.affine import stored_parameters
from slim_core.quantization.clipping import Metric, clipping_range
from slim_core.quantization.statistics import InputStatistics
from slim_core.recipe.qconfig import ActConfig, Ext

__all__ = ["HistogramOptions", "static_parameters"]


@dataclass(frozen=True)
class HistogramOptions:
    """Settings of ``histogram``: bins at most, what the clipping range minimises, and the percentage it keeps."""

    bins: int = 8192
    metric: Metric = "mse"
    percentile: float = 99.99

    @classmethod
    def of(cls, ext: Ext) -> HistogramOptions:
        """From the settings of a recipe."""
        return cls(
            bins=ext.get("bins", cls.bins),
            metric=ext.get("metric", cls.metric),
            percentile=ext.get("percentile", cls.percentile),
        )


def static_parameters(
    config: ActConfig, seen: InputStatistics, name: str, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Scale and offset of an int8 input, two float32 tensors ``(1,)``.

    The scale is one that the engine's dtype can hold, because it is stored in it; the offset is taken from that scale.
    An expert that too few tokens reached has the range of all experts of its layer, whatever the method.

    Args:
        name: the linear, for errors.
        dtype: the engine's dtype, None if it is not known.

    Raises:
        SpecError: nothing was observed.
        InvalidModelError: NaN or infinity was observed.
    """

    def grid(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return stored_parameters(low, high, 8, config.symmetric, dtype)

    if seen.siblings is not None:
        return grid(*seen.siblings.range.bounds("max", name))
    if config.method == "histogram":
        options = HistogramOptions.of(config.ext)
        histogram = seen.histogram.seen(name, options.bins)
        return grid(
            *clipping_range(
                histogram, grid, symmetric=config.symmetric, metric=options.metric, percentile=options.percentile
            )
        )
    return grid(*seen.range.bounds(config.ext.get("aggregation_type", "max"), name))
