"""What a saver is.

A saver first declares every tensor it will write (names, dtypes, shapes and types follow from the plan alone), which
fixes the layout of the output; then it is handed finished layers and untouched tensors; at the end it writes the files
around them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from slim_core.checkpoint.source import TensorMeta
from slim_core.checkpoint.writer import Shard, ShardedWriter
from slim_core.model.units import LinearInfo, StreamedModel
from slim_core.processors.base import Assignment
from slim_core.quantization.layers import QuantizedLinear
from slim_core.recipe import SaverConfig, saver_class

__all__ = ["Output", "PlannedTensor", "Saver", "create_saver"]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the output: what it is, the type its description says, and where it comes from.

    ``origin`` is the checkpoint tensor that is passed on as it is; None for a parameter of the linear ``owner``.
    """

    meta: TensorMeta
    kind: str
    unit: str
    origin: str | None = None
    owner: str | None = None


@dataclass(frozen=True)
class Output:
    """Everything a run will write, in order, the shards it falls into, and the columns that share a scale (or 0)."""

    tensors: tuple[PlannedTensor, ...]
    shards: tuple[Shard, ...]
    group_size: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all weight files, headers included."""
        return sum(shard.nbytes for shard in self.shards)


class Saver(ABC):
    """Base of the savers."""

    Config: ClassVar[type[SaverConfig]]

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def declare(self, model: StreamedModel, assignments: Mapping[str, Assignment]) -> Output:
        """Lay out everything that will be written."""

    @abstractmethod
    def parameters(self, info: LinearInfo, layer: QuantizedLinear) -> Mapping[str, Any]:
        """The tensors that a finished layer becomes, by their full name."""

    @abstractmethod
    def complete(self, folder: Path, model: StreamedModel, output: Output) -> None:
        """Write the files beside the weights."""

    def write_layer(self, writer: ShardedWriter, info: LinearInfo, layer: QuantizedLinear) -> None:
        """Hand the tensors of a finished layer to the writer."""
        for name, tensor in self.parameters(info, layer).items():
            writer.put(name, tensor)

    def write_untouched(self, writer: ShardedWriter, model: StreamedModel, tensors: Sequence[PlannedTensor]) -> None:
        """Pass tensors of the checkpoint on; without holding them where they are stored as they will be written."""
        for tensor in tensors:
            assert tensor.origin is not None
            stored = model.source.stored(tensor.origin)
            if stored is not None:
                writer.copy(tensor.meta.name, stored)
            else:
                writer.put(tensor.meta.name, model.source.load(tensor.origin))


def create_saver(config: SaverConfig) -> Saver:
    """The saver behind a configuration, found through its entry point."""
    return saver_class(config.type)(config)
