"""``group``: several processors over the same forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from slim_core.model.units import LinearInfo
from slim_core.processors.base import Assignment, LinearRule, Processor, UnitWork, create_processor
from slim_core.quantization.statistics import Need
from slim_core.recipe import AnyProcessor, ProcessorConfig

__all__ = ["Group", "GroupConfig"]


class GroupConfig(ProcessorConfig):
    """Processors that share one forward of every block; a linear belongs to the first that names it."""

    type: Literal["group"] = "group"
    configs: tuple[AnyProcessor, ...] = Field(min_length=1, description="The processors, in order")


class Group(Processor):
    """Hands everything on to its members, in order."""

    Config = GroupConfig

    def __init__(self, config: Any, position: str) -> None:
        super().__init__(config, position)
        self.members: list[Processor] = [
            create_processor(member, f"{position}.configs[{i}]") for i, member in enumerate(config.configs)
        ]

    @property
    def runs_block(self) -> bool:
        return any(member.runs_block for member in self.members)

    @property
    def wants_float_targets(self) -> bool:
        return any(member.wants_float_targets for member in self.members)

    def rules(self) -> list[LinearRule]:
        return [rule for member in self.members for rule in member.rules()]

    def notes(self) -> list[str]:
        return [note for member in self.members for note in member.notes()]

    def requests(
        self, linears: Sequence[LinearInfo], assignments: Mapping[str, Assignment]
    ) -> Mapping[str, frozenset[Need]]:
        wanted: dict[str, frozenset[Need]] = {}
        for member in self.members:
            for name, needs in member.requests(linears, assignments).items():
                wanted[name] = wanted.get(name, frozenset()) | needs
        return wanted

    def check(self, linears: Sequence[LinearInfo], assignments: Mapping[str, Assignment]) -> None:
        for member in self.members:
            member.check(linears, assignments)

    def process(self, work: UnitWork) -> None:
        for member in self.members:
            member.process(work)
