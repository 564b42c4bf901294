"""``linear_quant``: quantize linears, one at a time."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from slim_core.errors import UnsupportedError
from slim_core.logging import get_logger
from slim_core.processors.base import LinearRule, LinearWork, Processor, UnitWork
from slim_core.quantization.affine import affine_parameters
from slim_core.quantization.kinds import LayerKind, layer_kind
from slim_core.quantization.layers import W8A16, QuantizedLinear, W8A8Dynamic, W8A8Static
from slim_core.quantization.minmax import QuantizedWeight, minmax_per_channel
from slim_core.quantization.statistics import TensorRange
from slim_core.recipe import Exclude, Include, LinearQConfig, NameFilter, ProcessorConfig

__all__ = ["LinearQuant", "LinearQuantConfig"]

_logger = get_logger(__name__)


class LinearQuantConfig(ProcessorConfig):
    """Quantize the linears that ``include`` names and ``exclude`` does not."""

    type: Literal["linear_quant"] = "linear_quant"
    qconfig: LinearQConfig = Field(description="How activations and weights are quantized")
    include: Include = Field(default=("*",), description="Patterns of linears to quantize; empty means all")
    exclude: Exclude = Field(default=(), description="Patterns of linears to leave alone; wins over include")

    @model_validator(mode="after")
    def _legal(self) -> LinearQuantConfig:
        try:
            layer_kind(self.qconfig)
        except UnsupportedError as error:
            text = f"{error.what}; {error.remedy}"
            raise PydanticCustomError("illegal_pair", "{text}", {"text": text}) from error
        return self


class LinearQuant(Processor):
    """Weights by the method of the recipe, activations from the observed range or at run time."""

    Config = LinearQuantConfig
    config: LinearQuantConfig

    def rules(self) -> list[LinearRule]:
        names = NameFilter(self.config.include, self.config.exclude)
        return [LinearRule(self.position, names, layer_kind(self.config.qconfig))]

    def notes(self) -> list[str]:
        return [f"{self.position}: {text}" for text in self.config.qconfig.warnings()]

    def process(self, work: UnitWork) -> None:
        weight_config = self.config.qconfig.weight
        for linear in work.owned_by(self.position):
            weight = minmax_per_channel(
                linear.weight,
                bits=8,
                symmetric=bool(weight_config.symmetric),
                name=linear.weight.meta.name,
                device=work.device,
            )
            work.finish(linear, self._layer(linear, weight, work), weight.sqnr_db)

    def _layer(self, linear: LinearWork, weight: QuantizedWeight, work: UnitWork) -> QuantizedLinear:
        bias = linear.bias
        match linear.assignment.kind:
            case LayerKind.W8A8:
                scale, offset = self._input_parameters(linear.info.name, work.ranges[linear.info.name], work)
                layer = W8A8Static.build(weight.codes, weight.scale.flatten(), scale, offset, bias)
                _warn_of_lost_biases(linear.info.name, layer)
                return layer
            case LayerKind.W8A8_DYNAMIC:
                return W8A8Dynamic(weight.codes, weight.scale, bias)
            case _:
                return W8A16(weight.codes, weight.scale, weight.offset, bias)

    def _input_parameters(self, name: str, seen: TensorRange, work: UnitWork) -> tuple[Tensor, Tensor]:
        """Scale and offset of the input. The scale is one the engine's dtype can hold, because it is stored in it."""
        act = self.config.qconfig.act
        assert act is not None
        low, high = seen.bounds(act.ext.get("aggregation_type", "max"), name)
        scale, offset = affine_parameters(low, high, bits=8, symmetric=bool(act.symmetric))
        if work.dtype is not None:
            scale = scale.to(work.dtype).float()
        if not act.symmetric:
            offset = (torch.round(-low.clamp(max=0.0) / scale) - 128).clamp(-128, 127)
        return scale, offset


def _warn_of_lost_biases(name: str, layer: W8A8Static) -> None:
    """Say so where ``quant_bias`` ran into the ends of int32, as a bias does next to an input range of nothing."""
    limit = torch.iinfo(torch.int32)
    lost = int(((layer.quant_bias == limit.max) | (layer.quant_bias == limit.min)).sum())
    if lost:
        _logger.warning(
            "%s: the bias of %d channels does not fit into quant_bias, because the observed inputs are next to zero; "
            "exclude this linear or quantize it per_token",
            name,
            lost,
        )
