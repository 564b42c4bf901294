"""The part of the plan that concerns attentions: which become what, and what engines make of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from slim_core.errors import UnsupportedError
from slim_core.model.attention import AttentionInfo
from slim_core.processors.base import AttentionAssignment, AttentionRule
from slim_core.quantization.attention import check_attention
from slim_core.runners.plan_rules import first_to_name, spellings, why_float

__all__ = ["FLOAT", "PlannedAttention", "assign_attentions", "idle_rotations", "planned_attentions"]

FLOAT = "FLOAT"


@dataclass(frozen=True)
class PlannedAttention:
    """An attention, what it becomes, and why."""

    name: str
    becomes: str
    reason: str
    info: AttentionInfo


def assign_attentions(
    attentions: Sequence[AttentionInfo], rules: Sequence[AttentionRule]
) -> tuple[dict[str, AttentionAssignment], list[str]]:
    """The first rule that names an attention has it; also what is worth a warning.

    Raises:
        UnsupportedError: the model has no attention that is known, or one that cannot become what a rule says.
    """
    if rules and not attentions:
        raise UnsupportedError(
            "no attention that keeps keys and values was found in the blocks of this model",
            where=f"spec.{rules[0].position}",
            remedy="leave this processor out",
        )
    infos = {info.name: info for info in attentions}
    owners, warnings = first_to_name(rules, attentions, "attentions")
    names = [name for info in attentions for name in spellings(info)]
    for name, rule in owners.items():
        check_attention(rule.form, infos[name])
    assignments = {
        name: AttentionAssignment(rule.form, rule.position, f"spec.{rule.position}") for name, rule in owners.items()
    }
    for rule in rules:
        warnings += [
            f"spec.{rule.position}.{side}: pattern {pattern!r} matches no attention of the decoder blocks"
            for side, pattern in rule.filter.unmatched(names)
        ]
        if not any(assignment.position == rule.position for assignment in assignments.values()):
            warnings.append(f"spec.{rule.position} quantizes no attention")
    return assignments, warnings


def idle_rotations(attentions: Sequence[AttentionInfo], assignments: Collection[str]) -> list[str]:
    """A warning for rotations of query and key that nothing is done with."""
    idle = [info.name for info in attentions if info.rotated and info.name not in assignments]
    if not idle:
        return []
    return [
        f"query and key of {len(idle)} attentions are rotated but not quantized, e.g. {idle[0]}: engines do not read "
        "such rotations"
    ]


def planned_attentions(
    attentions: Sequence[AttentionInfo],
    assignments: Mapping[str, AttentionAssignment],
    rules: Sequence[AttentionRule],
) -> tuple[PlannedAttention, ...]:
    """The attentions of a unit for the plan; none if the recipe is about linears alone."""
    if not rules:
        return ()
    planned: list[PlannedAttention] = []
    for info in attentions:
        found = assignments.get(info.name)
        becomes, reason = (str(found.form), found.reason) if found else (FLOAT, why_float(info, rules))
        planned.append(PlannedAttention(info.name, becomes, reason, info))
    return tuple(planned)
