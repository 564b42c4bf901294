"""A weight rounded with learned parameters, and the gradients of these.

Per group of columns with extremes ``low <= 0 <= high`` and factors ``alpha``, ``beta`` that shrink them::

    symmetric    s = max(-low * alpha, high * beta) / (2^(B-1) - 1),         z = 0
    asymmetric   s = (high * beta - low * alpha) / (2^B - 1),                z = round(-low * alpha / s) - 2^(B-1)
    codes        q = clamp(round(w / s + z + v), -2^(B-1), 2^(B-1) - 1)      v moves a weight to another code
    weight       w' = (q - z) * s

Gradients pass straight through both roundings, and not through the clamp. The scale is rounded to the precision it
will have in use before anything is computed with it, so what is trained is what is written.

All matrices are seen by groups, ``(rows, groups, columns of a group)``; what a group shares is ``(rows, groups, 1)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slim_core.quantization.affine import stored_parameters

__all__ = ["WeightGrid", "WeightRange", "fake_quantized", "gradients", "round_weight", "scale_and_offset"]


@dataclass(frozen=True)
class WeightGrid:
    """The integers that a weight is rounded to, and the precision of its scales.

    Args:
        bits: width of the codes, 4 or 8.
        symmetric: whether the offset is zero.
    """

    bits: int
    symmetric: bool = True
    scale_dtype: torch.dtype = torch.float32

    @property
    def lowest(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        return 2 ** (self.bits - 1) - 1

    @property
    def steps(self) -> int:
        """Steps of the scale between the ends of the range."""
        return self.highest if self.symmetric else 2**self.bits - 1


@dataclass(frozen=True)
class WeightRange:
    """Extremes of groups ``(rows, groups, 1)``, float32, and the factors that shrink them."""

    low: Tensor
    high: Tensor
    alpha: Tensor
    beta: Tensor

    def rows(self, rows: slice) -> WeightRange:
        return WeightRange(self.low[rows], self.high[rows], self.alpha[rows], self.beta[rows])


def scale_and_offset(span: WeightRange, grid: WeightGrid) -> tuple[Tensor, Tensor]:
    """Scale, positive, and integral offset of every group, float32 ``(rows, groups, 1)``."""
    low, high = span.low * span.alpha, span.high * span.beta
    return stored_parameters(low, high, grid.bits, grid.symmetric, grid.scale_dtype)


def round_weight(weight: Tensor, scale: Tensor, offset: Tensor, shift: Tensor | None, grid: WeightGrid) -> Tensor:
    """The codes as float32, ``(rows, groups, columns)``; ``shift`` is v, None where it is zero throughout."""
    return _steps(weight, scale, offset, shift).round_().clamp_(grid.lowest, grid.highest)


def fake_quantized(weight: Tensor, span: WeightRange, shift: Tensor | None, grid: WeightGrid) -> Tensor:
    """The weight that the codes stand for, float32."""
    scale, offset = scale_and_offset(span, grid)
    return round_weight(weight, scale, offset, shift, grid).sub_(offset).mul_(scale)


def _steps(weight: Tensor, scale: Tensor, offset: Tensor, shift: Tensor | None) -> Tensor:
    # Into memory of its own: a float32 weight is the mapped file itself.
    steps = torch.div(weight, scale, out=torch.empty(weight.shape, device=weight.device))
    steps.add_(offset)
    return steps if shift is None else steps.add_(shift)


@dataclass(frozen=True)
class Gradients:
    """Gradients of v ``(rows, groups, columns)`` and of the factors ``(rows, groups, 1)``."""

    shift: Tensor
    alpha: Tensor
    beta: Tensor


def gradients(weight: Tensor, span: WeightRange, shift: Tensor | None, grid: WeightGrid, upstream: Tensor) -> Gradients:
    """The gradients of a loss, given that of the fake-quantized weight.

    Args:
        upstream: float32 ``(rows, groups, columns)``.
    """
    scale, offset = scale_and_offset(span, grid)
    rounded = _steps(weight, scale, offset, shift).round_()
    codes = rounded.clamp(grid.lowest, grid.highest)
    inside = rounded == codes
    passed = upstream * inside
    to_scale = ((codes - offset) * upstream).sum(-1, keepdim=True)
    to_scale -= (passed * weight).sum(-1, keepdim=True) / scale
    if grid.symmetric:
        below, above = -span.low * span.alpha, span.high * span.beta
        alpha = torch.where(below >= above, to_scale * -span.low, 0.0)
        beta = torch.where(above >= below, to_scale * span.high, 0.0)
    else:
        to_offset = (passed - upstream).sum(-1, keepdim=True) * scale
        to_scale = to_scale + to_offset * span.low * span.alpha / scale.square()
        alpha = -span.low * (to_scale + to_offset / scale * grid.steps)
        beta = span.high * to_scale
    return Gradients(passed.mul_(scale), alpha / grid.steps, beta / grid.steps)
