"""Linears with integer weights, computed as integer hardware does: int32 sums, then float32 scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from slim_core.quantization.affine import dequantize, dequantize_groups, quantize, quantize_per_token
from slim_core.quantization.integer import int8_matmul
from slim_core.quantization.kinds import LayerKind
from slim_core.quantization.layers.base import restore
from slim_core.quantization.row_blocks import rows_per_block, scratch

__all__ = ["DynamicInt", "MixedInt8", "StaticInt8", "WeightOnlyInt"]


@dataclass(frozen=True, eq=False)
class StaticInt8:
    """int8 weights, int8 activations with one calibrated scale and offset: W8A8, and W8A8S if the weight is sparse.

    ``y = (clamp(round(x / input_scale + input_offset)) @ weight.T + quant_bias) * deq_scale``

    Args:
        weight: int8 ``(out, in)``.
        deq_scale: float32 ``(out,)``: input scale times weight scale.
        quant_bias: int32 ``(out,)``: ``round(bias / deq_scale - input_offset * sum_i weight)``.
        input_scale, input_offset: float32 ``(1,)``; the offset is integral.
        bias: the float bias, kept for the checkpoint; its effect is in ``quant_bias``.
    """

    weight: Tensor
    deq_scale: Tensor
    quant_bias: Tensor
    input_scale: Tensor
    input_offset: Tensor
    bias: Tensor | None = None
    kind: LayerKind = LayerKind.W8A8

    @classmethod
    def build(
        cls,
        weight: Tensor,
        weight_scale: Tensor,
        input_scale: Tensor,
        input_offset: Tensor,
        bias: Tensor | None,
        kind: LayerKind = LayerKind.W8A8,
    ) -> StaticInt8:
        """Derive the integer parameters from codes ``(out, in)``, their scales ``(out,)`` and the input's range."""
        deq_scale = input_scale * weight_scale
        folded = -input_offset.double() * _row_sums(weight)
        if bias is not None:
            folded = folded + bias.double() / deq_scale.double()
        limit = torch.iinfo(torch.int32)
        quant_bias = folded.round().clamp(limit.min, limit.max).to(torch.int32)
        return cls(weight, deq_scale, quant_bias, input_scale, input_offset, bias, kind)

    def simulate(self, x: Tensor) -> Tensor:
        codes = quantize(x.reshape(-1, x.shape[-1]), self.input_scale, self.input_offset, bits=8)
        return restore((int8_matmul(codes, self.weight) + self.quant_bias).float() * self.deq_scale, x)

    def dequantized(self) -> Tensor:
        scale = (self.deq_scale / self.input_scale).unsqueeze(1)
        return dequantize(self.weight, scale, torch.zeros_like(scale))


