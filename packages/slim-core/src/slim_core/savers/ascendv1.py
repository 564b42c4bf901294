"""``ascendv1_saver``: the format of ``quant_model_description.json`` that vLLM-Ascend and MindIE load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from slim_core.checkpoint.source import TensorMeta
from slim_core.checkpoint.writer import lay_out
from slim_core.errors import InvalidModelError, UnsupportedError
from slim_core.model.attention import AttentionInfo
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import LinearInfo, Unit
from slim_core.processors.base import Assignment, AttentionAssignment, Extras
from slim_core.quantization.affine import by_groups
from slim_core.quantization.attention import AttentionForm, QuantizedAttention
from slim_core.quantization.kinds import LayerForm, LayerKind
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
from slim_core.recipe import SaverConfig
from slim_core.rotation.inputs import UNDESCRIBED
from slim_core.savers.ascendv1_attention import attention_keys, attention_layout, attention_parts
from slim_core.savers.ascendv1_layout import BLOCK, FLOAT_BIAS, layout, row_parallel
from slim_core.savers.base import Output, PlannedTensor, Saver
from slim_core.savers.packing import pack_columns, pack_rows
from slim_core.savers.side_files import copy_side_files, merge_keys, write_json, write_tensors

__all__ = ["DESCRIPTION_FILE", "INDEX_FILE", "STEM", "AscendV1Saver", "AscendV1SaverConfig", "encode_deq_scale"]

DESCRIPTION_FILE = "quant_model_description.json"
STEM = "quant_model_weights"
INDEX_FILE = f"{STEM}.safetensors.index.json"
_GIB = 1 << 30

# The type of the whole model is the highest of those present. W4A8_DYNAMIC never outranks a type of the other layers.
RANKING = (
    *(LayerKind.FLOAT, LayerKind.W4A8_DYNAMIC, LayerKind.W16A16S, LayerKind.W4A16, LayerKind.W8A16),
    *(LayerKind.W8A8_DYNAMIC, LayerKind.W8A8_MIX, LayerKind.W8A8, LayerKind.W8A8S, LayerKind.WFP8AFP8_DYNAMIC),
    *(LayerKind.W8A8_MXFP8, LayerKind.W4A8_MXFP, LayerKind.W4A4_DYNAMIC, LayerKind.W4A4_MXFP4),
    LayerKind.W4A4_MXFP4_DUALSCALE,
)
FP8_ENGINE_LABEL = "W8A8FP8_DYNAMIC"


class AscendV1SaverConfig(SaverConfig):
    """Write the ascendv1 format."""

    type: Literal["ascendv1_saver"] = "ascendv1_saver"
    part_file_size: int = Field(4, ge=0, description="Size limit of a weight file in GiB; 0 writes one file")
    fp8_label: Literal["WFP8AFP8_DYNAMIC", "W8A8FP8_DYNAMIC"] = Field(
        "WFP8AFP8_DYNAMIC", description="What FP8 layers are called; vLLM-Ascend knows them as W8A8FP8_DYNAMIC"
    )


def deq_scale_dtype(model_dtype: torch.dtype | None) -> torch.dtype:
    """float32 for bf16 models; int64 carrying the float32 bits for all others."""
    return torch.float32 if model_dtype == torch.bfloat16 else torch.int64


def encode_deq_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``deq_scale`` as stored: float32, or its bits widened to int64."""
    return scale if dtype == torch.float32 else scale.contiguous().view(torch.int32).to(torch.int64)


