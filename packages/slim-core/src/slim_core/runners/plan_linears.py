"""The part of the plan that is about linears: what each becomes and why, and what engines will say to that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slim_core.model.units import LinearInfo, StreamedModel, Unit
from slim_core.processors.base import Assignment, LinearRule
from slim_core.quantization.kinds import LayerKind
from slim_core.runners.plan_rules import first_to_name, why_float
from slim_core.savers.loaders import MAIN_ENGINE, lost_biases, mixed_fusions, unloadable

__all__ = ["PlannedLinear", "assign_linears", "engine_warnings", "planned_linears"]


@dataclass(frozen=True)
class PlannedLinear:
    """A linear, what it becomes, and why."""

    name: str
    kind: LayerKind
    reason: str
    out_features: int
    in_features: int


def assign_linears(linears: list[LinearInfo], rules: list[LinearRule]) -> tuple[dict[str, Assignment], list[str]]:
    """The first rule that names a linear has it; later ones that name it too are worth a warning."""
    widths = {linear.name: linear.in_features for linear in linears if linear.in_block}
    names = list(widths)
    owners, warnings = first_to_name(rules, names, "linears")
    assignments = {
        name: Assignment(rule.form.for_width(widths[name]), rule.position, f"spec.{rule.position}", rule.needs)
        for name, rule in owners.items()
    }
    # To exclude the head is pointless but no mistake.
    every = [linear.name for linear in linears]
    for rule in rules:
        warnings += [
            f"spec.{rule.position}.{side}: pattern {pattern!r} matches no linear of the decoder blocks"
            for side, known in (("include", names), ("exclude", every))
            for where, pattern in rule.filter.unmatched(known)
            if where == side
        ]
    return assignments, warnings


def engine_warnings(
    model: StreamedModel, assignments: Mapping[str, Assignment], labels: Mapping[str, str]
) -> list[str]:
    """What keeps the main engine from loading what becomes of the linears, or makes it compute something else.

    Args:
        labels: what kinds are called in the description, where that is not their own name.
    """
    linears = [info for unit in model.units for info in unit.linears]
    forms = {i.name: assignments[i.name].form if i.name in assignments else LayerKind.FLOAT for i in linears}
    widths = {info.name: info.in_features for info in linears}
    return mixed_fusions(forms) + unloadable(forms, widths, labels) + _lost_shifts(model, assignments)


def _lost_shifts(model: StreamedModel, assignments: Mapping[str, Assignment]) -> list[str]:
    """A warning for linears behind a shifted norm from which the main engine takes the bias away again."""
    given = {
        info.name: assignments[info.name].kind if info.name in assignments else LayerKind.FLOAT
        for unit in model.units
        for info in unit.linears
        if f"{info.name}.bias" in unit.added
    }
    return [
        f"the shift (symmetric: false) gives a bias to {len(names)} {kind} linears whose class has none, e.g. "
        f"{names[0]}; {MAIN_ENGINE} drops it, and the results are wrong. Quantize them to static W8A8, exclude the "
        "norm in front of them from the smoothing, or set symmetric: true"
        for kind, names in lost_biases(given).items()
    ]


def planned_linears(
    unit: Unit, assignments: Mapping[str, Assignment], rules: list[LinearRule]
) -> tuple[PlannedLinear, ...]:
    """The linears of a unit, with what decided on each."""
    planned: list[PlannedLinear] = []
    for info in unit.linears:
        assigned = assignments.get(info.name)
        kind = assigned.kind if assigned else LayerKind.FLOAT
        reason = assigned.reason if assigned else _why_float(info, rules)
        planned.append(PlannedLinear(info.name, kind, reason, info.out_features, info.in_features))
    return tuple(planned)


def _why_float(linear: LinearInfo, rules: list[LinearRule]) -> str:
    return why_float(linear.name, rules) if linear.in_block else "outside the decoder blocks"
