"""Quantized linears as data with a meaning.

Each class is the immutable result of quantizing one linear. It computes what the target's integer arithmetic computes
(:meth:`simulate`), which serves calibration, evaluation and tests alike, and a saver can write its fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from slim_core.quantization.affine import dequantize, quantize, quantize_per_token
from slim_core.quantization.integer import int8_matmul
from slim_core.quantization.kinds import LayerKind

__all__ = ["W8A16", "QuantizedLinear", "SimulatedLinear", "W8A8Dynamic", "W8A8Static"]


class QuantizedLinear(Protocol):
    """What every quantized linear offers. ``weight`` holds int8 codes ``(out, in)``, ``bias`` is ``(out,)`` or None."""

    @property
    def kind(self) -> LayerKind: ...

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...

    def simulate(self, x: Tensor) -> Tensor:
        """The output for activations ``(..., in)``, in their dtype."""
        ...

    def dequantized(self) -> Tensor:
        """The weight that the codes stand for, float32 ``(out, in)``."""
        ...


def _restore(y: Tensor, like: Tensor) -> Tensor:
    return y.to(like.dtype).view(*like.shape[:-1], y.shape[-1])


@dataclass(frozen=True, eq=False)
class W8A8Static:
    """int8 weights, int8 activations with one calibrated scale and offset.

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

    kind = LayerKind.W8A8

    @classmethod
    def build(
        cls, weight: Tensor, weight_scale: Tensor, input_scale: Tensor, input_offset: Tensor, bias: Tensor | None
    ) -> W8A8Static:
        """Derive the integer parameters from codes ``(out, in)``, their scales ``(out,)`` and the input's range."""
        deq_scale = input_scale * weight_scale
        row_sum = _row_sums(weight).double()
        folded = -input_offset.double() * row_sum
        if bias is not None:
            folded = folded + bias.double() / deq_scale.double()
        limit = torch.iinfo(torch.int32)
        quant_bias = folded.round().clamp(limit.min, limit.max).to(torch.int32)
        return cls(weight, deq_scale, quant_bias, input_scale, input_offset, bias)

    def simulate(self, x: Tensor) -> Tensor:
        codes = quantize(x.reshape(-1, x.shape[-1]), self.input_scale, self.input_offset, bits=8)
        return _restore((int8_matmul(codes, self.weight) + self.quant_bias).float() * self.deq_scale, x)

    def dequantized(self) -> Tensor:
        scale = (self.deq_scale / self.input_scale).unsqueeze(1)
        return dequantize(self.weight, scale, torch.zeros_like(scale))


@dataclass(frozen=True, eq=False)
class W8A8Dynamic:
    """int8 weights, int8 activations with a scale per token taken at run time.

    ``s_t = max_i |x[t, i]| / 127``; ``y = (round(x / s_t) @ weight.T) * s_t * weight_scale + bias``

    Args:
        weight: int8 ``(out, in)``.
        weight_scale: float32 ``(out, 1)``.
        bias: ``(out,)`` or None.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None = None

    kind = LayerKind.W8A8_DYNAMIC

    def simulate(self, x: Tensor) -> Tensor:
        codes, scale = quantize_per_token(x.reshape(-1, x.shape[-1]), bits=8)
        y = int8_matmul(codes, self.weight).float() * scale * self.weight_scale.T
        return _restore(y if self.bias is None else y + self.bias.float(), x)

    def dequantized(self) -> Tensor:
        return dequantize(self.weight, self.weight_scale, torch.zeros_like(self.weight_scale))


@dataclass(frozen=True, eq=False)
class W8A16:
    """int8 weights, float activations: ``y = x @ ((weight - weight_offset) * weight_scale).T + bias``.

    Args:
        weight: int8 ``(out, in)``.
        weight_scale, weight_offset: float32 ``(out, 1)``.
        bias: ``(out,)`` or None.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_offset: Tensor
    bias: Tensor | None = None

    kind = LayerKind.W8A16

    def simulate(self, x: Tensor) -> Tensor:
        weight = self.dequantized().to(x.dtype)
        return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def dequantized(self) -> Tensor:
        return dequantize(self.weight, self.weight_scale, self.weight_offset)


def _row_sums(codes: Tensor) -> Tensor:
    """int64 sums over the rows of int8 codes, a few rows at a time: the sum widens its whole input first."""
    step = max(1, (1 << 20) // max(codes.shape[1], 1))
    sums = torch.empty(codes.shape[0], dtype=torch.int64, device=codes.device)
    for start in range(0, codes.shape[0], step):
        sums[start : start + step] = codes[start : start + step].sum(dim=1, dtype=torch.int64)
    return sums


class SimulatedLinear(nn.Module):
    """A quantized linear in the place of the float one."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.simulate(x)
