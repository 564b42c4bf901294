"""The part of the plan that is about linears: what each becomes and why, and what engines will say to that."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from slim_core.errors import UnsupportedError
from slim_core.model.attention import AttentionInfo
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import LinearInfo, Unit
from slim_core.processors.base import Assignment, LinearRule, Processor
from slim_core.quantization.attention import AttentionForm
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.quantization.statistics import Need
from slim_core.runners.plan_rules import first_to_name, spellings, weight_rule, why_float
from slim_core.savers.base import Saver
from slim_core.savers.loaders import (
    engine_format,
    fuses,
    lost_biases,
    mixed_fusions,
    no_engine,
    reads_floats,
    unloadable,
)

__all__ = ["PlannedLinear", "assign_linears", "engine_refusal", "engine_warnings", "planned_linears"]

_NOT_RUN = "a drafting layer, not calibrated"


@dataclass(frozen=True)
class PlannedLinear:
    """A linear, what it becomes, and why."""

    name: str
    kind: LayerKind
    reason: str
    out_features: int
    in_features: int


def assign_linears(
    linears: list[LinearInfo], rules: list[LinearRule], training: Collection[str] = ()
) -> tuple[dict[str, Assignment], list[str]]:
    """The first rule that names a linear has it; later ones that name it too are worth a warning.

    Linears of drafting layers are never run. What would need to know their inputs does without, as it does for experts
    that no token reached, and a warning says so.

    Args:
        training: positions of rules whose linears learn while their block is run.
    """
    known = {linear.name: linear for linear in linears if linear.in_block}
    owners, warnings = first_to_name(rules, known.values(), "linears")
    assignments: dict[str, Assignment] = {}
    blind: dict[str, list[str]] = {}
    for name, rule in owners.items():
        info = known[name]
        form, reason, needs = rule.form, f"spec.{rule.position}", rule.needs
        if not info.runs:
            form, without = _unseen(rule, trained=rule.position in training)
            reason, needs = f"{reason}; {_NOT_RUN}" + (f": {without}" if without else ""), frozenset[Need]()
            if without:
                blind.setdefault(without, []).append(name)
        if form is not None:
            assignments[name] = Assignment(form.for_width(info.in_features), rule.position, reason, needs)
    if blind:
        texts = [f"{text} ({len(names)} linears, e.g. {names[0]})" for text, names in blind.items()]
        warnings.append(f"the model class does not run drafting layers, so they are not calibrated: {'; '.join(texts)}")
    # To exclude the head is pointless but no mistake.
    names = [name for linear in known.values() for name in spellings(linear)]
    every = [name for linear in linears for name in spellings(linear)]
    for rule in rules:
        warnings += [
            f"spec.{rule.position}.{side}: pattern {pattern!r} matches no linear of the decoder blocks"
            for side, known in (("include", names), ("exclude", every))
            for where, pattern in rule.filter.unmatched(known)
            if where == side
        ]
    return assignments, warnings


def engine_warnings(
    model: StreamedModel, assignments: Mapping[str, Assignment], saver: Saver, processors: Sequence[Processor] = ()
) -> list[str]:
    """What keeps the main engine of a format from loading what becomes of the linears, or makes it compute something
    else.
    """
    if (engine := saver.engine) is None:
        return []
    forms, widths, bare = _become(model, assignments), _widths(model), _without_bias(model)
    return [
        *(mixed_fusions(forms) if fuses(engine) else []),
        *unloadable(forms, widths, saver.labels, engine=engine, without_bias=bare),
        *_lost_shifts(model, assignments, engine),
        *_lost_floats(processors, engine),
    ]


def engine_refusal(
    model: StreamedModel,
    assignments: Mapping[str, Assignment],
    saver: Saver,
    attentions: Mapping[AttentionInfo, AttentionForm],
) -> UnsupportedError | None:
    """The error where there is no engine that could load the output; as :func:`engine_warnings`."""
    if saver.engine is None:
        return None
    text = no_engine(
        *(_become(model, assignments), _widths(model), saver.labels, attentions),
        format=engine_format(saver.engine),
        without_bias=_without_bias(model),
    )
    if text is None:
        return None
    return UnsupportedError(
        f"no engine can load what this recipe makes of the model ({text})",
        where="spec.process",
        remedy="see docs/verify.md for what each loads, or write it all the same with --force",
    )


def _become(model: StreamedModel, assignments: Mapping[str, Assignment]) -> dict[str, LayerForm | LayerKind]:
    names = [info.name for unit in model.units for info in unit.linears]
    return {name: assignments[name].form if name in assignments else LayerKind.FLOAT for name in names}


def _widths(model: StreamedModel) -> dict[str, int]:
    return {info.name: info.in_features for unit in model.units for info in unit.linears}


def _without_bias(model: StreamedModel) -> set[str]:
    """The linears that have none; one that a shift has given is no bias of the engine's model."""
    return {
        info.name
        for unit in model.units
        for info in unit.linears
        if not info.has_bias or f"{info.name}.bias" in unit.added
    }


def _lost_floats(processors: Sequence[Processor], engine: str) -> list[str]:
    """A warning where the engine takes what stays in floating point from the original, but a processor changes it."""
    if reads_floats(engine):
        return []
    return [
        f"{processor.position}: {engine} takes all tensors that are not quantized from the original model, so what "
        f"{processor.config.type} changes of them (norms, linears that stay FLOAT) is lost, and the results are wrong"
        for processor in processors
        if processor.changes_floats
    ]


def _lost_shifts(model: StreamedModel, assignments: Mapping[str, Assignment], engine: str) -> list[str]:
    """A warning for linears behind a shifted norm from which the engine takes the bias away again."""
    given = {
        info.name: assignments[info.name].kind if info.name in assignments else LayerKind.FLOAT
        for unit in model.units
        for info in unit.linears
        if f"{info.name}.bias" in unit.added
    }
    return [
        f"the shift (symmetric: false) gives a bias to {len(names)} {kind} linears whose class has none, e.g. "
        f"{names[0]}; {engine} drops it, and the results are wrong. Quantize them to static W8A8, exclude the "
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
    if not linear.in_block:
        return "outside the decoder blocks"
    names = spellings(linear)
    owner = None if linear.runs else next((rule for rule in rules if rule.filter.matches(*names)), None)
    if owner is None:
        return why_float(linear, rules)
    return f"spec.{owner.position}; {_NOT_RUN}: {_unseen(owner, trained=False)[1]}"


def _unseen(rule: LinearRule, *, trained: bool) -> tuple[LayerForm | None, str]:
    """What a rule makes of a linear that is never run, and what it has to do without; None: it stays as it is."""
    kind = rule.form.kind
    form = rule.unseen if kind.has_static_input else rule.form
    if form is None:
        return None, f"FLOAT instead of {kind}, which needs the range of the input"
    parts = [f"{form.kind} instead of {kind}"] if form.kind is not kind else []
    return form, ", ".join(filter(None, [*parts, weight_rule(form.kind, rule.needs, trained=trained)]))
