"""``linear_quant``: quantize linears, one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from slim_core.errors import UnsupportedError
from slim_core.model.units import LinearInfo
from slim_core.processors.base import Assignment, LinearRule, Processor, UnitWork
from slim_core.quantization.building import build_layer, check_shape, needs_of
from slim_core.quantization.kinds import layer_form
from slim_core.quantization.methods import quantize_weight
from slim_core.quantization.methods.gptq import gptq_bytes
from slim_core.recipe import Exclude, Include, LinearQConfig, NameFilter, Phase, ProcessorConfig

__all__ = ["LinearQuant", "LinearQuantConfig"]


class LinearQuantConfig(ProcessorConfig):
    """Quantize the linears that ``include`` names and ``exclude`` does not."""

    phase = Phase.QUANTIZATION

    type: Literal["linear_quant"] = "linear_quant"
    qconfig: LinearQConfig = Field(description="How activations and weights are quantized")
    include: Include = Field(default=("*",), description="Patterns of linears to quantize; empty means all")
    exclude: Exclude = Field(default=(), description="Patterns of linears to leave alone; wins over include")

    @model_validator(mode="after")
    def _legal(self) -> LinearQuantConfig:
        try:
            layer_form(self.qconfig)
        except UnsupportedError as error:
            text = f"{error.what}; {error.remedy}"
            raise PydanticCustomError("illegal_pair", "{text}", {"text": text}) from error
        return self


class LinearQuant(Processor):
    """Weights by the method of the recipe, activations from what was observed or at run time."""

    Config = LinearQuantConfig
    config: LinearQuantConfig

    def rules(self) -> list[LinearRule]:
        names = NameFilter(self.config.include, self.config.exclude)
        return [LinearRule(self.position, names, layer_form(self.config.qconfig), needs_of(self.config.qconfig))]

    def schemes(self) -> Mapping[str, LinearQConfig]:
        return {self.position: self.config.qconfig}

    def notes(self) -> list[str]:
        return [f"{self.position}: {text}" for text in self.config.qconfig.warnings()]

    def check(self, linears: Sequence[LinearInfo], assignments: Mapping[str, Assignment]) -> None:
        for info in self.own(linears, assignments):
            check_shape(assignments[info.name].form, info)

    def working_bytes(self, linears: Sequence[LinearInfo], assignments: Mapping[str, Assignment]) -> int:
        if self.config.qconfig.weight.method != "gptq":
            return 0
        own = self.own(linears, assignments)
        return max((gptq_bytes(info.out_features, info.in_features) for info in own), default=0)

    def process(self, work: UnitWork) -> None:
        for linear in work.owned_by(self.position):
            name, form, seen = linear.info.name, linear.assignment.form, work.seen(linear.info.name)
            weight = quantize_weight(
                linear.weight,
                self.config.qconfig.weight,
                form,
                tensor=linear.weight.meta.name,
                linear=name,
                device=work.device,
                seen=seen,
            )
            layer = build_layer(
                form, weight, self.config.qconfig.act, seen=seen, bias=linear.bias, name=name, dtype=work.dtype
            )
            work.finish(linear, layer, weight.sqnr_db)
