"""Linears whose weight stays in floating point and is mostly a matter of zeros."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from slim_core.quantization.kinds import LayerKind

__all__ = ["SparseFloat"]


@dataclass(frozen=True, eq=False)
class SparseFloat:
    """W16A16S: ``y = x @ weight.T + bias``, where many weights are zero.

    Args:
        weight: ``(out, in)`` in the model's dtype.
        bias: ``(out,)`` or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    kind = LayerKind.W16A16S

    def simulate(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def dequantized(self) -> Tensor:
        return self.weight.float()
