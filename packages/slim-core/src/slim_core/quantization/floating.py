"""The small floating-point formats: E4M3 (FP8) and E2M1 (FP4). Arithmetic is float32 whatever the model's dtype.

E4M3 has four exponent and three mantissa bits, reaches 448 and knows NaN but no infinity (Micikevicius et al., "FP8
Formats for Deep Learning", arXiv:2209.05433). Values are cast as hardware casts them: rounded half to even, and
saturating.

E2M1 has the values 0, 0.5, 1, 1.5, 2, 3, 4 and 6 with a sign (OCP Microscaling Formats v1.0). Its code is the index of
the magnitude, plus 8 where the sign is negative, -0.0 included. The ascendv1 format and vLLM-Ascend round halves away
from zero.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["E2M1_MAX", "E4M3_MAX", "SMALLEST_SCALE", "e2m1_codes", "e2m1_values", "e4m3_scale", "e4m3_values"]
__all__ += ["quantize_e4m3_per_token", "round_to_e2m1", "round_to_e4m3", "to_e4m3"]

E4M3_MAX = 448.0
E2M1_MAX = 6.0
SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""Floor of float32 scales: the smallest normal number, so that nothing is divided by zero and no scale is flushed."""

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The bits of a float32 that decide its E2M1 code: sign, exponent and two mantissa bits, because every point half-way
# between neighbours has at most two; and whether anything is left below, which tells such a point from what is above.
_DECIDING_BITS = 21
_REST = (1 << _DECIDING_BITS) - 1


def to_e4m3(x: Tensor) -> Tensor:
    """``x`` as float8_e4m3fn: rounded half to even, saturating at 448; NaN stays NaN."""
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def e4m3_values(codes: Tensor) -> Tensor:
    """The float32 values of float8_e4m3fn numbers; a table is faster than torch's own cast."""
    index = codes.view(torch.uint8).flatten().to(torch.int32)
    return _e4m3_table(codes.device).index_select(0, index).view(codes.shape)


def round_to_e4m3(x: Tensor) -> Tensor:
    """The E4M3 numbers nearest to ``x`` as float32: halves to even, saturating at 448; NaN stays NaN."""
    return e4m3_values(to_e4m3(x))


def e4m3_scale(magnitude: Tensor) -> Tensor:
    """The float32 scale that maps a largest magnitude to 448, the largest E4M3 number."""
    return (magnitude.float() / E4M3_MAX).clamp(min=SMALLEST_SCALE)


def quantize_e4m3_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic quantization of activations ``(..., channels)``: float8_e4m3fn, and one scale per token ``(..., 1)``."""
    values = x.float()
    scale = e4m3_scale(values.abs().amax(-1, keepdim=True))
    return to_e4m3(values / scale), scale


def e2m1_codes(x: Tensor) -> Tensor:
    """The uint8 codes 0..15 of the E2M1 numbers nearest to ``x``: halves away from zero, saturating at 6.

    NaN has no code; it becomes that of 6.
    """
    index = _table_index(x.float(), ties_to_even=False)
    return _e2m1_tables(x.device, False)[0].index_select(0, index).view(x.shape)


def e2m1_values(codes: Tensor) -> Tensor:
    """The float32 values of codes 0..15."""
    magnitudes = torch.tensor(_MAGNITUDES, device=codes.device)
    return torch.cat([magnitudes, -magnitudes]).index_select(0, codes.flatten().to(torch.int32)).view(codes.shape)


def round_to_e2m1(x: Tensor, *, ties_to_even: bool = False) -> Tensor:
    """The E2M1 numbers nearest to ``x`` as float32, saturating at 6; halves away from zero, or to the even code."""
    index = _table_index(x.float(), ties_to_even=ties_to_even)
    return _e2m1_tables(x.device, ties_to_even)[1].index_select(0, index).view(x.shape)


def _table_index(x: Tensor, *, ties_to_even: bool) -> Tensor:
    bits = x.contiguous().view(torch.int32).flatten()
    index = (bits >> (_DECIDING_BITS - 1)).bitwise_and_(0xFFE)
    return index.bitwise_or_((bits & _REST) != 0) if ties_to_even else index


@cache
def _e4m3_table(device: torch.device) -> Tensor:
    return torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).float().to(device)


@cache
def _e2m1_tables(device: torch.device, ties_to_even: bool) -> tuple[Tensor, Tensor]:
    """Code and value for every combination of the deciding bits and of whether anything is left below them."""
    index = torch.arange(4096, dtype=torch.int32, device="cpu")
    example = (((index >> 1) << _DECIDING_BITS) | (index & 1)).view(torch.float32)
    code = torch.where(torch.signbit(example), 8, 0)
    for upper in range(1, len(_MAGNITUDES)):
        half = (_MAGNITUDES[upper - 1] + _MAGNITUDES[upper]) / 2
        up = example.abs() > half
        if not ties_to_even or upper % 2 == 0:
            up = up | (example.abs() == half)
        code = code + up
    code = torch.where(example.isnan(), torch.where(torch.signbit(example), 15, 7), code).to(torch.uint8)
    return code.to(device), e2m1_values(code).to(device)
