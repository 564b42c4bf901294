"""Sums that come out the same in whatever order, and by however many processes, their parts are added.

What one forward contributes is rounded to 24 significant bits, as float32 has them, and parts are added in float64,
which has 53. As long as the parts lie within some 2^20 of each other, no addition rounds, so the order cannot matter;
beyond that the last bits of a float64 can differ, and rounding the sum to 24 bits once more hides that but for one case
in some 2^28.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accumulator", "shortened"]

_DROPPED = 53 - 24


def shortened(x: Tensor) -> Tensor:
    """float64 values rounded to 24 significant bits, float64; infinity and NaN stay what they are."""
    bits = x.contiguous().view(torch.int64)
    return ((bits + (1 << (_DROPPED - 1))) & -(1 << _DROPPED)).view(torch.float64)


def accumulator(device: torch.device) -> torch.dtype:
    """What sums are kept in on a device: float64, but on an NPU, which only emulates it, float32."""
    return torch.float32 if device.type == "npu" else torch.float64
