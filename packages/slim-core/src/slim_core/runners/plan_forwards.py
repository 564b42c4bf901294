"""The part of the plan that is about forwards: what must be observed, when, and how often each block runs."""

from __future__ import annotations

from collections.abc import Mapping

from slim_core.model.units import LinearInfo
from slim_core.processors.base import Assignment, AttentionAssignment, Processor
from slim_core.quantization.statistics import Need
from slim_core.recipe import SpecV1

__all__ = ["fresh_requests", "fresh_states", "passes", "requests_of", "trained_linears", "training_positions"]

# Statistics of a whole tensor that say nothing of its channels.
_LOST = frozenset({Need.HISTOGRAM, Need.SAMPLE_RANGES})


def requests_of(
    processors: list[Processor], linears: list[LinearInfo], assignments: Mapping[str, Assignment]
) -> dict[str, frozenset[Need]]:
    """What must be known of the inputs of which linears."""
    wanted: dict[str, frozenset[Need]] = {}
    for processor in processors:
        for name, needs in processor.requests(linears, assignments).items():
            if needs:
                wanted[name] = wanted.get(name, frozenset()) | needs
    return wanted


def fresh_requests(processors: list[Processor], requests: Mapping[str, frozenset[Need]]) -> dict[str, frozenset[Need]]:
    """What cannot be carried over to an input that is rescaled, and must be observed again."""
    rescaled = {name for processor in processors for name in processor.rescales()}
    return {name: lost for name in rescaled if (lost := requests.get(name, frozenset()) & _LOST)}


def fresh_states(processors: list[Processor], attentions: Mapping[str, AttentionAssignment]) -> frozenset[str]:
    """Attentions with a rescaled state whose statistics are not of single channels."""
    changes = [change for processor in processors for change in processor.changes_states()]
    return frozenset(
        change.attention
        for change in changes
        if (assigned := attentions.get(change.attention)) is not None
        and any(
            name == change.state and form.is_static and form.scope != "per_channel"
            for name, form in assigned.form.states()
        )
    )


def trained_linears(processors: list[Processor], assignments: Mapping[str, Assignment]) -> frozenset[str]:
    """The linears that learn while their block is run aside."""
    positions = training_positions(processors)
    return frozenset(name for name, assigned in assignments.items() if assigned.position in positions)


def training_positions(processors: list[Processor]) -> frozenset[str]:
    """The positions whose linears learn while their block is run aside."""
    return frozenset(position for one in processors if one.runs_block for position in one.schemes())


def passes(processors: list[Processor], spec: SpecV1, observes: bool, needs_data: bool) -> tuple[int, int]:
    """How many streams of samples there are, and how often each block runs for a sample."""
    if not needs_data:
        return 1, 0
    if spec.propagate == "float":
        return 1, 1
    if any(processor.wants_float_targets for processor in processors):
        return 2, 3 if observes else 2
    return 1, 2
