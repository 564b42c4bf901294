"""``kv_smooth``: keys whose channels reach equally far, by a scale that the queries take over before rotary embedding.

The static statistics of a key cache per channel follow the scale; those of whole heads, where it pays, are taken anew.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from slim_core.errors import UnsupportedError
from slim_core.model.query_keys import QueryKey
from slim_core.model.streamed import StreamedModel
from slim_core.model.structure import Structure
from slim_core.processors.base import AttentionState, Processor, UnitWork
from slim_core.processors.smoothing import some_reasons
from slim_core.recipe import Exclude, Include, NameFilter, Phase, ProcessorConfig
from slim_core.smoothing.keys import key_edits, key_scale
from slim_core.smoothing.scales import SmoothingNote, spread_of

__all__ = ["KVSmooth", "KVSmoothConfig"]


class KVSmoothConfig(ProcessorConfig):
    """Even out the keys of the attentions that ``include`` names and ``exclude`` does not."""

    phase = Phase.SMOOTHING

    type: Literal["kv_smooth"] = "kv_smooth"
    smooth_factor: float = Field(
        default=1.0, gt=0, description="Exponent of the range: 1 makes all channels reach equally far. Default: 1"
    )
    include: Include = Field(
        default=("*",), description="Patterns of attention modules to smooth; an empty list means none"
    )
    exclude: Exclude = Field(default=(), description="Patterns of attention modules to leave alone; wins over include")


class KVSmooth(Processor):
    """``s = A^f`` over its geometric mean in each head, A the largest key of channels that share it."""

    Config = KVSmoothConfig
    config: KVSmoothConfig

    def __init__(self, config: KVSmoothConfig, position: str) -> None:
        super().__init__(config, position)
        self._places: dict[str, list[QueryKey]] = {}
        self._notes: list[str] = []
        self._folds_floats = True

    @property
    def reshapes(self) -> bool:
        return True

    @property
    def changes_floats(self) -> bool:
        return self._folds_floats and bool(self._all())

    @property
    def uses_structure(self) -> bool:
        return True

    @property
    def uses_query_keys(self) -> bool:
        return True

    def adopt(self, structure: Structure, model: StreamedModel) -> None:
        self._folds_floats = structure.folds_floats
        chosen = NameFilter(self.config.include, self.config.exclude)
        spelled = {info.name: (info.name, info.prefix) for unit in model.units for info in unit.attentions}
        names = list(spelled)
        refused = {name: why for found in structure.keys.values() for name, why in found.refused.items()}
        if not set(names) - set(refused):
            raise UnsupportedError(
                "no attention of this model can be smoothed"
                + (f": {some_reasons(refused)}" if refused else ", because none was found that keeps keys and values"),
                where=f"spec.{self.position}",
                remedy="leave this processor out",
            )
        for side, pattern in chosen.unmatched([name for both in spelled.values() for name in both]):
            self._notes.append(
                f"spec.{self.position}.{side}: pattern {pattern!r} matches no attention, e.g. {names[0]}"
            )
        wanted = {name for name, both in spelled.items() if self.config.include and chosen.matches(*both)}
        if left := {name: why for name, why in refused.items() if name in wanted}:
            self._notes.append(f"spec.{self.position} cannot smooth {len(left)} attentions: {some_reasons(left)}")
        self._places = {
            unit: [place for place in found.found if place.attention in wanted]
            for unit, found in structure.keys.items()
        }
        if not any(self._places.values()):
            self._notes.append(f"spec.{self.position} smooths nothing")

    def summary(self) -> str:
        count = len(self._all())
        return f"{self.config.type}: keys of {count} attentions smoothed" if count else ""

    def notes(self) -> list[str]:
        return self._notes

    def _all(self) -> list[QueryKey]:
        return [place for places in self._places.values() for place in places]

    def state_requests(self) -> Collection[AttentionState]:
        return [AttentionState(place.attention, "key") for place in self._all()]

    def changes_states(self) -> Collection[AttentionState]:
        return [AttentionState(place.attention, state) for place in self._all() for state in ("query", "key")]

    def process(self, work: UnitWork) -> None:
        for place in self._places.get(work.name, ()):
            assert work.weights is not None
            seen = work.states[place.attention].states["key"]
            low, high = seen.bounds(place.attention, "key")
            absmax = torch.maximum(-low, high)
            scale = key_scale(absmax, place, self.config.smooth_factor)
            work.weights.apply(key_edits(place, scale, work.weights))
            work.rescale_states(place.attention, "key", 1 / place.of_keys(scale))
            work.rescale_states(place.attention, "query", place.of_queries(scale))
            work.note(self._note(place, scale, absmax, seen.tokens))

    def _note(self, place: QueryKey, scale: Tensor, absmax: Tensor, tokens: int) -> SmoothingNote:
        return SmoothingNote(
            *(self.position, "query-key", place.key.module, (place.query.module,), tokens),
            alpha=self.config.smooth_factor,
            scale_min=float(scale.min()),
            scale_max=float(scale.max()),
            act_spread_before=spread_of(absmax),
            act_spread_after=spread_of(absmax / place.of_keys(scale)),
        )
