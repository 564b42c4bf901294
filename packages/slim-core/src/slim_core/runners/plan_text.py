"""A plan as plain text: a summary, then what every linear becomes and why, with equal blocks told once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from slim_core.memory import resident_memory
from slim_core.quantization.kinds import LayerKind
from slim_core.runners.disk import disk_need
from slim_core.runners.plan import Plan, PlannedUnit
from slim_core.runners.plan_attention import FLOAT, PlannedAttention
from slim_core.runners.plan_linears import PlannedLinear
from slim_core.sizes import human_size

__all__ = ["likeness", "render_plan", "render_summary"]

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def render_summary(plan: Plan) -> str:
    """How many linears become what, which runner does it and why, size, memory, warnings."""
    quantized = [f"{count} {kind}" for kind, count in plan.counts().items() if kind != LayerKind.FLOAT]
    rows = [
        ("linears", ", ".join([*quantized, f"{plan.counts().get(LayerKind.FLOAT, 0)} stay FLOAT"])),
        *_attentions(plan),
        *(("model", text) for processor in plan.processors if (text := processor.summary())),
        *_stages(plan),
        ("runner", f"{plan.runner.name}: {plan.runner.reason}"),
        ("device", _device(plan)),
        ("data", _data(plan)),
        *([("experts", text)] if (text := plan.experts.summary()) else []),
        ("output", _output(plan)),
        ("disk", _disk(plan)),
        ("memory", plan.memory.summary(resident_memory()) + (", for each rank" if plan.runner.ranks > 1 else "")),
        *([("time", plan.time.summary())] if plan.time is not None else []),
    ]
    lines = [f"Plan of {plan.part}" if plan.part else "Plan", *(f"  {name:<10} {value}" for name, value in rows)]
    if plan.warnings:
        lines += [f"  {'warnings':<10} {len(plan.warnings)}", *(f"    - {warning}" for warning in plan.warnings)]
    return "\n".join(lines)


def _attentions(plan: Plan) -> list[tuple[str, str]]:
    counts = plan.attention_counts()
    if not counts:
        return []
    quantized = [f"{count} {becomes}" for becomes, count in counts.items() if becomes != FLOAT]
    return [("attentions", ", ".join([*quantized, f"{counts.get(FLOAT, 0)} stay FLOAT"]))]


def _stages(plan: Plan) -> list[tuple[str, str]]:
    """What is carried out ahead of the main stage."""
    return [
        (stage.position, f"{processor.summary()}; one forward of each block for every sample of {stage.dataset.path}")
        for stage in plan.stages
        for processor in stage.processors
    ]


def _device(plan: Plan) -> str:
    ranks = plan.runner.ranks
    return f"{plan.devices}, {ranks} ranks" if ranks > 1 else str(plan.devices)


def _data(plan: Plan) -> str:
    if not plan.needs_data:
        return "no calibration data needed" + (" beyond the stages ahead" if plan.stages else "")
    times = "one forward" if plan.forwards == 1 else f"{plan.forwards} forwards"
    return f"{times} of each block for every sample, {human_size(plan.activation_bytes)} of activations"


def _output(plan: Plan) -> str:
    files = len(plan.output.shards)
    share = f" ({plan.bytes_out / plan.bytes_in:.0%})" if plan.bytes_in else ""
    return f"{human_size(plan.bytes_in)} -> {human_size(plan.bytes_out)}{share} in {files} file{'s' * (files > 1)}"


def _disk(plan: Plan) -> str:
    need = disk_need(plan)
    kept = f", {human_size(need.kept)} of it for --resume if there is room" if need.kept else ""
    return f"about {human_size(need.total)} while it runs{kept}"


def render_plan(plan: Plan) -> str:
    """The summary, and below it unit by unit what each linear becomes and why.

    Units that differ only in their number and treat their linears alike are told once, and so are such linears within
    a unit (experts).
    """
    groups: dict[object, list[PlannedUnit]] = {}
    for unit in plan.units:
        groups.setdefault(likeness(unit), []).append(unit)
    listings = [(units, [*_linear_rows(units[0]), *_attention_rows(units[0])]) for units in groups.values()]
    columns = [column for _, rows in listings for column in zip(*(row.cells for row in rows), strict=True)]
    widths = [max((len(cell) for column in columns[i::3] for cell in column), default=0) for i in range(3)]
    lines = [render_summary(plan)]
    for units, rows in listings:
        lines += ["", f"{_name_of(units)}: {_sizes_of(units)}"]
        for row in rows:
            cells = "  ".join(cell.ljust(width) for cell, width in zip(row.cells, widths, strict=True))
            lines.append(f"  {cells}  {row.reason}")
    return "\n".join(lines)


def likeness(unit: PlannedUnit) -> object:
    """Equal for units that are told together."""
    linears = tuple(
        (linear.name.removeprefix(f"{unit.name}."), linear.kind, linear.reason, linear.out_features, linear.in_features)
        for linear in unit.linears
    )
    attentions = tuple((row.cells, row.reason) for row in _attention_rows(unit))
    return _with_last_number(unit.name, "*"), linears, attentions, unit.bytes_in, unit.bytes_out


def _name_of(units: Sequence[PlannedUnit]) -> str:
    if len(units) == 1:
        return units[0].name
    return f"{_ranged([unit.name for unit in units])} ({len(units)} units)"


def _sizes_of(units: Sequence[PlannedUnit]) -> str:
    first = units[0]
    each = " each" if len(units) > 1 else ""
    what = "" if first.linears else ", no linear"
    return f"{human_size(first.bytes_in)} -> {human_size(first.bytes_out)}{each}{what}"


@dataclass(frozen=True)
class _Row:
    cells: tuple[str, str, str]
    reason: str


def _linear_rows(unit: PlannedUnit) -> list[_Row]:
    groups: dict[object, list[PlannedLinear]] = {}
    for linear in unit.linears:
        inner = linear.name.removeprefix(f"{unit.name}.")
        alike = (_with_last_number(inner, "*"), linear.kind, linear.reason, linear.out_features, linear.in_features)
        groups.setdefault(alike, []).append(linear)
    rows: list[_Row] = []
    for linears in groups.values():
        first = linears[0]
        name = first.name.removeprefix(f"{unit.name}.")
        if len(linears) > 1:
            inner = [linear.name.removeprefix(f"{unit.name}.") for linear in linears]
            name = f"{_ranged(inner)} ({len(linears)} linears)"
        rows.append(_Row((name, f"{first.out_features} x {first.in_features}", str(first.kind)), first.reason))
    return rows


def _attention_rows(unit: PlannedUnit) -> list[_Row]:
    return [
        _Row((attention.name.removeprefix(f"{unit.name}."), _heads(attention), attention.becomes), attention.reason)
        for attention in unit.attentions
    ]


def _heads(attention: PlannedAttention) -> str:
    """Heads of the query, heads of key and value, and channels of a head, e.g. ``32:8 x 128``."""
    info = attention.info
    dims = f"{info.key_dim}" if info.key_dim == info.value_dim else f"{info.key_dim}/{info.value_dim}"
    return f"{info.heads}:{info.kv_heads} x {dims}"


def _ranged(names: Sequence[str]) -> str:
    """Names that differ in their last number as one, e.g. ``model.layers.0-3,5``."""
    ranges: list[list[int]] = []
    for number in sorted({int(_NUMBER.findall(name)[-1]) for name in names}):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return _with_last_number(names[0], ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges))


def _with_last_number(name: str, text: str) -> str:
    found = list(_NUMBER.finditer(name))
    return f"{name[: found[-1].start()]}{text}{name[found[-1].end() :]}" if found else name
