"""The tensors that a finished layer becomes, by suffix; the same in all formats that name them as ascendv1 does."""

from __future__ import annotations

import torch
from torch import Tensor

from slim_core.quantization.affine import by_groups, dequantize_groups
from slim_core.quantization.kinds import LayerKind
from slim_core.quantization.layers import (
    DynamicInt,
    Fp8Dynamic,
    MixedInt8,
    MxDynamic,
    QuantizedLinear,
    SparseFloat,
    StaticInt8,
    WeightOnlyInt,
)
from slim_core.quantization.row_blocks import rows_per_block
from slim_core.savers.ascendv1_layout import FLOAT_BIAS, row_parallel
from slim_core.savers.packing import pack_columns, pack_rows

__all__ = ["encode_deq_scale", "layer_parts"]


def encode_deq_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``deq_scale`` as stored: float32, or its bits widened to int64."""
    return scale if dtype == torch.float32 else scale.contiguous().view(torch.int32).to(torch.int64)


def layer_parts(prefix: str, layer: QuantizedLinear, deq_dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors of a layer, its bias last.

    Args:
        prefix: the layer's name, which decides about ``scale_bias``.
        deq_dtype: float32 or int64, see :func:`encode_deq_scale`.
    """
    parts = _parts(prefix, layer, deq_dtype)
    if layer.bias is not None:
        parts["bias"] = layer.bias.float() if layer.kind in FLOAT_BIAS else layer.bias
    return parts


def _parts(prefix: str, layer: QuantizedLinear, deq_dtype: torch.dtype) -> dict[str, Tensor]:
    match layer:
        case StaticInt8():
            return {
                "weight": layer.weight,
                "quant_bias": layer.quant_bias,
                "input_scale": layer.input_scale,
                "input_offset": layer.input_offset,
                "deq_scale": encode_deq_scale(layer.deq_scale, deq_dtype),
            }
        case MixedInt8():
            zeros = torch.zeros_like(layer.weight_scale)
            dynamic = {"weight_scale": layer.weight_scale, "weight_offset": zeros}
            return _parts(prefix, layer.static, deq_dtype) | dynamic
        case DynamicInt() if layer.kind is LayerKind.W4A8_DYNAMIC:
            return _w4a8_parts(prefix, layer)
        case DynamicInt() | WeightOnlyInt():
            codes = layer.weight
            if layer.kind is LayerKind.W4A16:
                codes = pack_rows(codes) if layer.weight_scale.shape[1] > 1 else pack_columns(codes)
            return {"weight": codes, "weight_scale": layer.weight_scale, "weight_offset": layer.weight_offset}
        case SparseFloat():
            return {"weight": layer.weight}
        case Fp8Dynamic():
            zeros = torch.zeros_like(layer.weight_scale)
            return {"weight": layer.weight, "weight_scale": layer.weight_scale, "weight_offset": zeros}
        case MxDynamic():
            codes = pack_columns(layer.weight) if layer.weight.dtype == torch.uint8 else layer.weight
            outer = {} if layer.outer is None else {"weight_dual_scale": layer.outer}
            return {"weight": codes, "weight_scale": layer.exponents} | outer
        case _:
            raise TypeError(f"the format cannot hold {type(layer).__name__}")


def _w4a8_parts(prefix: str, layer: DynamicInt) -> dict[str, Tensor]:
    """Packed codes, scales of one or two levels, and the correction that the kernel adds.

    The kernel splits an int8 activation into two halves and centres the low one at 8, so ``scale_bias`` is
    ``8 * sum_i codes * scale``; in sixteen parts where the engine cuts the linear along its input.
    """
    parts = {"weight": pack_rows(layer.weight), "weight_scale": layer.weight_scale}
    parts["weight_offset"] = torch.zeros_like(layer.weight_scale)
    if layer.second_scale is not None:
        parts |= {"weight_scale_second": layer.second_scale, "weight_offset_second": layer.weight_offset}
    splits = 16 if row_parallel(prefix) else 1
    step = rows_per_block(layer.weight.shape[1], layer.weight.device)
    scale, offset = layer.scale, layer.weight_offset
    some = [slice(start, start + step) for start in range(0, len(scale), step)]
    sums = [by_groups(dequantize_groups(layer.weight[s], scale[s], offset[s]), splits).sum(2) for s in some]
    parts["scale_bias"] = 8 * torch.cat(sums)
    return parts
