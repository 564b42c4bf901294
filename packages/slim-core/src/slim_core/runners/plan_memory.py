"""The part of the plan that is about memory: whether it fits the budget, and what is done or said if it does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from slim_core.budget import MemoryBudget
from slim_core.devices import Devices
from slim_core.errors import UnsupportedError
from slim_core.model.experts import ExpertLayer
from slim_core.model.streamed import StreamedModel
from slim_core.runners.choice import unit_bytes
from slim_core.runners.prediction import Share
from slim_core.sizes import human_size

__all__ = ["PlannedMemory", "explores_by_expert", "plan_memory"]

_MIB = 1 << 20
Layers = Mapping[str, Sequence[ExpertLayer]]


@dataclass(frozen=True)
class PlannedMemory:
    """What the run will take beyond what the process takes when it begins.

    Args:
        shares: what that is made of when it is most.
        budget: what it may take.
        by_expert: whether, to stay within it, routed experts are in memory one at a time.
        spills: whether activations of samples that are not at work wait on disk, because they are large.
        refusal: why it cannot stay within it.
    """

    shares: tuple[Share, ...]
    budget: MemoryBudget
    by_expert: bool = False
    spills: bool = False
    refusal: UnsupportedError | None = None

    @property
    def peak(self) -> int:
        return sum(share.nbytes for share in self.shares)

    def summary(self, before: int) -> str:
        """For the plan, given the bytes that the process takes before the run."""
        whole, beyond = human_size(before + self.peak), human_size(self.peak)
        text = f"about {whole} at most, {beyond} of it beyond the process itself"
        limits = [f"{size} for the {place}" for place, size in _limits(self.budget).items()]
        if limits:
            text += f"; the budget for that is {' and '.join(limits)}"
        if self.by_expert:
            text += "; so experts are in memory one at a time, read when they are called and given back afterwards"
        if self.spills:
            text += "; activations of samples that are not at work wait on the disk of the output"
        return text


def plan_memory(
    budget: MemoryBudget,
    devices: Devices,
    shares: Callable[[Layers, bool], list[list[Share]]],
    experts: Layers,
    why_whole: str,
    *,
    on_disk: Sequence[bool] = (False, True),
    sharers: int = 1,
) -> PlannedMemory:
    """See whether a run stays within its budget: as it is, with one expert in memory at a time, with activations on
    disk, or with both.

    Args:
        shares: what each stage of the run takes, given the experts that are in memory one at a time, and whether
            activations wait on disk.
        experts: by unit, those that can be.
        why_whole: why that would be no help; empty if nothing speaks against it.
        sharers: how many processes on this host have such a budget each.
        on_disk: whether activations may wait in memory (False) and on disk (True), in the order of preference.
    """
    if not experts:
        why_whole = why_whole or "the model has no routed experts that could be in memory one at a time"
    ways = [(spills, by_expert) for spills in on_disk for by_expert in ((False,) if why_whole else (False, True))]
    for spills, by_expert in ways[:-1]:
        stages = shares(experts if by_expert else {}, spills)
        if not _beyond(stages, budget, devices):
            return PlannedMemory(_largest(stages), budget, by_expert, spills)
    spills, by_expert = ways[-1]
    stages = shares(experts if by_expert else {}, spills)
    beyond = _beyond(stages, budget, devices)
    refusal = _refusal(beyond, budget, why_whole, spills, sharers) if beyond else None
    return PlannedMemory(_largest(stages), budget, by_expert, spills, refusal)


def _largest(stages: list[list[Share]]) -> tuple[Share, ...]:
    return tuple(max(stages, key=lambda stage: sum(share.nbytes for share in stage)))


def explores_by_expert(budget: MemoryBudget, model: StreamedModel) -> bool:
    """Whether, while the structure of the blocks is explored, experts are in memory one at a time.

    Exploring takes the largest block and, where a norm is changed, copies of all that reads it.
    """
    largest = max((unit_bytes(model, unit) for unit in model.running), default=0)
    return budget.host is not None and 2 * largest > budget.host


def _beyond(stages: list[list[Share]], budget: MemoryBudget, devices: Devices) -> dict[str, list[Share]]:
    """By place (host or device), the shares of the stage that goes furthest beyond the budget for it."""
    alone = devices.kind == "cpu"
    limits = {"host": budget.host} if alone else {"host": budget.host, "device": budget.device}
    beyond: dict[str, list[Share]] = {}
    for place, limit in limits.items():
        there = [
            [share for share in stage if alone or (share.host if place == "host" else share.device)] for stage in stages
        ]
        worst = max(there, key=lambda stage: sum(share.nbytes for share in stage))
        if limit is not None and sum(share.nbytes for share in worst) > limit:
            beyond[place] = worst
    return beyond


def _refusal(
    beyond: dict[str, list[Share]], budget: MemoryBudget, why_whole: str, spills: bool, sharers: int
) -> UnsupportedError:
    texts: list[str] = []
    enough: list[str] = []
    for place, shares in beyond.items():
        parts = sorted((share for share in shares if share.nbytes), key=lambda share: -share.nbytes)
        listed = ", ".join(f"{human_size(share.nbytes)} {share.what}" for share in parts)
        needed = sum(share.nbytes for share in parts)
        texts.append(f"about {human_size(needed)} of {place} memory, not {_limits(budget)[place]}: {listed}")
        enough.append(f"{place}={-(-needed // _MIB) * (sharers if place == 'host' else 1)}MiB")
    why = f" ({why_whole})" if why_whole else ", even with one expert at a time in memory"
    why += ", though all samples but one wait on disk" if spills else ""
    return UnsupportedError(
        f"{'each rank' if sharers > 1 else 'the run'} would take {'; and '.join(texts)}{why}",
        where="--max_memory",
        remedy=f"allow {','.join(enough)}, or choose fewer or shorter samples or methods that need less",
    )


def _limits(budget: MemoryBudget) -> dict[str, str]:
    given = {"host": budget.host, "device": budget.device}
    return {place: human_size(size) for place, size in given.items() if size is not None}
