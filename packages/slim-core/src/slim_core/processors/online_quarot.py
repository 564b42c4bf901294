"""``online_quarot``: rotate query and key of attentions while the model runs, for attention in few bits.

The rotation is a Hadamard matrix with random signs, the same for all attentions with heads of one size.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from slim_core.errors import UnsupportedError
from slim_core.model.attention import AttentionInfo
from slim_core.model.streamed import StreamedModel
from slim_core.model.weights import Edit
from slim_core.processors.base import Example, Processor, UnitWork
from slim_core.processors.rotating import BlockSize
from slim_core.recipe import Exclude, Include, NameFilter, ProcessorConfig
from slim_core.rotation.attention import KEY_ROTATION, QUERY_ROTATION, QueryKeyRotation, rotate_queries_and_keys
from slim_core.rotation.matrices import create_rotation

__all__ = ["OnlineQuarot", "OnlineQuarotConfig"]

_DTYPE = torch.bfloat16
"""MindIE-SD multiplies with the matrix as it is stored, and the states that it multiplies are bfloat16."""


class OnlineQuarotConfig(ProcessorConfig):
    """Rotate query and key of the attentions that ``include`` names and ``exclude`` does not.

    Patterns may name the attention, or the matrices that it is given: ``<attention>.q_rot`` and ``.k_rot``. Both are
    given in any case.
    """

    type: Literal["online_quarot"] = "online_quarot"
    include: Include = Field(default=(), description="Patterns of attentions to rotate; empty means all")
    exclude: Exclude = Field(default=(), description="Patterns of attentions to leave alone; wins over include")
    block_size: BlockSize = Field(
        default=-1, description="Size of the blocks of a rotation, a power of two; -1: one block for each head"
    )

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return () if value is None else value


class OnlineQuarot(Processor):
    """Needs no data. Its place in a recipe does not matter: whoever looks at the states sees them rotated."""

    Config = OnlineQuarotConfig
    config: OnlineQuarotConfig

    def __init__(self, config: Any, position: str) -> None:
        super().__init__(config, position)
        self._rotations: dict[str, QueryKeyRotation] = {}
        self._notes: list[str] = []

    def prepare(self, model: StreamedModel, example: Example | None) -> StreamedModel:
        where = f"spec.{self.position}"
        infos = [info for unit in model.units for info in unit.attentions]
        if not infos:
            raise UnsupportedError(
                "no attention that could be rotated was found in the blocks of this model",
                where=where,
                remedy="leave this processor out",
            )
        chosen = NameFilter(self.config.include, self.config.exclude)
        named = {info.name: _names(info) for info in infos}
        every = [name for names in named.values() for name in names]
        self._notes = [
            f"{where}.{side}: pattern {pattern!r} matches no attention of the decoder blocks"
            for side, pattern in chosen.unmatched(every)
        ]
        for info in infos:
            if chosen.matches(*named[info.name]):
                if info.rotated:
                    raise UnsupportedError(
                        "another online_quarot rotates it already", where=f"{where}: {info.name}", remedy="keep one"
                    )
                self._rotations[info.name] = self._rotation(info)
        if not self._rotations:
            self._notes.append(f"{where} rotates no attention")
        return rotate_queries_and_keys(model, self._rotations)

    def _rotation(self, info: AttentionInfo) -> QueryKeyRotation:
        reason = info.problem
        if not reason and (info.latent or not info.sees_query):
            reason = "its query and key cannot be reached as the kernel multiplies them"
        if reason:
            raise UnsupportedError(
                f"cannot be rotated: {reason}", where=info.name, remedy=f"exclude it in spec.{self.position}"
            )
        try:
            matrix = create_rotation(info.key_dim, self.config.block_size).dense().to(_DTYPE)
        except UnsupportedError as error:
            raise UnsupportedError(
                f"its heads of {info.key_dim} channels cannot be rotated: {error.what}",
                where=info.name,
                remedy=f"set block_size in spec.{self.position} to a power of two that divides {info.key_dim}, or "
                "exclude it",
            ) from error
        return QueryKeyRotation(matrix, matrix)

    def summary(self) -> str:
        if not self._rotations:
            return ""
        sizes = sorted({rotation.query.shape[0] for rotation in self._rotations.values()})
        block = "" if self.config.block_size == -1 else f" in blocks of {self.config.block_size}"
        channels, count = " and ".join(map(str, sizes)), len(self._rotations)
        return (
            f"{self.config.type}: query and key of {count} attention{'s' if count > 1 else ''} are rotated at run "
            f"time, heads of {channels} channels{block}"
        )

    def notes(self) -> list[str]:
        return self._notes

    def process(self, work: UnitWork) -> None:
        assert work.weights is not None
        work.weights.apply(
            Edit(f"{name}.{leaf}", value=matrix.float())
            for name, rotation in self._rotations.items()
            if name.startswith(f"{work.name}.")
            for leaf, matrix in ((QUERY_ROTATION, rotation.query), (KEY_ROTATION, rotation.key))
        )


def _names(info: AttentionInfo) -> tuple[str, ...]:
    """What patterns are held against."""
    names = dict.fromkeys((info.name, info.prefix, *info.also_called))
    return (*names, *(f"{name}.{leaf}" for name in names for leaf in (QUERY_ROTATION, KEY_ROTATION)))
