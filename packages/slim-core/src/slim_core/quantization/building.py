"""From a quantized weight and what is known of the input to a quantized linear of the form that was planned."""

from __future__ import annotations

import torch
from torch import Tensor

from slim_core.errors import UnexpectedError, UnsupportedError
from slim_core.logging import get_logger
from slim_core.model.units import LinearInfo
from slim_core.quantization.activations import static_parameters
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.quantization.layers import (
    DynamicInt,
    Fp8Dynamic,
    MixedInt8,
    MxDynamic,
    QuantizedLinear,
    StaticInt8,
    WeightOnlyInt,
)
from slim_core.quantization.methods.ssz import SszOptions
from slim_core.quantization.microscaling import BLOCK
from slim_core.quantization.statistics import InputStatistics, Need
from slim_core.quantization.weights import MxWeight, QuantizedWeight
from slim_core.recipe.qconfig import ActConfig, LinearQConfig

__all__ = ["build_layer", "check_shape", "needs_of"]

_logger = get_logger(__name__)


def needs_of(config: LinearQConfig) -> frozenset[Need]:
    """What must be known of the inputs to carry out a ``qconfig`` block."""
    needs: set[Need] = set()
    if config.act is not None and config.act.scope in ("per_tensor", "pd_mix"):
        mean = config.act.ext.get("aggregation_type") == "mean"
        needs.add(Need.HISTOGRAM if config.act.method == "histogram" else Need.SAMPLE_RANGES if mean else Need.RANGE)
    if config.weight.method == "gptq":
        needs.add(Need.HESSIAN)
    if config.weight.method == "ssz" and SszOptions.of(config.weight.ext).weighted:
        needs.add(Need.CHANNELS)
    return frozenset(needs)


def check_shape(form: LayerForm, info: LinearInfo) -> None:
    """Refuse a linear whose shape the form cannot take.

    Raises:
        UnsupportedError: a group size that does not divide the width.
    """
    size = form.group_size or form.outer_block
    if size and info.in_features % size:
        width = info.in_features
        key = "group_size" if form.group_size else "dual_block_size"
        if form.group_size:
            fitting = f"use a divisor of {width}, or "
        else:
            fitting = "" if width % BLOCK else f"use a multiple of {BLOCK} that divides {width}, or "
        raise UnsupportedError(
            f"ext.{key} {size} does not divide its {width} input features",
            where=info.name,
            remedy=f"{fitting}exclude this linear",
        )


def build_layer(
    form: LayerForm,
    weight: QuantizedWeight | MxWeight,
    act: ActConfig | None,
    *,
    seen: InputStatistics,
    bias: Tensor | None,
    name: str,
    dtype: torch.dtype | None,
) -> QuantizedLinear:
    """The quantized linear.

    Args:
        act: how its input is quantized; None if it is not.
        seen: what was observed of the input.
        name: the linear, for errors and warnings.
        dtype: the engine's dtype.

    Raises:
        SpecError: a static input was never observed.
        InvalidModelError: NaN or infinity was observed.
    """
    if isinstance(weight, MxWeight):
        return MxDynamic(form.kind, weight.elements, weight.exponents, bias, weight.outer)
    match form.kind:
        case LayerKind.W8A8 | LayerKind.W8A8S | LayerKind.W8A8_MIX:
            assert act is not None
            scale, offset = static_parameters(act, seen, name, dtype)
            kind = LayerKind.W8A8S if form.kind is LayerKind.W8A8S else LayerKind.W8A8
            static = StaticInt8.build(weight.codes, weight.scale.flatten(), scale, offset, bias, kind)
            _warn_of_lost_biases(name, static)
            return MixedInt8(static, weight.scale) if form.kind is LayerKind.W8A8_MIX else static
        case LayerKind.W8A16 | LayerKind.W4A16:
            return WeightOnlyInt(weight.codes, weight.scale, weight.offset, bias, form.kind.weight_bits)
        case LayerKind.W4A8_DYNAMIC if form.group_size:
            return DynamicInt.two_level(weight.codes, weight.scale, bias)
        case LayerKind.W8A8_DYNAMIC | LayerKind.W4A8_DYNAMIC | LayerKind.W4A4_DYNAMIC:
            act_bits = 4 if form.kind is LayerKind.W4A4_DYNAMIC else 8
            return DynamicInt(
                weight.codes,
                weight.scale,
                weight.offset,
                bias,
                weight_bits=form.kind.weight_bits,
                act_bits=act_bits,
            )
        case LayerKind.WFP8AFP8_DYNAMIC:
            return Fp8Dynamic(weight.codes, weight.scale, bias)
        case _:
            raise UnexpectedError(f"no layer is built for {form.kind}", where=name)


def _warn_of_lost_biases(name: str, layer: StaticInt8) -> None:
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
