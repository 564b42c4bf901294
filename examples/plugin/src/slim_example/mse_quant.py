"""``mse_quant``: W8A8 dynamic whose weight scales have the least squared error, not the full range."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from slim_core.processors.base import LinearRule, Processor, UnitWork
from slim_core.quantization.affine import EPSILON, dequantize, quantize
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.quantization.layers import DynamicInt
from slim_core.recipe import Exclude, Include, NameFilter, Phase, ProcessorConfig

__all__ = ["MseQuant", "MseQuantConfig", "best_scale"]


class MseQuantConfig(ProcessorConfig):
    """Quantize the linears that ``include`` names and ``exclude`` does not."""

    phase = Phase.QUANTIZATION

    type: Literal["mse_quant"] = "mse_quant"
    steps: int = Field(default=16, ge=1, le=100, description="Scales tried for each output channel")
    include: Include = Field(default=("*",), description="Patterns of linears to quantize; empty means all")
    exclude: Exclude = Field(default=(), description="Patterns of linears to leave alone; wins over include")


def best_scale(weight: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Scale ``(out, 1)`` and squared error ``(out, 1)`` of the best of ``steps`` clipping ranges of each row.

    The ranges run from the row's largest magnitude down to nine tenths of it.
    """
    full = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=EPSILON)
    scale, least = full, torch.full_like(full, float("inf"))
    for step in range(steps):
        tried = full * (1 - 0.1 * step / steps)
        codes = quantize(weight, tried, torch.zeros_like(tried), bits=8)
        error = (dequantize(codes, tried, torch.zeros_like(tried)) - weight).square().sum(1, keepdim=True)
        scale, least = torch.where(error < least, tried, scale), torch.minimum(error, least)
    return scale, least


class MseQuant(Processor):
    """Searches the weight scale of every row; activations get a scale per token at run time."""

    Config = MseQuantConfig
    config: MseQuantConfig

    def rules(self) -> list[LinearRule]:
        names = NameFilter(self.config.include, self.config.exclude)
        return [LinearRule(self.position, names, LayerForm(LayerKind.W8A8_DYNAMIC))]

    def process(self, work: UnitWork) -> None:
        for linear in work.owned_by(self.position):
            weight = linear.weight.load().to(work.device).float()
            scale, error = best_scale(weight, self.config.steps)
            codes = quantize(weight, scale, torch.zeros_like(scale), bits=8)
            decibels = float(10 * torch.log10(weight.square().sum() / error.sum()))
            layer = DynamicInt(codes.cpu(), scale.cpu(), torch.zeros_like(scale, device="cpu"), linear.bias)
            work.finish(linear, layer, decibels)
