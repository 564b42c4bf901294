"""Linears with weights and activations in small floating-point formats: FP8 and the microscaling formats.

Products of such numbers fit a float32 exactly; they are summed in float32, as the target's matrix units do.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slim_core.quantization.affine import by_groups
from slim_core.quantization.floating import e4m3_values, quantize_e4m3_per_token
from slim_core.quantization.kinds import LayerKind
from slim_core.quantization.layers.base import restore
from slim_core.quantization.microscaling import (
    dual_scale_activations,
    mx_dequantized,
    mx_values,
    mxfp4_activations,
    mxfp8_activations,
)

__all__ = ["Fp8Dynamic", "MxDynamic"]


@dataclass(frozen=True, eq=False)
class Fp8Dynamic:
    """E4M3 weights with a scale per channel, E4M3 activations with a scale per token taken at run time.

    ``s_t = max_i |x[t, i]| / 448``; ``y = (e4m3(x / s_t) @ weight.T) * s_t * weight_scale + bias``

    Args:
        weight: float8_e4m3fn ``(out, in)``.
        weight_scale: float32 ``(out, 1)``.
        bias: ``(out,)`` or None.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None = None

    kind = LayerKind.WFP8AFP8_DYNAMIC

    def simulate(self, x: Tensor) -> Tensor:
        codes, token_scale = quantize_e4m3_per_token(x.reshape(-1, x.shape[-1]))
        y = e4m3_values(codes) @ e4m3_values(self.weight).T * token_scale * self.weight_scale.flatten()
        return restore(y if self.bias is None else y + self.bias.float(), x)

    def dequantized(self) -> Tensor:
        return e4m3_values(self.weight) * self.weight_scale


@dataclass(frozen=True, eq=False)
class MxDynamic:
    """Weights in a microscaling format, activations brought into one at run time.

    ``y = x' @ (weight * 2^(exponents - 127)).T + bias``, where ``x'`` are the activations as MXFP8 or MXFP4. With outer
    scales the product is taken per outer block, times the outer scales of both sides.

    Args:
        kind: W8A8_MXFP8 and W4A8_MXFP have MXFP8 activations, W4A4_MXFP4 and W4A4_MXFP4_DUALSCALE MXFP4 ones.
        weight: ``(out, in)``: float8_e4m3fn numbers, or uint8 codes 0..15 of E2M1 numbers.
        exponents: uint8 ``(out, ceil(in / 32))``.
        bias: ``(out,)`` or None.
        outer: float32 ``(out, outer blocks, 1)``, only for W4A4_MXFP4_DUALSCALE.
    """

    kind: LayerKind
    weight: Tensor
    exponents: Tensor
    bias: Tensor | None = None
    outer: Tensor | None = None

    def simulate(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self.outer is not None:
            y = self._dual_scale_product(rows, self.outer.squeeze(2))
        else:
            quantized = mxfp4_activations if self.kind is LayerKind.W4A4_MXFP4 else mxfp8_activations
            y = quantized(rows) @ mx_values(self.weight, self.exponents).T
        return restore(y if self.bias is None else y + self.bias.float(), x)

    def _dual_scale_product(self, rows: Tensor, outer: Tensor) -> Tensor:
        blocks = outer.shape[1]
        values, token_scale = dual_scale_activations(rows, rows.shape[1] // blocks)
        inputs, weights = by_groups(values, blocks), by_groups(mx_values(self.weight, self.exponents), blocks)
        y = rows.new_zeros(len(rows), len(outer)).float()
        for block in range(blocks):
            y += inputs[:, block] @ weights[:, block].T * token_scale[:, block, None] * outer[:, block]
        return y

    def dequantized(self) -> Tensor:
        return mx_dequantized(self.weight, self.exponents, self.outer)
