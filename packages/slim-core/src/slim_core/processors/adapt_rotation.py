"""``adapt_rotation``: rotate a model by a matrix that was learned from its own hidden states.

Stage 1 stands in a prior stage. It looks at the model as it is rotated by a Hadamard matrix H, takes a sample of the
tokens that some linears read, and learns the rotation R after which they lose least when they are quantized. Stage 2
stands in the main stage and does what ``quarot`` does, with H R in the place of H.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError
from torch import Tensor

from slim_core.errors import UnexpectedError, UnsupportedError
from slim_core.logging import get_logger
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import LinearInfo
from slim_core.processors.base import Processor
from slim_core.processors.rotating import BlockSize, PowerOfTwo, Rotating, RotatingConfig
from slim_core.recipe import ProcessorConfig
from slim_core.recipe.base import Integer
from slim_core.rotation.dense import DenseRotation
from slim_core.rotation.procrustes import learn_rotation

__all__ = ["AdaptRotation", "AdaptRotationConfig"]

_logger = get_logger(__name__)
_RESULT = "adapted_matrix"
_POOL_BYTES = 512 << 20
"""What the tokens of all linears together may take."""
_DECIDING = 4
"""One of so many tokens is kept back, to decide which rotation is best."""
_COMMON = ("type", "stage", "block_size")
_FIELDS = {
    1: (*_COMMON, "steps", "quant_dtype", "layer_type", "max_samples"),
    2: (*_COMMON, "online", "max_tp_size", "down_proj_online_layers"),
}
LayerName = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"\S")]


class AdaptRotationConfig(RotatingConfig):
    """Learn a rotation of the hidden states (stage 1, in a prior stage), and rotate the model by it (stage 2)."""

    type: Literal["adapt_rotation"] = "adapt_rotation"
    stage: Literal[1, 2] = Field(description="1: learn, in prior; 2: rotate, in process")
    block_size: BlockSize = Field(
        default=-1, description="Size of the blocks of the rotations to start from, a power of two; -1: one block each"
    )
    steps: int = Field(default=20, ge=1, le=1000, description="Stage 1: steps of learning, at most")
    quant_dtype: Literal["int4", "int8"] = Field(
        default="int4", description="Stage 1: what activations will be quantized to"
    )
    layer_type: tuple[LayerName, ...] = Field(
        default=("up_proj",), min_length=1, description="Stage 1: parts of the names of linears whose inputs count"
    )
    max_samples: int = Field(default=2048, ge=1, le=100_000, description="Stage 1: tokens of each linear, at most")
    online: bool = Field(
        default=False,
        description="Stage 2: also rotate attention heads, and layers of down_proj_online_layers, at run time",
    )
    max_tp_size: PowerOfTwo = Field(
        default=4, le=64, description="Stage 2, online: block size of rotations that tensor-parallel ranks share"
    )
    down_proj_online_layers: tuple[Annotated[Integer, Field(ge=0)], ...] = Field(
        default=(), description="Stage 2, online: decoder layers in which the input of down_proj is rotated too"
    )

    @field_validator("stage", mode="before")
    @classmethod
    def _no_flag(cls, value: Any) -> Any:
        return str(value) if isinstance(value, bool) else value  # true equals 1

    @model_validator(mode="after")
    def _own_fields(self) -> AdaptRotationConfig:
        own = _FIELDS[self.stage]
        foreign = [name for name in type(self).model_fields if name in self.model_fields_set - set(own)]
        if foreign:
            text = f"stage {self.stage} has no field {foreign[0]!r}; its fields are {', '.join(own)}"
            raise PydanticCustomError("other_stage", "{text}", {"text": text})
        return self

    @model_serializer(mode="wrap")
    def _of_its_stage(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = cast("dict[str, Any]", handler(self))
        return {name: fields[name] for name in _FIELDS[self.stage]}

    @property
    def rotates(self) -> bool:
        return self.stage == 2

    def objection(self, stages: Sequence[Sequence[ProcessorConfig]], at: int) -> str | None:
        partners = [
            one for stage in stages for one in stage if isinstance(one, AdaptRotationConfig) and one is not self
        ]
        others = [one for one in partners if one.stage != self.stage]
        if self.stage == 1:
            if at == len(stages) - 1:
                return "stage 1 only learns, so it stands in a stage of prior; in process stands stage 2"
            if not others:
                return "stage 1 learns a rotation that nothing uses; add adapt_rotation with stage: 2 to process"
            if any(one.stage == 1 for one in partners):
                return "two stages learn a rotation; keep one of them"
            return None
        if at == len(stages) - 1 and not others:
            return "stage 2 uses the rotation that stage 1 learns; add adapt_rotation with stage: 1 to a stage of prior"
        if sizes := {one.block_size for one in others} - {self.block_size}:
            return f"block_size is {self.block_size} here and {sizes.pop()} in stage 1; they must agree"
        return super().objection(stages, at)


class AdaptRotation(Rotating):
    """Either stage."""

    Config = AdaptRotationConfig
    config: AdaptRotationConfig
    _places = _share = 0

    @property
    def learns(self) -> bool:
        return self.config.stage == 1

    def summary(self) -> str:
        if not self.learns:
            return super().summary()
        config = self.config
        return (
            f"adapt_rotation learns a rotation from up to {self._share} tokens at each of {self._places} places "
            f"({', '.join(config.layer_type)}), for {config.quant_dtype}"
        )

    def notes(self) -> list[str]:
        return [] if self.learns else super().notes()

    def watches(self, linears: Sequence[LinearInfo], followers: Sequence[Processor]) -> Mapping[str, int]:
        where = f"spec.{self.position}.layer_type"
        user = next((one for one in followers if isinstance(one, AdaptRotation)), None)
        if user is None:
            raise UnexpectedError("no processor uses the rotation", where=where)
        self.stream, leaders = user.rotated.stream, user.rotated.readers
        chosen = [info.name for info in linears if info.in_decoder and info.runs and self._names(info.name)]
        parts = ", ".join(map(repr, self.config.layer_type))
        if not chosen:
            raise UnsupportedError(
                f"no linear has {parts} in its name", where=where, remedy="use parts of names, such as up_proj"
            )
        if (odd := next((name for name in chosen if name not in leaders), None)) is not None:
            raise UnsupportedError(
                f"layer_type {parts} names it, but its input is not the hidden states",
                where=odd,
                remedy="name linears that read the hidden states, such as up_proj or q_proj",
            )
        places = dict.fromkeys(leaders[name] for name in chosen)
        share = _POOL_BYTES // (len(places) * self.stream.size * 4)
        self._places, self._share = len(places), max(1, min(self.config.max_samples, share))
        return dict.fromkeys(places, self._share)

    def _names(self, linear: str) -> bool:
        """Whether a linear is meant: by its name inside its block."""
        parts = linear.split(".")
        block = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
        inner = ".".join(parts[block + 1 :])
        return any(part in inner for part in self.config.layer_type)

    def learn(self, seen: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        assert self.stream is not None
        kept = torch.arange(max((len(tokens) for tokens in seen.values()), default=0)) % _DECIDING > 0
        learned = learn_rotation(
            [tokens[kept[: len(tokens)]] for tokens in seen.values()],
            deciding=[tokens[~kept[: len(tokens)]] for tokens in seen.values()],
            quant_dtype=self.config.quant_dtype,
            steps=self.config.steps,
        )
        _logger.info(
            "spec.%s: %d tokens; in %s, those kept back lose %.4f of what they lose without learning (step %d)",
            *(self.position, sum(map(len, seen.values())), self.config.quant_dtype, learned.gain, learned.best),
        )
        return {_RESULT: self.stream.dense() @ learned.matrix}

    def inherit(self, learned: Mapping[str, Tensor], model: StreamedModel) -> StreamedModel:
        if _RESULT not in learned:
            raise UnexpectedError("no stage has learned a rotation", where=f"spec.{self.position}")
        self.stream = DenseRotation(learned[_RESULT])
        return model.with_source(self.rotated.source_with(self.stream))
