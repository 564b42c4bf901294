"""``mindie_format_saver``: the format that MindIE-SD loads into the transformers of diffusion models.

MindIE-SD is given the description. The type of the model that it names decides which weight file, a single one, is read
beside it. Layers take the place of the ``torch.nn.Linear`` modules of the same name; tensors called FLOAT are not read
by it. Both files must not be links nor be open to others (mode 0640 at most).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from slim_core.checkpoint.writer import lay_out
from slim_core.errors import UnsupportedError
from slim_core.logging import get_logger
from slim_core.model.attention import AttentionInfo
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import LinearInfo
from slim_core.processors.base import Assignment, AttentionAssignment, Extras
from slim_core.quantization.attention import AttentionKind, QuantizedAttention
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.quantization.layers import MxDynamic, QuantizedLinear
from slim_core.recipe import SaverConfig
from slim_core.savers.ascendv1_attention import attention_keys, attention_parts
from slim_core.savers.ascendv1_layout import check_layout
from slim_core.savers.base import Output, PlannedTensor, Saver
from slim_core.savers.layer_parts import layer_parts
from slim_core.savers.loaders import MAIN_ENGINES, MINDIE
from slim_core.savers.mindie_layout import (
    FOUR_BITS,
    INDEX_FILE,
    KINDS,
    LARGEST_FILE,
    description_file,
    mindie_layout,
    model_type,
    tensor_name,
    values_of_codes,
    weight_stem,
)
from slim_core.savers.planned import Labelled, linear_tensors, plan_tensors, quantized_attentions, weight_index
from slim_core.savers.side_files import copy_side_files, write_json

__all__ = ["MindieSaver", "MindieSaverConfig"]

_GIB = 1 << 30
_READ_MODE = 0o640  # the widest that MindIE-SD accepts
_COPIED = (".json", ".py")
_ELSEWHERE = "use ascendv1_saver, which has a place for it, or leave it out"
_logger = get_logger(__name__)


class MindieSaverConfig(SaverConfig):
    """Write the MindIE-SD format."""

    type: Literal["mindie_format_saver"] = "mindie_format_saver"
    part_file_size: int = Field(
        0, ge=0, description="Size limit of a weight file in GiB; 0 writes one file, the only form that MindIE-SD loads"
    )
    mxfp4_weight: Literal["values", "packed"] = Field(
        "values",
        description="Weights of MXFP4 layers: values, one float8_e4m3fn each, which every MindIE-SD loads; or packed, "
        "half the size, two codes to a byte, which only newer ones load",
    )


class MindieSaver(Saver):
    """Lays out, writes and describes a folder for MindIE-SD."""

    Config = MindieSaverConfig
    engine = MAIN_ENGINES[MINDIE]
    holds_attentions = True
    holds_query_rotations = True
    holds_extras = False
    holds_input_scales = True
    config: MindieSaverConfig

    @property
    def _packed(self) -> bool:
        return self.config.mxfp4_weight == "packed"

    def declare(
        self,
        model: StreamedModel,
        assignments: Mapping[str, Assignment],
        attentions: Mapping[str, AttentionAssignment] = MappingProxyType({}),
    ) -> Output:
        """As in the base class.

        Raises:
            UnsupportedError: a linear or an attention becomes something that the format has no place for.
        """
        quantized = quantized_attentions(model, attentions)
        for info, form in quantized.items():
            if form.kind is AttentionKind.C8:
                raise UnsupportedError(
                    "the MindIE-SD format has no place for a quantized cache (C8)", where=info.name, remedy=_ELSEWHERE
                )
        tensors = plan_tensors(model, assignments, attentions, self._linear)
        stem = weight_stem(_model_type(tensors), in_parts=self.config.part_file_size > 0)
        shards = lay_out([tensor.meta for tensor in tensors], stem, self.config.part_file_size * _GIB)
        return Output(tuple(tensors), tuple(shards), keys=attention_keys(quantized))

    def _linear(self, info: LinearInfo, form: LayerForm, stored: torch.dtype) -> Iterable[Labelled]:
        if form.kind not in KINDS or form.group_size:
            raise UnsupportedError(
                f"the MindIE-SD format has no place for {form} layers", where=info.prefix, remedy=_ELSEWHERE
            )
        if self._packed or form.kind not in FOUR_BITS:
            check_layout(form, info)
        parts = mindie_layout(form, info.prefix, info.out_features, info.in_features, packed=self._packed)
        return linear_tensors(info, form.kind, parts, stored, str(form.kind), tensor_name)

    def engine_dtype(self, model: StreamedModel) -> torch.dtype | None:
        """bfloat16, in which MindIE-SD computes whatever the checkpoint's dtype, unless it is told otherwise."""
        return torch.bfloat16

    def notes(self, output: Output) -> list[str]:
        notes: list[str] = []
        if self.config.part_file_size:
            notes.append(
                f"save: MindIE-SD does NOT load weights in parts (part_file_size: {self.config.part_file_size}); set "
                "part_file_size: 0, unless something else reads them"
            )
        elif output.nbytes > LARGEST_FILE:
            notes.append(
                f"save: the weight file will have {output.nbytes / _GIB:.0f} GiB; MindIE-SD refuses files above "
                f"{LARGEST_FILE // _GIB} GiB. Quantize more of the linears"
            )
        if _model_type(output.tensors) is None:
            notes.append(
                "save: no linear is quantized, so the files are named without a type, and MindIE-SD does not find them"
            )
        return notes

    def parameters(self, info: LinearInfo, layer: QuantizedLinear) -> Mapping[str, Tensor]:
        parts = layer_parts(info.prefix, layer, torch.float32)
        if isinstance(layer, MxDynamic) and layer.kind in FOUR_BITS and not self._packed:
            parts["weight"] = values_of_codes(layer.weight)
        return {tensor_name(info.prefix, suffix): tensor for suffix, tensor in parts.items()}

    def attention_parameters(self, info: AttentionInfo, quantized: QuantizedAttention) -> Mapping[str, Tensor]:
        return attention_parts(info, quantized)

    def complete(self, folder: Path, model: StreamedModel, output: Output, extras: Sequence[Extras] = ()) -> None:
        """As in the base class.

        Raises:
            UnsupportedError: a processor leaves something beside the weights.
        """
        if any(extra.files or extra.description for extra in extras):
            raise UnsupportedError("the MindIE-SD format has no place for files beside the weights", where="spec.save")
        kind = _model_type(output.tensors)
        counts = Counter(_types_of_layers(output.tensors).values())
        _logger.info(
            "model_quant_type is %s (layers: %s)",
            kind or LayerKind.FLOAT,
            ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none",
        )
        if self.config.part_file_size:
            write_json(folder / INDEX_FILE, weight_index(output), indent=2)
        description = folder / description_file(kind)
        write_json(description, describe(output), indent=4)
        for path in (description, *(folder / shard.file_name for shard in output.shards)):
            path.chmod(_READ_MODE)
        # A rotation may have changed the configuration of a language model. That of a diffusion model is left as the
        # inference project wrote it, whose names need not be those that the model was built from here.
        config = model.config if "architectures" in model.config else None
        copy_side_files(model.folder, folder, config, endings=_COPIED)


def _types_of_layers(tensors: Iterable[PlannedTensor]) -> dict[str, str]:
    """The type of every quantized linear, by its module name."""
    return {tensor.owner: str(tensor.kind) for tensor in tensors if tensor.owner is not None and tensor.kind in KINDS}


def _model_type(tensors: Iterable[PlannedTensor]) -> str | None:
    return model_type(_types_of_layers(tensors).values())


def describe(output: Output) -> dict[str, Any]:
    """The content of the description: the type of the model, of every tensor, and what is said of attentions."""
    types = {tensor.meta.name: str(tensor.kind) for tensor in output.tensors}
    return {"model_quant_type": _model_type(output.tensors) or str(LayerKind.FLOAT), **types, **output.keys}
