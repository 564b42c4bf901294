"""Going through a model unit by unit to list what will be written: quantized layers, attentions, and all the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from slim_core.checkpoint.source import TensorMeta
from slim_core.errors import InvalidModelError
from slim_core.model.attention import AttentionInfo
from slim_core.model.inputs import mul_scale_of
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import LinearInfo, Unit
from slim_core.processors.base import Assignment, AttentionAssignment, Extras
from slim_core.quantization.attention import AttentionForm
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.savers.ascendv1_attention import attention_layout
from slim_core.savers.ascendv1_layout import FLOAT_BIAS, Part
from slim_core.savers.base import INNER, Output, PlannedTensor

__all__ = ["Labelled", "Namer", "linear_tensors", "plan_tensors", "quantized_attentions", "weight_index"]

Labelled = tuple[TensorMeta, str]
"""A tensor, and the type that the description gives it."""

Namer = Callable[[str, str], str]
"""From the checkpoint name of a linear and a suffix to the name of a tensor."""


def plain_name(prefix: str, suffix: str) -> str:
    """``<linear>.<suffix>``."""
    return f"{prefix}.{suffix}"


def plan_tensors(
    model: StreamedModel,
    assignments: Mapping[str, Assignment],
    attentions: Mapping[str, AttentionAssignment],
    tensors_of: Callable[[LinearInfo, LayerForm, torch.dtype], Iterable[Labelled]],
) -> list[PlannedTensor]:
    """Every tensor of the output, in the order of the model.

    Args:
        assignments, attentions: the linears and attentions that will be quantized, by module name.
        tensors_of: all tensors of a quantized linear, given its form and the dtype of its weight in the checkpoint.

    Raises:
        InvalidModelError: the checkpoint holds a tensor whose name one of them needs.
    """
    tensors: list[PlannedTensor] = []
    for unit in model.units:
        tensors += _of_unit(model, unit, assignments, tensors_of)
        for info, form in _attentions(unit, attentions):
            for name, part in attention_layout(info, form).items():
                meta = TensorMeta(name, part.dtype or torch.float32, part.shape)
                tensors.append(PlannedTensor(meta, str(form.kind), unit.name, owner=info.name))
    names: set[str] = set()
    for tensor in tensors:
        if tensor.meta.name in names:
            raise InvalidModelError(
                f"the checkpoint holds {tensor.meta.name!r}, a name that a quantized layer needs",
                where=str(model.folder),
                remedy="exclude that layer, or start from a checkpoint that is not quantized",
            )
        names.add(tensor.meta.name)
    return tensors


def quantized_attentions(
    model: StreamedModel, attentions: Mapping[str, AttentionAssignment]
) -> dict[AttentionInfo, AttentionForm]:
    """The attentions of a model that will be quantized, and what they become."""
    return {info: form for unit in model.units for info, form in _attentions(unit, attentions)}


def _attentions(
    unit: Unit, attentions: Mapping[str, AttentionAssignment]
) -> Iterator[tuple[AttentionInfo, AttentionForm]]:
    for info in unit.attentions:
        if (assigned := attentions.get(info.name)) is not None:
            yield info, assigned.form


def _of_unit(
    model: StreamedModel,
    unit: Unit,
    assignments: Mapping[str, Assignment],
    tensors_of: Callable[[LinearInfo, LayerForm, torch.dtype], Iterable[Labelled]],
) -> Iterator[PlannedTensor]:
    quantized = {info.prefix: info for info in unit.linears if info.name in assignments}
    replaced = {f"{prefix}.{part}" for prefix in quantized for part in ("weight", "bias")}
    for name, origin in unit.tensors.items():
        prefix, _, part = name.rpartition(".")
        if name in replaced:
            if part == "weight":
                info = quantized[prefix]
                stored = model.source.meta(name).dtype
                inner = INNER if mul_scale_of(info.name) in unit.added else ""
                called = replace(info, prefix=info.prefix + inner)
                for meta, label in tensors_of(called, assignments[info.name].form, stored):
                    yield PlannedTensor(meta, label, unit.name, owner=info.name)
            continue
        meta = model.source.meta(origin)
        yield PlannedTensor(TensorMeta(name, meta.dtype, meta.shape), LayerKind.FLOAT, unit.name, origin=origin)
    for parameter, meta in unit.added.items():
        if meta.name not in replaced:
            yield PlannedTensor(meta, LayerKind.FLOAT, unit.name, added=parameter)


def linear_tensors(
    info: LinearInfo,
    kind: LayerKind,
    parts: Mapping[str, Part],
    stored: torch.dtype,
    label: str,
    name: Namer = plain_name,
) -> Iterator[Labelled]:
    """The tensors of a quantized linear, its bias last.

    Args:
        parts: all but the bias, by suffix.
        stored: the dtype of its weight in the checkpoint.
        label: its type in the description.
    """
    for suffix, part in parts.items():
        yield TensorMeta(name(info.prefix, suffix), part.dtype or stored, part.shape), label
    if info.has_bias:
        kept = kind not in FLOAT_BIAS
        meta = TensorMeta(name(info.prefix, "bias"), stored if kept else torch.float32, (info.out_features,))
        yield meta, label if kept else LayerKind.FLOAT


def weight_index(output: Output, extras: Sequence[Extras] = ()) -> dict[str, Any]:
    """The index of all weight files; further ones lie beside them in the folder, not below it."""
    files = {meta.name: shard.file_name for shard in output.shards for meta in shard.tensors}
    beside = {path: tensors for extra in extras for path, tensors in extra.files.items() if "/" not in path}
    size = sum(tensor.meta.nbytes for tensor in output.tensors)
    return {
        "metadata": {"total_size": size + sum(t.nbytes for tensors in beside.values() for t in tensors.values())},
        "weight_map": {tensor.meta.name: files[tensor.meta.name] for tensor in output.tensors}
        | {name: path for path, tensors in beside.items() for name in tensors},
    }
