"""What a run notes of its linears, attentions and units, for the report and for resuming."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slim_core.phases import COMPUTING
from slim_core.smoothing.scales import SmoothingNote

__all__ = ["AttentionRecord", "ExpertRecord", "LinearRecord", "RunResult", "StarvedExpert", "StateRecord"]
__all__ += ["TimeRecord", "UnitRecord"]


@dataclass(frozen=True)
class LinearRecord:
    """What happened to one linear. ``low`` and ``high`` bound its inputs on ``tokens`` tokens; None if not observed."""

    name: str
    kind: str
    weight_sqnr_db: float
    low: float | None
    high: float | None
    tokens: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class UnitRecord:
    """Cost and size of one unit; ``phases`` are its seconds by what was done."""

    name: str
    seconds: float
    resident_bytes: int
    bytes_in: int
    bytes_out: int
    phases: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class TimeRecord:
    """Where the time of one process went, from the beginning of a run until the last byte was on disk.

    Args:
        phases: seconds of the thread that does the work, by what it did; together they are all the time.
        reading, writing: seconds in which the threads that read ahead and write were busy meanwhile.
    """

    phases: dict[str, float]
    reading: float
    writing: float

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    @property
    def computing(self) -> float:
        return sum(self.phases.get(phase, 0.0) for phase in COMPUTING)


@dataclass(frozen=True)
class StateRecord:
    """What was observed of one state, over all channels: ``query``, ``key`` or ``value``.

    Args:
        low, high: extremes.
        clip_low, clip_high: the widest range that is not clipped, of all channels or heads.
    """

    state: str
    low: float
    high: float
    clip_low: float
    clip_high: float


@dataclass(frozen=True)
class AttentionRecord:
    """What happened to one attention; without states if nothing was observed of it."""

    name: str
    becomes: str
    tokens: int
    states: tuple[StateRecord, ...] = ()

    @classmethod
    def recalled(cls, note: Mapping[str, Any]) -> AttentionRecord:
        """A record from its JSON form."""
        states = tuple(StateRecord(**state) for state in note["states"])
        return cls(note["name"], note["becomes"], note["tokens"], states)


@dataclass(frozen=True)
class StarvedExpert:
    """An expert to which too few tokens were routed.

    Args:
        expert: its number.
        routed: the tokens that its router gave it.
        extra, forced: what its statistics learned besides: tokens of extra samples, and such as went elsewhere.
        rule: how it was quantized; None if that was enough, so that it was quantized like all others.
    """

    expert: int
    routed: int
    extra: int
    forced: int
    rule: str | None

    @property
    def tokens(self) -> int:
        return self.routed + self.extra + self.forced


@dataclass(frozen=True)
class ExpertRecord:
    """Where the tokens of a layer of experts went.

    Args:
        name: the module that holds the experts.
        counts: the tokens that were routed to each.
        starved: those to which fewer than the quota were routed, or none at all.
    """

    name: str
    counts: tuple[int, ...]
    starved: tuple[StarvedExpert, ...] = ()

    @classmethod
    def recalled(cls, note: Mapping[str, Any]) -> ExpertRecord:
        """A record from its JSON form."""
        starved = tuple(StarvedExpert(**expert) for expert in note["starved"])
        return cls(note["name"], tuple(note["counts"]), starved)


@dataclass
class RunResult:
    """What a run did, for the report.

    Args:
        extra_samples: those that only experts below the quota learned from.
        block_forwards: forward passes of single blocks that were run.
        stage_forwards: those of the stages ahead of the main one.
        peak_bytes: the most memory the process ever had.
        base_bytes: its memory when the run began.
        rank_peak_bytes: the most memory that each of several ranks ever had; empty for one.
        peak_disk: the most bytes on the disk of the output, looked at after every unit.
        cpu_seconds: processor time of the work on the units, of each rank.
        times: where the time of each rank went.
    """

    save_path: Path
    linears: list[LinearRecord] = field(default_factory=list[LinearRecord])
    attentions: list[AttentionRecord] = field(default_factory=list[AttentionRecord])
    smoothed: list[SmoothingNote] = field(default_factory=list[SmoothingNote])
    experts: list[ExpertRecord] = field(default_factory=list[ExpertRecord])
    units: list[UnitRecord] = field(default_factory=list[UnitRecord])
    warnings: list[str] = field(default_factory=list[str])
    samples: int = 0
    extra_samples: int = 0
    block_forwards: int = 0
    stage_forwards: int = 0
    resumed_units: int = 0
    seconds: float = 0.0
    base_bytes: int = 0
    peak_bytes: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    rank_peak_bytes: tuple[int, ...] = ()
    peak_disk: int = 0
    cpu_seconds: tuple[float, ...] = ()
    times: tuple[TimeRecord, ...] = ()

    def counts(self) -> dict[str, int]:
        """How many records of every sort there are, besides units."""
        return {name: len(getattr(self, name)) for name in _RECALL}

    def noted_since(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """The records since there were so many, in a form for JSON."""
        return {name: [asdict(record) for record in getattr(self, name)[count:]] for name, count in counts.items()}

    def recall(self, note: Mapping[str, Any]) -> None:
        """Take over what :meth:`noted_since` gave in an earlier run."""
        for name, recalled in _RECALL.items():
            getattr(self, name).extend(map(recalled, note[name]))


_RECALL: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "linears": lambda note: LinearRecord(**note),
    "attentions": AttentionRecord.recalled,
    "smoothed": SmoothingNote.recalled,
    "experts": ExpertRecord.recalled,
}
