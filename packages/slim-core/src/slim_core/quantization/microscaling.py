"""Microscaling formats: blocks of 32 columns that share a power of two (OCP Microscaling Formats v1.0).

A value is ``element * 2^E``. The exponent ``E`` of a block is stored as ``E + 127`` in a byte (E8M0). Elements are E4M3
(MXFP8) or E2M1 (MXFP4). Exponents are taken apart and put together bit by bit, never with logarithms, so that they are
exact at powers of two and next to them, and blocks of tiny values keep their relative precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from slim_core.quantization.floating import (
    E2M1_MAX,
    SMALLEST_SCALE,
    e2m1_codes,
    e2m1_values,
    e4m3_values,
    round_to_e2m1,
    round_to_e4m3,
    to_e4m3,
)

__all__ = ["BLOCK", "LOWEST", "MXFP4", "MXFP4_FLOOR", "MXFP8", "MXFP8_FLOOR", "ExponentRule", "MxFormat", "by_blocks"]
__all__ += ["dual_scale_activations", "dual_scales", "exponents_of", "from_blocks", "from_bytes", "magnitudes"]
__all__ += ["mx_dequantized", "mx_values", "mxfp4_activations", "mxfp8_activations", "power_of_two", "to_bytes"]

BLOCK = 32
"""Columns that share an exponent."""

LOWEST = -127
"""The smallest exponent that E8M0 can hold."""


@dataclass(frozen=True)
class MxFormat:
    """Elements of a microscaling format.

    Args:
        dtype: how elements are kept: float8_e4m3fn numbers, or uint8 codes 0..15.
        highest: the largest exponent; with a larger one the largest element would stand for more than float32 holds.
        encode: from scaled float32 values to the nearest elements.
        round: the same, as float32 values.
    """

    dtype: torch.dtype
    highest: int
    encode: Callable[[Tensor], Tensor]
    round: Callable[[Tensor], Tensor]


MXFP8 = MxFormat(torch.float8_e4m3fn, 119, to_e4m3, round_to_e4m3)
MXFP4 = MxFormat(torch.uint8, 125, e2m1_codes, round_to_e2m1)


@dataclass(frozen=True)
class ExponentRule:
    """The exponent of a block is the smallest that brings its largest magnitude below a limit.

    ``floor(log2 m) - 8``, the rule of the OCP for MXFP8, is the limit 512; ``ceil(log2(m / c))`` is the limit ``c``,
    inclusive.

    Args:
        limit: in units of the elements; scaled magnitudes come to lie between half of it and all of it.
        inclusive: whether a magnitude may come to lie on the limit itself.
    """

    limit: float
    inclusive: bool = False

    @property
    def offset(self) -> int:
        """What the exponent of a block is next to that of its largest magnitude, as ``frexp`` gives it."""
        return -math.frexp(self.limit)[1]

    def exceeded(self, mantissa: Tensor) -> Tensor:
        """Whether the exponent must be one more, because the mantissa of the largest magnitude is beyond the limit's.

        Compared in float64, because not every limit is a float32 number.
        """
        limit = math.frexp(self.limit)[0]
        return mantissa.double() > limit if self.inclusive else mantissa.double() >= limit


MXFP8_FLOOR = ExponentRule(512.0)
"""``floor(log2 m) - 8``."""
MXFP4_FLOOR = ExponentRule(8.0)
"""``floor(log2 m) - 2``."""


def exponents_of(magnitude: Tensor, rule: ExponentRule, highest: int) -> Tensor:
    """The exponents of blocks with these largest magnitudes (float32), int32 in -127..``highest``; -127 for zeros."""
    mantissa, exponent = torch.frexp(magnitude)
    found = (exponent + rule.offset + rule.exceeded(mantissa)).clamp(LOWEST, highest)
    return torch.where(magnitude > 0, found, LOWEST)


def power_of_two(exponent: Tensor) -> Tensor:
    """``2^E`` as float32, exact, for int32 exponents -127..127."""
    bits = (exponent - LOWEST) << 23
    return torch.where(exponent == LOWEST, 1 << 22, bits).to(torch.int32).view(torch.float32)


def to_bytes(exponent: Tensor) -> Tensor:
    """Exponents -127..127 as they are stored: uint8, 127 more."""
    return (exponent - LOWEST).to(torch.uint8)


def from_bytes(stored: Tensor) -> Tensor:
    """``2^E`` of stored exponents, float32; NaN for 255, which E8M0 has for it."""
    exponent = stored.to(torch.int32) + LOWEST
    return torch.where(stored == 255, torch.nan, power_of_two(exponent.clamp(max=-LOWEST)))


def by_blocks(x: Tensor, size: int = BLOCK) -> Tensor:
    """``(..., columns)`` seen as ``(..., blocks, size)``; zeros fill up a last block that is not whole."""
    if missing := -x.shape[-1] % size:
        x = functional.pad(x, (0, missing))
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def from_blocks(blocks: Tensor, columns: int) -> Tensor:
    """The ``(..., columns)`` that :func:`by_blocks` was given."""
    return blocks.flatten(-2)[..., :columns]


def magnitudes(blocks: Tensor) -> Tensor:
    """The largest absolute value of every block ``(..., blocks, size)`` as ``(..., blocks, 1)``; NaN if it has one."""
    return blocks.abs().amax(-1, keepdim=True)


def mx_values(elements: Tensor, exponents: Tensor) -> Tensor:
    """The float32 values of elements ``(..., columns)`` with stored exponents ``(..., blocks)``."""
    decode = e2m1_values if elements.dtype == torch.uint8 else e4m3_values
    scale = from_bytes(exponents).unsqueeze(-1)
    return from_blocks(by_blocks(decode(elements)).mul_(scale), elements.shape[-1])


def mx_dequantized(elements: Tensor, exponents: Tensor, outer: Tensor | None = None) -> Tensor:
    """:func:`mx_values` of a weight ``(out, in)``, times the outer scales ``(out, outer blocks, 1)`` if it has them."""
    values = mx_values(elements, exponents)
    if outer is None or not values.numel():
        return values
    return from_blocks(by_blocks(values, values.shape[-1] // outer.shape[-2]) * outer, values.shape[-1])


def mxfp8_activations(x: Tensor) -> Tensor:
    """Activations ``(..., channels)`` as MXFP8 makes them at run time, dequantized to float32.

    As ``npu_dynamic_mx_quant`` computes them: ``E = floor(log2 m) - 8``, elements rounded half to even, saturating.
    """
    return _fake_quantize(x.float(), MXFP8_FLOOR, MXFP8.highest, MXFP8.round)


def mxfp4_activations(x: Tensor) -> Tensor:
    """Activations ``(..., channels)`` as MXFP4 makes them at run time, dequantized to float32.

    As vLLM-Ascend calls ``npu_dynamic_mx_quant``: ``E = floor(log2 m) - 2``, elements rounded half away from zero,
    saturating. So a largest value whose mantissa exceeds 1.5 is cut to 6; weights have other rules.
    """
    return _fake_quantize(x.float(), MXFP4_FLOOR, MXFP4.highest, MXFP4.round)


def dual_scale_activations(x: Tensor, outer_block: int) -> tuple[Tensor, Tensor]:
    """Activations ``(..., channels)`` as dual-scale MXFP4 makes them at run time.

    As ``npu_dynamic_dual_level_mx_quant`` computes them: divided by an outer scale ``m / 6`` per ``outer_block``
    channels and brought back to their dtype, then MXFP4 with ``E = floor(log2 m) - 2``, elements rounded half to even.

    Args:
        outer_block: a multiple of 32 that divides the channels.

    Returns:
        The dequantized inner values ``(..., channels)`` and the outer scales ``(..., channels / outer_block)``, both
        float32.
    """
    outer = dual_scales(x.float(), outer_block)
    inner = (by_blocks(x.float(), outer_block) / outer).to(x.dtype).float().flatten(-2)
    values = _fake_quantize(inner, MXFP4_FLOOR, MXFP4.highest, lambda y: round_to_e2m1(y, ties_to_even=True))
    return values, outer.squeeze(-1)


def dual_scales(x: Tensor, outer_block: int) -> Tensor:
    """The outer scales of float32 values ``(..., columns)``: ``m / 6`` per block, ``(..., blocks, 1)``.

    A block of zeros has the smallest normal number.
    """
    return (magnitudes(by_blocks(x, outer_block)) / E2M1_MAX).clamp(min=SMALLEST_SCALE)


def _fake_quantize(x: Tensor, rule: ExponentRule, highest: int, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    blocks = by_blocks(x)
    largest = magnitudes(blocks)
    exponent = exponents_of(largest, rule, highest)
    elements = rounded(blocks * power_of_two(-exponent))
    # What is not finite must not come out as a number.
    scale = torch.where(torch.isfinite(largest), power_of_two(exponent), torch.nan)
    return from_blocks(elements.mul_(scale), x.shape[-1])
