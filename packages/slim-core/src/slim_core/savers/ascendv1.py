"""``ascendv1_saver``: the format of ``quant_model_description.json`` that vLLM-Ascend and MindIE load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from slim_core.checkpoint.source import TensorMeta
from slim_core.checkpoint.writer import lay_out
from slim_core.errors import InvalidModelError
from slim_core.model.units import LinearInfo, StreamedModel, Unit
from slim_core.processors.base import Assignment
from slim_core.quantization.kinds import LayerKind
from slim_core.quantization.layers import W8A16, QuantizedLinear, W8A8Dynamic, W8A8Static
from slim_core.recipe import SaverConfig
from slim_core.savers.base import Output, PlannedTensor, Saver
from slim_core.savers.side_files import copy_side_files, write_json

__all__ = ["DESCRIPTION_FILE", "INDEX_FILE", "STEM", "AscendV1Saver", "AscendV1SaverConfig", "encode_deq_scale"]

DESCRIPTION_FILE = "quant_model_description.json"
STEM = "quant_model_weights"
INDEX_FILE = f"{STEM}.safetensors.index.json"
_GIB = 1 << 30

# The type of the whole model is the highest of those present.
RANKING = (LayerKind.FLOAT, LayerKind.W8A16, LayerKind.W8A8_DYNAMIC, LayerKind.W8A8)


class AscendV1SaverConfig(SaverConfig):
    """Write the ascendv1 format."""

    type: Literal["ascendv1_saver"] = "ascendv1_saver"
    part_file_size: int = Field(4, ge=0, description="Size limit of a weight file in GiB; 0 writes one file")


Shape = Callable[[LinearInfo], tuple[int, ...]]


def _matrix(info: LinearInfo) -> tuple[int, ...]:
    return info.out_features, info.in_features


def _column(info: LinearInfo) -> tuple[int, ...]:
    return info.out_features, 1


def _rows(info: LinearInfo) -> tuple[int, ...]:
    return (info.out_features,)


def _one(_info: LinearInfo) -> tuple[int, ...]:
    return (1,)


_WEIGHT_ONLY: dict[str, tuple[torch.dtype, Shape]] = {
    "weight": (torch.int8, _matrix),
    "weight_scale": (torch.float32, _column),
    "weight_offset": (torch.float32, _column),
}
# Suffix -> dtype and shape of the parameters of a linear; ``bias`` is added where the linear has one.
PARAMETERS: dict[LayerKind, dict[str, tuple[torch.dtype, Shape]]] = {
    LayerKind.W8A8: {
        "weight": (torch.int8, _matrix),
        "quant_bias": (torch.int32, _rows),
        "input_scale": (torch.float32, _one),
        "input_offset": (torch.float32, _one),
        "deq_scale": (torch.float32, _rows),
    },
    LayerKind.W8A8_DYNAMIC: _WEIGHT_ONLY,
    LayerKind.W8A16: _WEIGHT_ONLY,
}


def deq_scale_dtype(model_dtype: torch.dtype | None) -> torch.dtype:
    """float32 for bf16 models; int64 carrying the float32 bits for all others."""
    return torch.float32 if model_dtype == torch.bfloat16 else torch.int64


def encode_deq_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``deq_scale`` as stored: float32, or its bits widened to int64."""
    return scale if dtype == torch.float32 else scale.contiguous().view(torch.int32).to(torch.int64)


