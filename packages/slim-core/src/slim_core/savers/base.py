"""What a saver is.

A saver first declares every tensor it will write (names, dtypes, shapes and types follow from the plan alone), which
fixes the layout of the output; then it is handed finished layers and untouched tensors; at the end it writes the files
around them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from slim_core.checkpoint.source import TensorMeta, TensorSource
from slim_core.checkpoint.writer import Shard, ShardedWriter
from slim_core.errors import UnsupportedError
from slim_core.model.attention import AttentionInfo
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import LinearInfo, Unit
from slim_core.model.weights import UnitWeights
from slim_core.processors.base import Assignment, AttentionAssignment, Extras
from slim_core.quantization.attention import QuantizedAttention
from slim_core.quantization.layers import QuantizedLinear, ScaledInput
from slim_core.recipe import SaverConfig, saver_class

__all__ = ["INNER", "Output", "PlannedTensor", "Saver", "create_saver"]

INNER = ".linear"
"""How the name of a linear goes on whose input is multiplied by a scale: the tensors of the quantized linear follow."""

_PART = 1 << 23  # elements of a tensor that are passed on at once


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output: what it is, the type its description says, and where it comes from.

    ``owner`` is the quantized linear or attention that it belongs to. One without an owner is passed on: from the
    checkpoint tensor ``origin``, as processors left it, or from the parameter ``added`` that a processor has made.
    """

    meta: TensorMeta
    kind: str
    unit: str
    origin: str | None = None
    owner: str | None = None
    added: str | None = None


@dataclass(frozen=True)
class Output:
    """Everything a run will write, in order, the shards it falls into, and the columns that share a scale (or 0).

    ``keys`` is what a description says besides of single modules and of the model.
    """

    tensors: tuple[PlannedTensor, ...]
    shards: tuple[Shard, ...]
    group_size: int = 0
    keys: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files, headers included."""
        return sum(shard.nbytes for shard in self.shards)


class Saver(ABC):
    """Base of the savers."""

    Config: ClassVar[type[SaverConfig]]
    engine: ClassVar[str | None] = None
    """The engine that the format is mainly written for, by its name in the loader tables. What it cannot load is worth
    a warning, and what no engine can load that reads the same format is refused. None: nothing is known of engines."""
    holds_attentions: ClassVar[bool] = False
    """Whether the format has a place for quantized attentions."""
    holds_extras: ClassVar[bool] = True
    """Whether the format has a place for what processors leave beside the weights."""
    holds_query_rotations: ClassVar[bool] = False
    """Whether the format has a place for matrices that queries and keys are multiplied by while the model runs."""
    holds_input_scales: ClassVar[bool] = False
    """Whether the format has a place for scales that inputs of linears are multiplied by while the model runs."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def labels(self) -> Mapping[str, str]:
        """What the format calls kinds of layers, where that is not the name of the kind."""
        return {}

    @abstractmethod
    def declare(
        self,
        model: StreamedModel,
        assignments: Mapping[str, Assignment],
        attentions: Mapping[str, AttentionAssignment] = MappingProxyType({}),
    ) -> Output:
        """Lay out everything that will be written.

        Args:
            assignments, attentions: the linears and attentions that will be quantized, by module name.
        """

    def engine_dtype(self, model: StreamedModel) -> torch.dtype | None:
        """The dtype of activations in the engine, which static scales must be numbers of; None if it is not known."""
        return model.dtype

    def notes(self, output: Output) -> list[str]:
        """Remarks on what was declared that the plan passes on to the user."""
        return []

    @abstractmethod
    def parameters(self, info: LinearInfo, layer: QuantizedLinear) -> Mapping[str, Any]:
        """The tensors that a finished layer becomes, by their full name."""

    def attention_parameters(self, info: AttentionInfo, quantized: QuantizedAttention) -> Mapping[str, Any]:
        """The tensors that a finished attention becomes, by their full name; only asked if :attr:`holds_attentions`."""
        return {}

    @abstractmethod
    def complete(self, folder: Path, model: StreamedModel, output: Output, extras: Sequence[Extras] = ()) -> None:
        """Write the files beside the weights, and what processors leave there."""

    def write_layer(self, writer: ShardedWriter, info: LinearInfo, layer: QuantizedLinear) -> None:
        """Hand the tensors of a finished layer to the writer; the scale of its input is among what was added."""
        if isinstance(layer, ScaledInput):
            info, layer = replace(info, prefix=info.prefix + INNER), layer.layer
        for name, tensor in self.parameters(info, layer).items():
            writer.put(name, tensor)

    def write_attention(self, writer: ShardedWriter, info: AttentionInfo, quantized: QuantizedAttention) -> None:
        """Hand the tensors of a finished attention to the writer."""
        for name, tensor in self.attention_parameters(info, quantized).items():
            writer.put(name, tensor)

    def write_untouched(
        self,
        writer: ShardedWriter,
        model: StreamedModel,
        unit: Unit,
        weights: UnitWeights,
        tensors: Sequence[PlannedTensor],
    ) -> None:
        """Pass tensors of a unit on, as they are stored or as processors left them.

        What is stored as it will be written is copied without being held.
        """
        edited = {unit.parameters.get(name): view for name, view in weights.edited()}
        if in_parts := sorted(name for name in edited if name is not None and name in model.joined):
            raise UnsupportedError(
                "a processor changes this tensor, which the checkpoint stores in parts",
                where=in_parts[0],
                remedy="leave that processor out for this module",
            )
        for tensor in tensors:
            if tensor.added is not None:
                writer.put(tensor.meta.name, weights[tensor.added].stored_form())
                continue
            assert tensor.origin is not None
            stored = model.source.stored(tensor.origin)
            if (view := edited.get(tensor.origin)) is not None:
                writer.put(tensor.meta.name, view.stored_form())
            elif stored is not None:
                writer.copy(tensor.meta.name, stored)
            else:
                _write_made(writer, tensor.meta, model.source, tensor.origin)


def _write_made(writer: ShardedWriter, meta: TensorMeta, source: TensorSource, name: str) -> None:
    """Pass on a tensor that is made while it is read, a few rows at a time if it is large.

    Raises:
        UnsupportedError: float16 cannot hold what is made.
    """
    if len(meta.shape) != 2 or meta.numel <= _PART:
        writer.put(meta.name, source.load(name))
        return
    step = max(1, _PART // meta.shape[1])
    for start in range(0, meta.shape[0], step):
        rows = source.rows(name, start, min(start + step, meta.shape[0])).to(meta.dtype)
        if meta.dtype == torch.float16 and not bool(torch.isfinite(rows).all()):
            raise UnsupportedError("is too large for float16 as it comes out", where=name, remedy="start from bfloat16")
        writer.put_rows(meta.name, rows)
    source.release((name,))


def create_saver(config: SaverConfig) -> Saver:
    """The saver behind a configuration, found through its entry point."""
    return saver_class(config.type)(config)
