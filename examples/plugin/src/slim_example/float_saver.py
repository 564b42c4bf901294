"""``float_saver``: an ordinary floating-point checkpoint that carries the error of the quantized weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from slim_core.checkpoint.source import TensorMeta
from slim_core.checkpoint.writer import lay_out
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import LinearInfo
from slim_core.processors.base import Assignment, AttentionAssignment, Extras
from slim_core.quantization.layers import QuantizedLinear
from slim_core.recipe import SaverConfig
from slim_core.savers.base import Output, PlannedTensor, Saver
from slim_core.savers.side_files import copy_side_files

__all__ = ["FloatSaver", "FloatSaverConfig"]


class FloatSaverConfig(SaverConfig):
    """Write ``model.safetensors`` with dequantized weights."""

    type: Literal["float_saver"] = "float_saver"


class FloatSaver(Saver):
    """For tools that know no quantized format. Activations are not quantized in the output, only weights."""

    Config = FloatSaverConfig

    def declare(
        self,
        model: StreamedModel,
        assignments: Mapping[str, Assignment],
        attentions: Mapping[str, AttentionAssignment] = MappingProxyType({}),
    ) -> Output:
        tensors: list[PlannedTensor] = []
        self._metas: dict[str, TensorMeta] = {}
        for unit in model.units:
            owners = {f"{info.prefix}.weight": info.name for info in unit.linears if info.name in assignments}
            for name, origin in unit.tensors.items():
                stored = model.source.meta(origin)
                self._metas[name] = meta = TensorMeta(name, stored.dtype, stored.shape)
                owner = owners.get(name)
                kind = str(assignments[owner].kind) if owner else "FLOAT"
                tensors.append(PlannedTensor(meta, kind, unit.name, origin=None if owner else origin, owner=owner))
            for parameter, meta in unit.added.items():
                tensors.append(PlannedTensor(meta, "FLOAT", unit.name, added=parameter))
        return Output(tuple(tensors), tuple(lay_out([tensor.meta for tensor in tensors], "model", 0)))

    def parameters(self, info: LinearInfo, layer: QuantizedLinear) -> Mapping[str, Any]:
        name = f"{info.prefix}.weight"
        return {name: layer.dequantized().to(self._metas[name].dtype)}

    def complete(self, folder: Path, model: StreamedModel, output: Output, extras: Sequence[Extras] = ()) -> None:
        copy_side_files(model.folder, folder, model.config)