class AscendV1Saver(Saver):
    """Lays out, writes and describes an ascendv1 folder."""

    Config = AscendV1SaverConfig
    config: AscendV1SaverConfig

    def declare(self, model: StreamedModel, assignments: Mapping[str, Assignment]) -> Output:
        self._deq_dtype = deq_scale_dtype(model.dtype)
        tensors = [tensor for unit in model.units for tensor in self._unit(model, unit, assignments)]
        names: set[str] = set()
        for tensor in tensors:
            if tensor.meta.name in names:
                raise InvalidModelError(
                    f"the checkpoint holds {tensor.meta.name!r}, a name that a quantized linear needs",
                    where=str(model.folder),
                    remedy="exclude that linear, or start from a checkpoint that is not quantized",
                )
            names.add(tensor.meta.name)
        shards = lay_out([tensor.meta for tensor in tensors], STEM, self.config.part_file_size * _GIB)
        return Output(tuple(tensors), tuple(shards))

    def _unit(self, model: StreamedModel, unit: Unit, assignments: Mapping[str, Assignment]) -> list[PlannedTensor]:
        quantized = {info.prefix: info for info in unit.linears if info.name in assignments}
        replaced = {f"{prefix}.{part}" for prefix in quantized for part in ("weight", "bias")}
        planned: list[PlannedTensor] = []
        for name, origin in unit.tensors.items():
            prefix, _, part = name.rpartition(".")
            if name in replaced:
                if part == "weight":
                    info = quantized[prefix]
                    planned += self._linear(info, assignments[info.name].kind, unit.name)
                continue
            meta = model.source.meta(origin)
            planned.append(
                PlannedTensor(TensorMeta(name, meta.dtype, meta.shape), LayerKind.FLOAT, unit.name, origin=origin)
            )
        return planned

    def _linear(self, info: LinearInfo, kind: LayerKind, unit: str) -> list[PlannedTensor]:
        entries = {
            suffix: (self._deq_dtype if suffix == "deq_scale" else dtype, shape(info), str(kind))
            for suffix, (dtype, shape) in PARAMETERS[kind].items()
        }
        if info.has_bias:
            entries["bias"] = (torch.float32, _rows(info), str(LayerKind.FLOAT))
        return [
            PlannedTensor(TensorMeta(f"{info.prefix}.{suffix}", dtype, shape), label, unit, owner=info.name)
            for suffix, (dtype, shape, label) in entries.items()
        ]

    def parameters(self, info: LinearInfo, layer: QuantizedLinear) -> Mapping[str, Tensor]:
        match layer:
            case W8A8Static():
                parts = {
                    "weight": layer.weight,
                    "quant_bias": layer.quant_bias,
                    "input_scale": layer.input_scale,
                    "input_offset": layer.input_offset,
                    "deq_scale": encode_deq_scale(layer.deq_scale, self._deq_dtype),
                }
            case W8A8Dynamic():
                zeros = torch.zeros_like(layer.weight_scale)
                parts = {"weight": layer.weight, "weight_scale": layer.weight_scale, "weight_offset": zeros}
            case W8A16():
                parts = {
                    "weight": layer.weight,
                    "weight_scale": layer.weight_scale,
                    "weight_offset": layer.weight_offset,
                }
            case _:
                raise TypeError(f"ascendv1 cannot hold {type(layer).__name__}")
        if layer.bias is not None:
            parts["bias"] = layer.bias.float()
        return {f"{info.prefix}.{suffix}": tensor for suffix, tensor in parts.items()}

    def complete(self, folder: Path, model: StreamedModel, output: Output) -> None:
        if self.config.part_file_size:
            write_json(folder / INDEX_FILE, _index(output), indent=2)
        write_json(folder / DESCRIPTION_FILE, describe(output), indent=4)
        copy_side_files(model.folder, folder)


def _index(output: Output) -> dict[str, Any]:
    files = {meta.name: shard.file_name for shard in output.shards for meta in shard.tensors}
    return {
        "metadata": {"total_size": sum(tensor.meta.nbytes for tensor in output.tensors)},
        "weight_map": {tensor.meta.name: files[tensor.meta.name] for tensor in output.tensors},
    }


def describe(output: Output) -> dict[str, Any]:
    """The content of ``quant_model_description.json``: a type for every tensor, then the global keys."""
    types = {tensor.meta.name: str(tensor.kind) for tensor in output.tensors}
    present = set(types.values())
    ranked = [str(kind) for kind in RANKING if str(kind) in present]
    return {
        **types,
        "version": "1.0.0",
        "model_quant_type": ranked[-1] if ranked else "Unknown",
        "metadata": {},
        "group_size": 0,
        "optional": {},
    }
