"""The part of the plan that is about time: what a probe of the work lets expect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from slim_core.sizes import human_time

__all__ = ["PlannedTime"]


@dataclass(frozen=True)
class PlannedTime:
    """How long the run will take, from its first unit until its last byte is on disk.

    Args:
        parts: seconds of the thread that does the work, by what it does; of the slowest of several ranks.
        reading, writing: seconds that reading the weights and writing the output take beside that.
        took: seconds that the probe took.
        guessed: share of the parts that was not measured but put in proportion to what was.
        rough: what was counted in forwards instead of being tried; empty if nothing was.
        unknown: why nothing is known; empty if something is.
    """

    parts: Mapping[str, float] = field(default_factory=dict[str, float])
    reading: float = 0.0
    writing: float = 0.0
    took: float = 0.0
    guessed: float = 0.0
    rough: str = ""
    unknown: str = ""

    @property
    def seconds(self) -> float:
        """The work goes on while others read and write, so the slowest of the three decides."""
        return max(sum(self.parts.values()), self.reading, self.writing)

    def summary(self) -> str:
        """For the plan."""
        if self.unknown:
            return f"not predicted: {self.unknown}"
        parts = sorted(self.parts.items(), key=lambda part: -part[1])
        told = [f"{name} {human_time(seconds)}" for name, seconds in parts if seconds >= 0.01 * self.seconds]
        beside = {"reading": self.reading, "writing": self.writing}
        told += [f"beside it {name} {human_time(seconds)}" for name, seconds in beside.items() if seconds >= 0.1]
        text = f"about {human_time(self.seconds)} ({', '.join(told)}); measured in a probe of {human_time(self.took)}"
        if self.guessed >= 0.01:
            text += f", which did not get to {self.guessed:.0%} of it"
        return text + (f"; roughly, since {self.rough} was not tried" if self.rough else "")
