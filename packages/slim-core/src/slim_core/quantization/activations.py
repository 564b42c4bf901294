"""The scale and offset of a static activation, from what was observed of it."""

from __future__ import annotations

import torch
from torch import Tensor

from slim_core.quantization.affine import affine_parameters
from slim_core.quantization.statistics import InputStatistics
from slim_core.recipe.qconfig import ActConfig

__all__ = ["static_parameters"]


def static_parameters(
    config: ActConfig, seen: InputStatistics, name: str, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Scale and offset of an int8 input, two float32 tensors ``(1,)``.

    The scale is one that the engine's dtype can hold, because it is stored in it; the offset is taken from that scale.

    Args:
        name: the linear, for errors.
        dtype: the engine's dtype, None if it is not known.

    Raises:
        SpecError: nothing was observed.
        InvalidModelError: NaN or infinity was observed.
    """
    low, high = seen.range.bounds(config.ext.get("aggregation_type", "max"), name)
    scale, offset = affine_parameters(low, high, bits=8, symmetric=config.symmetric)
    if dtype is not None:
        scale = scale.to(dtype).float()
    if not config.symmetric:
        offset = (torch.round(-low.clamp(max=0.0) / scale) - 128).clamp(-128, 127)
    return scale, offset
