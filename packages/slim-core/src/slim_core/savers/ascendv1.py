"""``ascendv1_saver``: the format of ``quant_model_description.json`` that vLLM-Ascend and MindIE load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from slim_core.checkpoint.writer import lay_out
from slim_core.errors import UnsupportedError
from slim_core.model.attention import AttentionInfo
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import LinearInfo
from slim_core.processors.base import Assignment, AttentionAssignment, Extras
from slim_core.quantization.attention import QuantizedAttention
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.quantization.layers import QuantizedLinear
from slim_core.recipe import SaverConfig
from slim_core.rotation.inputs import UNDESCRIBED
from slim_core.savers.ascendv1_attention import attention_keys, attention_parts
from slim_core.savers.ascendv1_layout import BLOCK, check_layout, layout
from slim_core.savers.base import Output, Saver
from slim_core.savers.layer_parts import layer_parts
from slim_core.savers.loaders import ASCENDV1, MAIN_ENGINES
from slim_core.savers.planned import Labelled, linear_tensors, plan_tensors, quantized_attentions, weight_index
from slim_core.savers.side_files import copy_side_files, merge_keys, write_json, write_tensors

__all__ = ["DESCRIPTION_FILE", "INDEX_FILE", "STEM", "AscendV1Saver", "AscendV1SaverConfig"]

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


class AscendV1Saver(Saver):
    """Lays out, writes and describes an ascendv1 folder."""

    Config = AscendV1SaverConfig
    engine = MAIN_ENGINES[ASCENDV1]
    holds_attentions = True
    config: AscendV1SaverConfig
    _deq_dtype = torch.int64  # until the model is known

    @property
    def labels(self) -> Mapping[str, str]:
        return {LayerKind.WFP8AFP8_DYNAMIC: self.config.fp8_label}

    def declare(
        self,
        model: StreamedModel,
        assignments: Mapping[str, Assignment],
        attentions: Mapping[str, AttentionAssignment] = MappingProxyType({}),
    ) -> Output:
        """As in the base class.

        Raises:
            UnsupportedError: a linear has odd sizes, or an attention becomes something that the format has no name for.
        """
        self._deq_dtype = deq_scale_dtype(model.dtype)
        quantized = quantized_attentions(model, attentions)
        for info, form in quantized.items():
            if any(state.dtype == "mxfp8" for _, state in form.states()):
                raise UnsupportedError(
                    "the ascendv1 format has no name for attention in mxfp8",
                    where=info.name,
                    remedy="use mxfp4 per_block or fp8_e4m3 per_token",
                )
        tensors = plan_tensors(model, assignments, attentions, self._linear)
        shards = lay_out([tensor.meta for tensor in tensors], STEM, self.config.part_file_size * _GIB)
        group_size = _group_size(assignment.form for assignment in assignments.values())
        keys = attention_keys(quantized)
        return Output(tuple(tensors), tuple(shards), group_size, keys)

    def _linear(self, info: LinearInfo, form: LayerForm, stored: torch.dtype) -> Iterable[Labelled]:
        check_layout(form, info)
        parts = layout(form, info.prefix, info.out_features, info.in_features)
        if "deq_scale" in parts:
            parts["deq_scale"] = replace(parts["deq_scale"], dtype=self._deq_dtype)
        return linear_tensors(info, form.kind, parts, stored, self.labels.get(form.kind, str(form.kind)))

    def parameters(self, info: LinearInfo, layer: QuantizedLinear) -> Mapping[str, Tensor]:
        parts = layer_parts(info.prefix, layer, self._deq_dtype)
        return {f"{info.prefix}.{suffix}": tensor for suffix, tensor in parts.items()}

    def attention_parameters(self, info: AttentionInfo, quantized: QuantizedAttention) -> Mapping[str, Tensor]:
        return attention_parts(info, quantized)

    def complete(self, folder: Path, model: StreamedModel, output: Output, extras: Sequence[Extras] = ()) -> None:
        if self.config.part_file_size:
            write_json(folder / INDEX_FILE, weight_index(output, extras), indent=2)
        description = describe(output)
        for extra in extras:
            merge_keys(description, extra.description)
            for path, tensors in extra.files.items():
                write_tensors(folder / path, tensors)
        write_json(folder / DESCRIPTION_FILE, description, indent=4)
        copy_side_files(model.folder, folder, model.config)


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


def _group_size(forms: Iterable[LayerForm]) -> int:
    """What the description says of all layers together: the columns of a group, 0 if no layer has groups."""
    sizes = [BLOCK if form.kind.is_microscaling else form.group_size for form in forms]
    return next(filter(None, sizes), 0)