@dataclass(frozen=True, eq=False)
class DynamicInt:
    """Integer weights, integer activations with a scale per token taken at run time: W8A8, W4A8 and W4A4 dynamic.

    ``s_t = max_i |x[t, i]| / (2^(A-1) - 1)``; ``y = sum over groups of ((round(x / s_t) @ (weight - weight_offset).T) *
    s_t * scale) + bias``, where the scale of a group is ``weight_scale``, times ``second_scale`` if there is one.

    Args:
        weight: int8 ``(out, in)``, in -8..7 for four bits.
        weight_scale, weight_offset: float32 ``(out, groups)``.
        bias: ``(out,)`` or None.
        second_scale: float32 ``(out, groups)`` where scales have two levels; ``weight_scale`` is ``(out, 1)`` then.
        weight_bits, act_bits: 8 or 4.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_offset: Tensor
    bias: Tensor | None = None
    second_scale: Tensor | None = None
    weight_bits: int = 8
    act_bits: int = 8

    @property
    def kind(self) -> LayerKind:
        return LayerKind(f"W{self.weight_bits}A{self.act_bits}_DYNAMIC")

    @property
    def scale(self) -> Tensor:
        """The scale of every group, float32 ``(out, groups)``."""
        return self.weight_scale if self.second_scale is None else self.weight_scale * self.second_scale

    @classmethod
    def two_level(cls, weight: Tensor, scale: Tensor, bias: Tensor | None) -> DynamicInt:
        """W4A8 with scales ``(out, groups)`` split into an int8 scale per channel and what is left per group."""
        first = scale.amax(1, keepdim=True) * (7 / 127)
        return cls(weight, first, torch.zeros_like(scale), bias, scale / first, weight_bits=4)

    def simulate(self, x: Tensor) -> Tensor:
        codes, token_scale = quantize_per_token(x.reshape(-1, x.shape[-1]), self.act_bits)
        scale = self.scale
        width = self.weight.shape[1] // max(scale.shape[1], 1)
        y: Tensor | None = None
        for group in range(scale.shape[1]):
            columns = slice(group * width, (group + 1) * width)
            total = int8_matmul(codes[:, columns], self.weight[:, columns])
            offset = self.weight_offset[:, group]
            if bool(offset.any()):
                total = total - codes[:, columns].sum(1, keepdim=True, dtype=torch.int32) * offset.to(torch.int32)
            part = total.float() * token_scale * scale[:, group]
            y = part if y is None else y + part
        assert y is not None
        return restore(y if self.bias is None else y + self.bias.float(), x)

    def dequantized(self) -> Tensor:
        return dequantize_groups(self.weight, self.scale, self.weight_offset)


@dataclass(frozen=True, eq=False)
class MixedInt8:
    """W8A8_MIX: a scale per token while a prompt is read (prefill), one static scale while tokens are made (decode).

    Args:
        static: what decoding computes.
        weight_scale: float32 ``(out, 1)``, what the dynamic side scales with.
        phase: which of the two :meth:`simulate` computes.
    """

    static: StaticInt8
    weight_scale: Tensor
    phase: Literal["prefill", "decode"] = "prefill"

    kind = LayerKind.W8A8_MIX

    @property
    def weight(self) -> Tensor:
        return self.static.weight

    @property
    def bias(self) -> Tensor | None:
        return self.static.bias

    @property
    def dynamic(self) -> DynamicInt:
        """What prefill computes."""
        return DynamicInt(self.weight, self.weight_scale, torch.zeros_like(self.weight_scale), self.bias)

    def simulate(self, x: Tensor) -> Tensor:
        return (self.dynamic if self.phase == "prefill" else self.static).simulate(x)

    def dequantized(self) -> Tensor:
        return self.dynamic.dequantized()


@dataclass(frozen=True, eq=False)
class WeightOnlyInt:
    """Integer weights, float activations: ``y = x @ ((weight - weight_offset) * weight_scale).T + bias``.

    Args:
        weight: int8 ``(out, in)``, in -8..7 for four bits.
        weight_scale, weight_offset: float32 ``(out, groups)``.
        bias: ``(out,)`` or None.
        bits: 8 (W8A16) or 4 (W4A16).
    """

    weight: Tensor
    weight_scale: Tensor
    weight_offset: Tensor
    bias: Tensor | None = None
    bits: int = 8

    @property
    def kind(self) -> LayerKind:
        return LayerKind(f"W{self.bits}A16")

    def simulate(self, x: Tensor) -> Tensor:
        weight = self.dequantized().to(x.dtype)
        return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def dequantized(self) -> Tensor:
        return dequantize_groups(self.weight, self.weight_scale, self.weight_offset)


def _row_sums(codes: Tensor) -> Tensor:
    """The sums of the rows of int8 codes, float64 and exact, a few rows at a time: a sum widens its whole input."""
    step = min(rows_per_block(2 * codes.shape[1], codes.device), len(codes))
    sums = torch.empty(len(codes), dtype=torch.float64, device=codes.device)
    wide = scratch((step, codes.shape[1]), torch.float64, codes.device)
    for start in range(0, len(codes), max(step, 1)):
        part = codes[start : start + step]
        sums[start : start + step] = wide[: len(part)].copy_(part).sum(dim=1)
    return sums
