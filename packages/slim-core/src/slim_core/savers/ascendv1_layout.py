"""The tensors of every type of layer in the ascendv1 format: suffixes, dtypes and shapes. The saver writes by this
table, and what reads folders back checks against it.

``o`` output features, ``i`` input features, ``G`` groups of columns that share a scale (1 without groups).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from slim_core.errors import UnsupportedError
from slim_core.model.units import LinearInfo
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.quantization.microscaling import BLOCK

__all__ = ["BLOCK", "FLOAT_BIAS", "Part", "check_layout", "form_of", "layout", "row_parallel"]

_SPLITS = 16
_ROW_PARALLEL = ("down_proj", "o_proj", "w2")
_COLUMN_PARALLEL = ("up_proj", "gate_proj", "q_proj", "k_proj", "v_proj", "w1", "w3")
FLOAT_BIAS = frozenset(LayerKind) - {LayerKind.W16A16S}
"""Types whose bias is stored in float32 and called FLOAT; the others keep it as it is, under their own name."""


@dataclass(frozen=True)
class Part:
    """Dtype and shape of one tensor of a layer; dtype None is that of the model."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]


def row_parallel(prefix: str) -> bool:
    """Whether engines cut this linear along its input, so that its ``scale_bias`` comes in sixteen parts."""
    return not any(name in prefix for name in _COLUMN_PARALLEL) and any(name in prefix for name in _ROW_PARALLEL)


def layout(form: LayerForm, prefix: str, out: int, width: int) -> dict[str, Part]:
    """The tensors of a layer without its bias, by suffix.

    Args:
        prefix: the layer's name, which decides about ``scale_bias``.
        out, width: output and input features.
    """
    if form.kind in _FLOATING:
        return _floating(form, out, width)
    groups = width // form.group_size if form.group_size else 1
    codes = {"weight": Part(torch.int8, (out, width))}
    match form.kind:
        case LayerKind.W8A8 | LayerKind.W8A8S:
            return codes | _static(out)
        case LayerKind.W8A8_MIX:
            return codes | _static(out) | _scales(out, 1)
        case LayerKind.W4A16 if not form.group_size:
            return {"weight": Part(torch.int8, (out, width // 2))} | _scales(out, 1)
        case LayerKind.W4A16:
            return {"weight": Part(torch.int8, (out // 2, width))} | _scales(out, groups)
        case LayerKind.W4A8_DYNAMIC:
            second = _scales(out, groups, "_second") if form.group_size else {}
            bias = {"scale_bias": Part(torch.float32, (out, _SPLITS if row_parallel(prefix) else 1))}
            return {"weight": Part(torch.int8, (out // 2, width))} | _scales(out, 1) | second | bias
        case _:
            return codes | _scales(out, groups)


_FLOATING = frozenset(kind for kind in LayerKind if "FP" in kind) | {LayerKind.W16A16S}


def _static(out: int) -> dict[str, Part]:
    return {
        "quant_bias": Part(torch.int32, (out,)),
        "input_scale": Part(torch.float32, (1,)),
        "input_offset": Part(torch.float32, (1,)),
        "deq_scale": Part(torch.float32, (out,)),
    }


def _scales(out: int, groups: int, level: str = "") -> dict[str, Part]:
    part = Part(torch.float32, (out, groups))
    return {f"weight_scale{level}": part, f"weight_offset{level}": part}


def _floating(form: LayerForm, out: int, width: int) -> dict[str, Part]:
    exponents = {"weight_scale": Part(torch.uint8, (out, -(-width // BLOCK)))}
    pairs = {"weight": Part(torch.uint8, (out, width // 2))}
    match form.kind:
        case LayerKind.W16A16S:
            return {"weight": Part(None, (out, width))}
        case LayerKind.WFP8AFP8_DYNAMIC:
            return {"weight": Part(torch.float8_e4m3fn, (out, width))} | _scales(out, 1)
        case LayerKind.W8A8_MXFP8:
            return {"weight": Part(torch.float8_e4m3fn, (out, width))} | exponents
        case LayerKind.W4A4_MXFP4_DUALSCALE:
            outer = {"weight_dual_scale": Part(torch.float32, (out, -(-width // form.outer_block), 1))}
            return pairs | exponents | outer
        case _:
            return pairs | exponents


def form_of(kind: LayerKind, shapes: Mapping[str, tuple[int, ...]]) -> tuple[LayerForm, int, int] | None:
    """The form, output and input features of a stored layer, from the shapes of its tensors by suffix.

    None if the shapes do not say, because ``weight`` is missing or no matrix.
    """
    weight = shapes.get("weight", ())
    if len(weight) != 2:
        return None
    out, width = weight
    group_size = outer_block = 0
    scale = shapes.get("weight_scale_second" if kind is LayerKind.W4A8_DYNAMIC else "weight_scale", ())
    match kind:
        case LayerKind.W4A8_DYNAMIC:
            out *= 2
        case LayerKind.W4A16:
            packed_rows = len(scale) == 2 and scale[1] > 1
            out, width = (2 * out, width) if packed_rows else (out, 2 * width)
        case LayerKind.W4A8_MXFP | LayerKind.W4A4_MXFP4 | LayerKind.W4A4_MXFP4_DUALSCALE:
            width *= 2
        case _:
            pass
    grouped = kind in (LayerKind.W8A8_DYNAMIC, LayerKind.W8A16, LayerKind.W4A16, LayerKind.W4A4_DYNAMIC)
    if (grouped or kind is LayerKind.W4A8_DYNAMIC) and len(scale) == 2 and scale[1] > 1:
        group_size = width // scale[1]
    outer = shapes.get("weight_dual_scale", ())
    if kind is LayerKind.W4A4_MXFP4_DUALSCALE and len(outer) == 3 and outer[1]:
        outer_block = -(-width // outer[1])
        outer_block += -outer_block % BLOCK
    return LayerForm(kind, group_size, outer_block=outer_block), out, width


def check_layout(form: LayerForm, info: LinearInfo) -> None:
    """Refuse a linear whose tensors would not come out even.

    Raises:
        UnsupportedError: names the linear.
    """
    odd: str | None = None
    if form.kind is LayerKind.W4A8_DYNAMIC and row_parallel(info.prefix) and info.in_features % 16:
        odd = f"engines cut it into 16 parts along its {info.in_features} input features"
    elif info.out_features % 2 and _packs_rows(form):
        odd = f"rows are packed in pairs, but it has {info.out_features} output features"
    elif info.in_features % 2 and _packs_columns(form):
        odd = f"columns are packed in pairs, but it has {info.in_features} input features"
    if odd:
        raise UnsupportedError(f"cannot become {form.kind}: {odd}", where=info.name, remedy="exclude this linear")


def _packs_rows(form: LayerForm) -> bool:
    return form.kind is LayerKind.W4A8_DYNAMIC or (form.kind is LayerKind.W4A16 and form.group_size > 0)


def _packs_columns(form: LayerForm) -> bool:
    return (form.kind is LayerKind.W4A16 and not form.group_size) or form.kind.startswith(("W4A8_MX", "W4A4_MX"))
