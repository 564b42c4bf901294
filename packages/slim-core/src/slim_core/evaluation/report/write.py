"""The report of a run: ``report.json`` and a self-contained ``report.html``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

from slim_core.evaluation.report.data import AttentionRow, LinearRow, ReportData, collect, role
from slim_core.evaluation.report.expert_map import LEGEND, draw_map
from slim_core.evaluation.report.plots import MAX_LINES, draw_plots
from slim_core.processors.base import Assignment, AttentionAssignment
from slim_core.runners.plan import Plan
from slim_core.runners.run import RunResult
from slim_core.savers.side_files import FOLDER_MODE, write_json, write_text
from slim_core.sizes import human_size, human_time
from slim_core.smoothing.scales import SmoothingNote

__all__ = ["write_report"]

_WORST = 20
# More rows than this make a page that browsers struggle with; report.json has them all.
_LISTED = 5000


def write_report(folder: Path, plan: Plan, result: RunResult, *, title: str, debug: bool = False) -> None:
    """Write both files into a finished output folder.

    Args:
        title: names the model.
        debug: also write ``debug_info/debug_info.json`` with the statistics of every layer.

    Raises:
        OSError: a file cannot be written.
    """
    data = collect(folder, plan, result, title=title)
    write_json(folder / "report.json", data.as_json(), indent=2)
    if debug:
        (folder / "debug_info").mkdir(mode=FOLDER_MODE, exist_ok=True)
        write_json(folder / "debug_info" / "debug_info.json", _debug_info(data, plan), indent=2)
    write_text(folder / "report.html", _page(data))


def _page(data: ReportData) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment: Any = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["size"] = human_size
    environment.filters["number"] = _number
    environment.filters["decibel"] = _decibel
    environment.filters["clock"] = human_time
    template = files("slim_core.evaluation.report").joinpath("templates/report.html.j2").read_text("utf-8")
    plots = {name: Markup(svg) for name, svg in draw_plots(data).items()}
    return environment.from_string(template).render(
        data=data,
        plots=plots,
        worst=data.worst[:_WORST],
        listed=data.linears[:_LISTED],
        roles=_roles(data),
        attention_counts=Counter(row.becomes for row in data.attentions),
        smoothed=_smoothed(data),
        smoothing=[note for note in data.smoothing if note.skipped is None][:_LISTED],
        unsmoothed=_unsmoothed(data),
        expert_map=Markup(draw_map(data.experts)),
        expert_colors=LEGEND,
        starved=[(layer.name, expert) for layer in data.experts for expert in layer.starved][:_LISTED],
        all_starved=sum(len(layer.starved) for layer in data.experts),
        any_range=any(row.low is not None for row in data.linears),
        predictions=_predictions(data),
        max_lines=MAX_LINES,
        all_lines=len({row.leaf for row in data.worst}),
    )


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _decibel(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _predictions(data: ReportData) -> list[tuple[str, str, str, str]]:
    """What the plan said, what came of it, and the one over the other."""
    own = data.process_base_memory
    rows: list[tuple[str, float, float, Callable[[Any], str]]] = [
        ("output", data.predicted_bytes_out, data.bytes_out, human_size),
        ("memory of the process", own + data.predicted_peak_memory, own + data.peak_memory, human_size),
        ("memory of the run", data.predicted_peak_memory, data.peak_memory, human_size),
        ("disk", data.predicted_peak_disk, data.peak_disk, human_size),
    ]
    if data.predicted_seconds is not None:
        rows.append(("time", data.predicted_seconds, data.seconds, human_time))
    return [
        (what, told(predicted), told(measured), f"{predicted / measured:.2f}" if measured else "")
        for what, predicted, measured, told in rows
    ]


def _roles(data: ReportData) -> list[dict[str, Any]]:
    """One line for each role and type: how many linears, and how well they came through."""
    groups: dict[tuple[str, str], list[LinearRow]] = {}
    for row in data.linears:
        groups.setdefault((row.leaf, row.kind), []).append(row)
    lines: list[dict[str, Any]] = []
    for (leaf, kind), rows in groups.items():
        known = [row.sqnr_db for row in rows if row.sqnr_db is not None]
        lows, highs = [r.low for r in rows if r.low is not None], [r.high for r in rows if r.high is not None]
        lines.append(
            {
                "leaf": leaf,
                "kind": kind,
                "count": len(rows),
                "worst": min(known, default=None),
                "median": median(known) if known else None,
                "low": min(lows, default=None),
                "high": max(highs, default=None),
                "reason": rows[0].reason,
            }
        )
    return lines


_MEASURES = (
    *("alpha", "beta", "ratio", "act_spread_before", "act_spread_after"),
    *("weight_spread_before", "weight_spread_after", "error_before", "error_after"),
)


def _smoothed(data: ReportData) -> list[dict[str, Any]]:
    """One line for each processor and kind of source: how many subgraphs, and the middle of what was measured."""
    groups: dict[tuple[str, str], list[SmoothingNote]] = {}
    for note in data.smoothing:
        if note.skipped is None:
            groups.setdefault((note.position, role(note.source)), []).append(note)
    lines: list[dict[str, Any]] = []
    for (position, source), notes in groups.items():
        line: dict[str, Any] = {"position": position, "source": source, "type": notes[0].type, "count": len(notes)}
        for measure in _MEASURES:
            known = [value for note in notes if (value := getattr(note, measure)) is not None]
            line[measure] = median(known) if known else None
        line["scale_min"] = min((note.scale_min for note in notes if note.scale_min is not None), default=None)
        line["scale_max"] = max((note.scale_max for note in notes if note.scale_max is not None), default=None)
        lines.append(line)
    return lines


def _unsmoothed(data: ReportData) -> dict[str, list[str]]:
    """Why sources were skipped, and which."""
    reasons: dict[str, list[str]] = {}
    for note in data.smoothing:
        if note.skipped is not None:
            reasons.setdefault(note.skipped, []).append(note.source)
    return {reason: list(dict.fromkeys(sources)) for reason, sources in reasons.items()}


def _debug_info(data: ReportData, plan: Plan) -> dict[str, Any]:
    """Every layer with its statistics, and the configuration of the processor that made it."""
    schemes = {
        position: scheme.model_dump(mode="json")
        for processor in plan.processors
        for position, scheme in processor.schemes().items()
    }

    def told(row: LinearRow | AttentionRow, assignment: Assignment | AttentionAssignment | None) -> dict[str, Any]:
        position = assignment.position if assignment else None
        return {**asdict(row), "processor": position, "scheme": schemes[position] if position else None}

    layers = {row.name: told(row, plan.assignments.get(row.name)) for row in data.linears}
    attentions = {row.name: told(row, plan.attentions.get(row.name)) for row in data.attentions}
    units = [asdict(unit) for unit in data.units]
    return {"format": 1, "title": data.title, "layers": layers, "attentions": attentions, "units": units}
