"""What the rotating processors share: the rotated view of the model, and what is left beside its weights."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import AfterValidator
from pydantic_core import PydanticCustomError
from torch import Tensor

from slim_core.errors import UnexpectedError, UnsupportedError
from slim_core.model.streamed import StreamedModel
from slim_core.model.structure import discover
from slim_core.processors.base import Example, Extras, Processor
from slim_core.recipe import Phase, ProcessorConfig
from slim_core.rotation.matrices import Rotation
from slim_core.rotation.model import RotatedModel, rotate_model
from slim_core.rotation.online_places import OnlineChoice

__all__ = ["BlockSize", "PowerOfTwo", "Rotating", "RotatingConfig"]

ROTATION_FILE = "optional/quarot.safetensors"
DRAFT_FILE = "rot.safetensors"
_ROWS = 256


def _power_of_two(value: int) -> int:
    if value < 1 or value & (value - 1):
        raise PydanticCustomError("power_of_two", "must be a power of two")
    return value


def _block_size(value: int) -> int:
    if value != -1 and (value < 1 or value & (value - 1)):
        raise PydanticCustomError("block_size", "must be -1 or a power of two")
    return value


PowerOfTwo = Annotated[int, AfterValidator(_power_of_two)]
BlockSize = Annotated[int, AfterValidator(_block_size)]
"""-1 for a single block, or a power of two."""


class RotatingConfig(ProcessorConfig):
    """Configuration of a processor that rotates the model."""

    phase = Phase.ROTATION

    @property
    def rotates(self) -> bool:
        """Whether it rotates the model that is written."""
        return True

    def objection(self, stages: Sequence[Sequence[ProcessorConfig]], at: int) -> str | None:
        if not self.rotates:
            return None
        if at < len(stages) - 1:
            return f"{self.type} rotates the model that is written; move it to process"
        others = [one for one in stages[at] if isinstance(one, RotatingConfig) and one.rotates and one is not self]
        return f"{others[0].type} rotates the model too; keep one of them" if others else None


class Rotating(Processor, ABC):
    """Base of the processors that rotate the model. All of their work is done while weights are read."""

    config: Any

    def __init__(self, config: Any, position: str) -> None:
        super().__init__(config, position)
        self._rotated: RotatedModel | None = None
        self._count = 0
        self.stream: Rotation | None = None
        """The rotation of the residual stream."""

    @property
    def exports(self) -> bool:
        """Whether the rotation of the residual stream is written beside the weights."""
        return True

    @property
    def changes_floats(self) -> bool:
        return True

    @property
    def leaves_extras(self) -> bool:
        return self.exports or self.config.online

    @property
    def rotated(self) -> RotatedModel:
        """What :meth:`prepare` has made."""
        if self._rotated is None:
            raise UnexpectedError("the model was not prepared", where=f"spec.{self.position}")
        return self._rotated

    def prepare(self, model: StreamedModel, example: Example | None) -> StreamedModel:
        where = f"spec.{self.position}"
        if example is None:
            raise UnsupportedError(
                "this kind of model cannot be rotated, because its service gives no example of its input",
                where=where,
                remedy="leave this processor out",
            )
        config, given = self.config, example()
        online = OnlineChoice(config.max_tp_size, config.down_proj_online_layers) if config.online else None
        structure = discover(model, given)
        self._rotated = rotate_model(model, structure, given, block_size=config.block_size, online=online, where=where)
        self.stream = self._rotated.stream
        self._count = len(model.blocks)
        return self._rotated.model

    def summary(self) -> str:
        return f"{self.config.type}: {self.rotated.summary}"

    def notes(self) -> list[str]:
        config, where = self.config, f"spec.{self.position}"
        notes = [f"{where}: {note}" for note in self.rotated.notes]
        if not config.online:
            idle = [key for key in ("max_tp_size", "down_proj_online_layers") if key in config.model_fields_set]
            return notes + [f"{where}.{key} has no effect without online: true" for key in idle]
        absent = sorted({layer for layer in config.down_proj_online_layers if not 0 <= layer < self._count})
        if absent:
            notes.append(f"{where}.down_proj_online_layers: the model has no layers {', '.join(map(str, absent))}")
        if not any(one.inner is None for one in self.rotated.online.values()):
            notes.append(f"{where}: online rotates no attention, because no value heads were found that allow it")
        if config.max_tp_size == 1:
            notes.append(f"{where}.max_tp_size: 1 makes the online rotations of heads nothing but signs")
        return [*notes, f"{where}.online: no engine that is known here carries out online rotations in general"]

    def extras(self) -> Extras:
        files: dict[str, dict[str, Tensor]] = {}
        description: dict[str, Any] = {}
        if self.exports:
            assert self.stream is not None
            files[ROTATION_FILE] = {"global_rotation": _dense(self.stream)}
            description["optional"] = {"quarot": {"rotation_map": {"global_rotation": ROTATION_FILE}}}
            if self.rotated.drafts:
                files[DRAFT_FILE] = {"rot.weight": _normed(self.stream, self.rotated.last_gain())}
                description["is_rot_used"] = True
        if self.rotated.online:
            description["metadata"] = {"quarot": self._metadata()}
        return Extras(files, description)

    def _metadata(self) -> dict[str, Any]:
        """Which linears have which rotation at run time."""
        rotated = self.rotated
        heads = [rotated.prefixes[name] for name, one in rotated.online.items() if one.inner is None]
        downs = [rotated.prefixes[name] for name, one in rotated.online.items() if one.inner is not None]
        layers = {"heads_rotation": {"layers": heads}, "kronecker_rotation": {"layers": downs}}
        return {"max_tp_size": self.config.max_tp_size, **layers}


def _normed(rotation: Rotation, gain: Tensor) -> Tensor:
    """``Q^T diag(g) Q``, float32.

    Drafting layers expect hidden states after the last norm. Multiplied by this from the right, normalised hidden
    states that are rotated and lack the weight of that norm become what the layers, rotated too, expect.
    """
    return rotation.left(_dense(rotation) * gain.unsqueeze(1))


def _dense(rotation: Rotation) -> Tensor:
    """The matrix, float32, computed a few rows at a time in float64."""
    size = rotation.size
    matrix = torch.empty(size, size)
    for start in range(0, size, _ROWS):
        stop = min(start + _ROWS, size)
        rows = torch.zeros(stop - start, size, dtype=torch.float64)
        rows[torch.arange(stop - start), torch.arange(start, stop)] = 1
        matrix[start:stop] = rotation.right(rows).float()
    return matrix
