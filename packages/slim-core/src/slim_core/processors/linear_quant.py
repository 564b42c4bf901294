"""``linear_quant``: quantize linears, one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Literal

import torch
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from slim_core.errors import UnsupportedError
from slim_core.model.units import LinearInfo
from slim_core.processors.base import Assignment, LinearRule, LinearWork, Processor, UnitWork
from slim_core.quantization import row_blocks
from slim_core.quantization.building import build_layer, check_shape, needs_of
from slim_core.quantization.kinds import layer_form
from slim_core.quantization.methods import quantize_weight
from slim_core.quantization.methods.gptq import gptq_bytes
from slim_core.quantization.row_blocks import on_one_thread, rows_per_block
from slim_core.quantization.weights import MxWeight, QuantizedWeight
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
        form = layer_form(self.config.qconfig)
        return [LinearRule(self.position, names, form, needs_of(self.config.qconfig), form.dynamic)]

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
        method = self.config.qconfig.weight.method
        # Small ones, such as those of experts, would each keep a single thread busy.
        together = work.device.type == "cpu" and method != "gptq"
        for small, group in groupby(work.owned_by(self.position), lambda linear: together and _is_small(linear.info)):
            linears = list(group)
            if small and method == "minmax":  # so quick that handing them over one by one would take as long
                on_one_thread(partial(self._finish_all, linears, work))
            else:
                self._finish_all(linears, work, side_by_side=small)

    @torch.no_grad()
    def _finish_all(self, linears: Sequence[LinearWork], work: UnitWork, *, side_by_side: bool = False) -> None:
        jobs = (partial(self._quantized, linear, work) for linear in linears)
        made = row_blocks.side_by_side(jobs) if side_by_side else (job() for job in jobs)
        for linear, weight in zip(linears, made, strict=True):
            name, seen = linear.info.name, work.seen(linear.info.name)
            form, act = linear.assignment.form, self.config.qconfig.act
            layer = build_layer(form, weight, act, seen=seen, bias=linear.bias, name=name, dtype=work.dtype)
            work.finish(linear, layer, weight.sqnr_db)

    def _quantized(self, linear: LinearWork, work: UnitWork) -> QuantizedWeight | MxWeight:
        return quantize_weight(
            linear.weight,
            self.config.qconfig.weight,
            linear.assignment.form,
            tensor=linear.weight.meta.name,
            linear=linear.info.name,
            device=work.device,
            seen=work.seen(linear.info.name),
        )


def _is_small(info: LinearInfo) -> bool:
    """Whether the rows of a linear are worked on all at once."""
    return info.out_features <= rows_per_block(info.in_features, None)
