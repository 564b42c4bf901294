"""The part of the run that concerns attentions: what is observed of them, handed to processors, and noted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Mapping, Sequence

from torch import Tensor

from slim_core.model.attention import Tap
from slim_core.model.units import Unit
from slim_core.processors.base import AttentionAssignment, AttentionState, AttentionWork
from slim_core.quantization.attention import StateForm
from slim_core.quantization.statistics.attention import AttentionStatistics, StateStatistics
from slim_core.runners.records import AttentionRecord, StateRecord

__all__ = ["attention_record", "attention_work", "ranges_for", "statistics_for", "taps_of"]

_RANGE = StateForm("int8", "per_channel")


def statistics_for(
    unit: Unit,
    assignments: Mapping[str, AttentionAssignment],
    tokens: int,
    wanted: Callable[[str], bool] = lambda _name: True,
) -> dict[str, AttentionStatistics]:
    """Empty statistics for every wanted attention of a unit that has a static state, with room for so many tokens."""
    return {
        info.name: AttentionStatistics.of(assigned.form, info, tokens)
        for info in unit.attentions
        if wanted(info.name) and (assigned := assignments.get(info.name)) is not None and assigned.form.needs_data
    }


def ranges_for(unit: Unit, requests: Collection[AttentionState]) -> dict[str, AttentionStatistics]:
    """Empty statistics for the states of a unit whose channels processors want to know the range of."""
    names = {info.name for info in unit.attentions}
    found: dict[str, AttentionStatistics] = {}
    for request in requests:
        if request.attention in names:
            seen = found.setdefault(request.attention, AttentionStatistics())
            seen.states[request.state] = StateStatistics(_RANGE)
    return found


def taps_of(*observed: Mapping[str, AttentionStatistics]) -> dict[str, Tap]:
    """Taps that show the states of every attention to all who observe it."""
    return {
        name: _shown_to([seen[name] for seen in observed if name in seen])
        for name in dict.fromkeys(name for seen in observed for name in seen)
    }


def _shown_to(observers: Sequence[AttentionStatistics]) -> Tap:
    def tap(query: Tensor | None, key: Tensor, value: Tensor) -> None:
        for statistics in observers:
            statistics.observe(query, key, value)

    return tap


def attention_work(
    unit: Unit,
    assignments: Mapping[str, AttentionAssignment],
    statistics: Mapping[str, AttentionStatistics],
    names: Container[str] | None = None,
) -> dict[str, AttentionWork]:
    """The attentions of a unit (or those of them that are named) that are to be worked on."""
    return {
        info.name: AttentionWork(info, assignments[info.name], statistics.get(info.name))
        for info in unit.attentions
        if info.name in assignments and (names is None or info.name in names)
    }


def attention_record(work: AttentionWork) -> AttentionRecord:
    """The note about a finished attention."""
    name, becomes = work.info.name, str(work.assignment.form)
    seen = work.statistics.states if work.statistics is not None else {}
    tokens = max((statistics.tokens for statistics in seen.values()), default=0)
    return AttentionRecord(name, becomes, tokens, tuple(_state_record(name, *item) for item in seen.items()))


def _state_record(name: str, state: str, seen: StateStatistics) -> StateRecord:
    assert seen.minimum is not None
    assert seen.maximum is not None
    low, high = seen.bounds(name, state)
    return StateRecord(state, float(seen.minimum.min()), float(seen.maximum.max()), float(low.min()), float(high.max()))
