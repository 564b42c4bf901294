"""Integer scale and offset maths, in float32 whatever the model's dtype.

Quantizing adds the offset, dequantizing subtracts it::

    q  = clamp(round(x / s + z), -2^(B-1), 2^(B-1) - 1)        round half to even
    x' = (q - z) * s

The range always contains zero, so zero is represented exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["EPSILON", "affine_parameters", "by_groups", "dequantize", "dequantize_groups", "quantize"]
__all__ += ["quantize_groups", "quantize_per_token", "stored_parameters"]

EPSILON = torch.finfo(torch.float32).eps


def affine_parameters(minimum: Tensor, maximum: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale and offset for a range.

    Symmetric: ``s = max(|min|, |max|) / (2^(B-1) - 1)``, ``z = 0``. Asymmetric: ``s = (max - min) / (2^B - 1)``,
    ``z = round(-min / s) - 2^(B-1)``. The scale is floored at float32 epsilon.

    Args:
        minimum: smallest values, any shape; raised to at most 0.
        maximum: largest values, same shape; raised to at least 0.

    Returns:
        Two float32 tensors of that shape; the offset is integral.
    """
    low = minimum.float().clamp(max=0.0)
    high = maximum.float().clamp(min=0.0)
    if symmetric:
        scale = (torch.maximum(-low, high) / (2 ** (bits - 1) - 1)).clamp(min=EPSILON)
        return scale, torch.zeros_like(scale)
    levels = 2**bits - 1
    scale = (high / levels - low / levels).clamp(min=EPSILON)
    return scale, torch.round(-low / scale) - 2 ** (bits - 1)


def stored_parameters(
    minimum: Tensor, maximum: Tensor, bits: int, symmetric: bool, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """:func:`affine_parameters` whose scale is a number of ``dtype``, because it is stored in that; None: float32.

    The offset is taken from that scale, and kept within the codes: a scale that was rounded down asks for more levels
    than there are.
    """
    scale, offset = affine_parameters(minimum, maximum, bits, symmetric)
    if dtype is None or dtype == torch.float32:
        return scale, offset
    scale = scale.to(dtype).float()
    if not symmetric:
        half = 2 ** (bits - 1)
        offset = (torch.round(-minimum.float().clamp(max=0.0) / scale) - half).clamp(-half, half - 1)
    return scale, offset


def quantize(x: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """Integer codes of ``x`` as int8; ``scale`` and ``offset`` broadcast against it."""
    half = 2 ** (bits - 1)
    return (x.float() / scale + offset).round_().clamp_(-half, half - 1).to(torch.int8)


def dequantize(q: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """The float32 values that codes stand for."""
    return (q.float() - offset) * scale


def by_groups(matrix: Tensor, groups: int) -> Tensor:
    """A matrix ``(rows, columns)`` seen as ``(rows, groups, columns / groups)``: groups are runs of columns."""
    return matrix.reshape(matrix.shape[0], groups, matrix.shape[1] // groups)


def quantize_groups(matrix: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    """int8 codes of a matrix ``(out, in)`` whose scale and offset ``(out, groups)`` are shared by runs of columns."""
    codes = quantize(by_groups(matrix, scale.shape[1]), scale.unsqueeze(2), offset.unsqueeze(2), bits)
    return codes.reshape(matrix.shape)


def dequantize_groups(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """The float32 values of codes ``(out, in)`` with scale and offset ``(out, groups)``."""
    if scale.shape[1] == 1:
        return dequantize(codes, scale, offset)
    values = dequantize(by_groups(codes, scale.shape[1]), scale.unsqueeze(2), offset.unsqueeze(2))
    return values.reshape(codes.shape)


def quantize_per_token(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Dynamic symmetric quantization of activations ``(..., channels)``: codes and one scale per token ``(..., 1)``."""
    scale, offset = affine_parameters(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), bits, symmetric=True)
    return quantize(x, scale, offset, bits), scale