class AscendV1Saver(Saver):
    """Lays out, writes and describes an ascendv1 folder."""

    Config = AscendV1SaverConfig
    holds_attentions = True
    config: AscendV1SaverConfig

    @property
    def labels(self) -> Mapping[str, str]:
        return {LayerKind.WFP8AFP8_DYNAMIC: self.config.fp8_label}

    def declare(
        self,
        model: StreamedModel,
        assignments: Mapping[str, Assignment],
        attentions: Mapping[str, AttentionAssignment] = MappingProxyType({}),
    ) -> Output:
        self._deq_dtype = deq_scale_dtype(model.dtype)
        tensors: list[PlannedTensor] = []
        forms: dict[AttentionInfo, AttentionForm] = {}
        for unit in model.units:
            tensors += self._unit(model, unit, assignments)
            for info in unit.attentions:
                if (assigned := attentions.get(info.name)) is not None:
                    forms[info] = assigned.form
                    tensors += _attention(info, assigned.form, unit.name)
        names: set[str] = set()
        for tensor in tensors:
            if tensor.meta.name in names:
                raise InvalidModelError(
                    f"the checkpoint holds {tensor.meta.name!r}, a name that a quantized layer needs",
                    where=str(model.folder),
                    remedy="exclude that layer, or start from a checkpoint that is not quantized",
                )
            names.add(tensor.meta.name)
        shards = lay_out([tensor.meta for tensor in tensors], STEM, self.config.part_file_size * _GIB)
        group_size = _group_size(assignment.form for assignment in assignments.values())
        return Output(tuple(tensors), tuple(shards), group_size, attention_keys(forms))

    def _unit(self, model: StreamedModel, unit: Unit, assignments: Mapping[str, Assignment]) -> list[PlannedTensor]:
        quantized = {info.prefix: info for info in unit.linears if info.name in assignments}
        replaced = {f"{prefix}.{part}" for prefix in quantized for part in ("weight", "bias")}
        planned: list[PlannedTensor] = []
        for name, origin in unit.tensors.items():
            prefix, _, part = name.rpartition(".")
            if name in replaced:
                if part == "weight":
                    info = quantized[prefix]
                    planned += self._linear(model, info, assignments[info.name].form, unit.name)
                continue
            meta = model.source.meta(origin)
            planned.append(
                PlannedTensor(TensorMeta(name, meta.dtype, meta.shape), LayerKind.FLOAT, unit.name, origin=origin)
            )
        planned += [
            PlannedTensor(meta, LayerKind.FLOAT, unit.name, added=parameter)
            for parameter, meta in unit.added.items()
            if meta.name not in replaced
        ]
        return planned

    def _linear(self, model: StreamedModel, info: LinearInfo, form: LayerForm, unit: str) -> list[PlannedTensor]:
        check_layout(form, info)
        stored = model.source.meta(f"{info.prefix}.weight").dtype
        label = self.labels.get(form.kind, str(form.kind))
        planned: list[PlannedTensor] = []

        def add(suffix: str, dtype: torch.dtype, shape: tuple[int, ...], label: str) -> None:
            meta = TensorMeta(f"{info.prefix}.{suffix}", dtype, shape)
            planned.append(PlannedTensor(meta, label, unit, owner=info.name))

        for suffix, part in layout(form, info.prefix, info.out_features, info.in_features).items():
            add(suffix, self._deq_dtype if suffix == "deq_scale" else part.dtype or stored, part.shape, label)
        if info.has_bias:
            kept = form.kind not in FLOAT_BIAS
            add("bias", stored if kept else torch.float32, (info.out_features,), label if kept else LayerKind.FLOAT)
        return planned

    def parameters(self, info: LinearInfo, layer: QuantizedLinear) -> Mapping[str, Tensor]:
        parts = self._parts(info, layer)
        if layer.bias is not None:
            parts["bias"] = layer.bias.float() if layer.kind in FLOAT_BIAS else layer.bias
        return {f"{info.prefix}.{suffix}": tensor for suffix, tensor in parts.items()}

    def _parts(self, info: LinearInfo, layer: QuantizedLinear) -> dict[str, Tensor]:
        match layer:
            case StaticInt8():
                return {
                    "weight": layer.weight,
                    "quant_bias": layer.quant_bias,
                    "input_scale": layer.input_scale,
                    "input_offset": layer.input_offset,
                    "deq_scale": encode_deq_scale(layer.deq_scale, self._deq_dtype),
                }
            case MixedInt8():
                zeros = torch.zeros_like(layer.weight_scale)
                dynamic = {"weight_scale": layer.weight_scale, "weight_offset": zeros}
                return self._parts(info, layer.static) | dynamic
            case DynamicInt() if layer.kind is LayerKind.W4A8_DYNAMIC:
                return _w4a8_parts(info.prefix, layer)
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
                raise TypeError(f"ascendv1 cannot hold {type(layer).__name__}")

    def attention_parameters(self, info: AttentionInfo, quantized: QuantizedAttention) -> Mapping[str, Tensor]:
        return attention_parts(info, quantized)

    def complete(self, folder: Path, model: StreamedModel, output: Output, extras: Sequence[Extras] = ()) -> None:
        if self.config.part_file_size:
            write_json(folder / INDEX_FILE, _index(output, extras), indent=2)
        description = describe(output)
        for extra in extras:
            merge_keys(description, extra.description)
            for path, tensors in extra.files.items():
                write_tensors(folder / path, tensors)
        write_json(folder / DESCRIPTION_FILE, description, indent=4)
        copy_side_files(model.folder, folder, model.config)


def _attention(info: AttentionInfo, form: AttentionForm, unit: str) -> list[PlannedTensor]:
    return [
        PlannedTensor(TensorMeta(name, part.dtype or torch.float32, part.shape), str(form.kind), unit, owner=info.name)
        for name, part in attention_layout(info, form).items()
    ]


def _index(output: Output, extras: Sequence[Extras] = ()) -> dict[str, Any]:
    """The index of all weight files; further ones lie beside them in the folder, not below it."""
    files = {meta.name: shard.file_name for shard in output.shards for meta in shard.tensors}
    beside = {path: tensors for extra in extras for path, tensors in extra.files.items() if "/" not in path}
    size = sum(tensor.meta.nbytes for tensor in output.tensors)
    return {
        "metadata": {"total_size": size + sum(t.nbytes for tensors in beside.values() for t in tensors.values())},
        "weight_map": {tensor.meta.name: files[tensor.meta.name] for tensor in output.tensors}
        | {name: path for path, tensors in beside.items() for name in tensors},
    }


def describe(output: Output) -> dict[str, Any]:
    """The content of ``quant_model_description.json``: a type for every tensor, what is said of attentions, then the
    global keys."""
    described = (tensor for tensor in output.tensors if not tensor.meta.name.endswith(UNDESCRIBED))
    types = {tensor.meta.name: str(tensor.kind) for tensor in described}
    present = set(types.values())
    ranked = [str(kind) for kind in RANKING if str(kind) in present]
    return {
        **types,
        **output.keys,
        "version": "1.0.0",
        "model_quant_type": ranked[-1] if ranked else "Unknown",
        "metadata": {},
        "group_size": output.group_size,
        "optional": {},
    }


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
    parts["scale_bias"] = 8 * by_groups(layer.dequantized(), splits).sum(2)
    return parts


def _group_size(forms: Iterable[LayerForm]) -> int:
    """What the description says of all layers together: the columns of a group, 0 if no layer has groups."""
    sizes = [BLOCK if form.kind.is_microscaling else form.group_size for form in forms]
    return next(filter(None, sizes), 0)


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
