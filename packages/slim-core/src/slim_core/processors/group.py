"""``group``: several processors over the same forward."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from slim_core.processors.base import Processor, create_processor
from slim_core.recipe import AnyProcessor, ProcessorConfig

__all__ = ["Group", "GroupConfig"]


class GroupConfig(ProcessorConfig):
    """Processors that share one forward of every block; a linear belongs to the first that names it."""

    type: Literal["group"] = "group"
    configs: tuple[AnyProcessor, ...] = Field(min_length=1, description="The processors, in order")


class Group(Processor):
    """Stands for its members, in order. All processors share the forward of a block anyway."""

    Config = GroupConfig

    def __init__(self, config: Any, position: str) -> None:
        super().__init__(config, position)
        self._members = [create_processor(one, f"{position}.configs[{i}]") for i, one in enumerate(config.configs)]

    def leaves(self) -> list[Processor]:
        return [leaf for member in self._members for leaf in member.leaves()]
