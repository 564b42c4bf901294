"""``group``: several processors over the same forward."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from slim_core.processors.base import Assignment, LinearRule, Processor, UnitWork, create_processor
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

    def rules(self) -> list[LinearRule]:
        return [rule for member in self.members for rule in member.rules()]

    def notes(self) -> list[str]:
        return [note for member in self.members for note in member.notes()]

    def observes(self, linear: str, assignment: Assignment) -> bool:
        return any(member.observes(linear, assignment) for member in self.members)

    def process(self, work: UnitWork) -> None:
        for member in self.members:
            member.process(work)
