"""The plots of the report, as SVG for inlining into the page.

Text and lines that should follow the page's colours are drawn in stand-in colours and then turned into references to
its CSS variables, so that one page serves light and dark screens. Nothing here touches matplotlib's global state
beyond the time of drawing.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from slim_core.evaluation.report.data import LinearRow, ReportData, UnitRow
from slim_core.phases import Phase

__all__ = ["MAX_LINES", "draw_plots"]

_INK, _GRID = "#010203", "#040506"
_VARIABLES = {_INK: "var(--ink)", _GRID: "var(--grid)"}
_COLORS = ("#3b82c4", "#e08214", "#2a9d6f", "#d1495b", "#8e6bbf", "#a5714d", "#20a4b8", "#d671a8")
_MARKERS = "osD^vP*X"
MAX_LINES = 8
_MAX_PANELS = 8
_STYLE: dict[str, Any] = {
    "font.size": 8,
    "svg.fonttype": "none",
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
}
_Series = Mapping[int, float]


def draw_plots(data: ReportData) -> dict[str, str]:
    """Inline SVG by name: ``sqnr``, ``ranges``, ``sizes``, ``costs``; none at all where matplotlib is not installed.

    A plot that would be empty is left out.
    """
    if find_spec("matplotlib") is None:
        return {}
    # Imported here because it takes a third of a second, and as Any because its own types are partly unknown.
    matplotlib: Any = import_module("matplotlib")
    new_figure: Any = import_module("matplotlib.figure").Figure
    new_canvas: Any = import_module("matplotlib.backends.backend_svg").FigureCanvasSVG
    plots: dict[str, Callable[[Any, ReportData], bool]] = {
        "sqnr": _sqnr,
        "ranges": _ranges,
        "sizes": _sizes,
        "costs": _costs,
    }
    drawn: dict[str, str] = {}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        for name, draw in plots.items():
            matplotlib.rcParams.update(_STYLE | {"svg.hashsalt": f"slim-{name}"})
            figure = new_figure(figsize=(8.4, 2.7), layout="constrained")
            canvas = new_canvas(figure)
            if draw(figure, data):
                stream = io.StringIO()
                canvas.print_svg(stream, metadata={"Date": None})
                drawn[name] = _inline(stream.getvalue(), name)
    return drawn


def _inline(svg: str, name: str) -> str:
    """The bare ``<svg>`` element: no prolog, metadata or namespaces, ids only where something refers to them."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda match: match[0] if match[1] in used else "", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{name}"', 1)


def _by_leaf(rows: Iterable[LinearRow], value: Callable[[LinearRow], float | None], pick: Any) -> dict[str, _Series]:
    """For every leaf name the value at each block; ``pick`` chooses where a block has several linears of that name."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if (number := value(row)) is not None:
            series = found.setdefault(row.leaf, {})
            series[row.position] = pick(series[row.position], number) if row.position in series else number
    return dict(found)


def _block_numbers(data: ReportData) -> dict[int, int]:
    """Place of a unit among all to its place among the blocks, which is how people count layers."""
    blocks = [position for position, unit in enumerate(data.units) if unit.kind in ("block", "draft")]
    return {position: number for number, position in enumerate(blocks)}


def _integer_ticks(axes: Any, most: int) -> None:
    axes.locator_params(axis="x", integer=True, nbins=most, min_n_ticks=1)


def _sqnr(figure: Any, data: ReportData) -> bool:
    lines = _by_leaf(data.linears, lambda row: row.sqnr_db, min)
    shown = sorted(lines, key=lambda leaf: min(lines[leaf].values()))[:MAX_LINES]
    if not shown:
        return False
    numbers = _block_numbers(data)
    axes = figure.add_subplot()
    for i, leaf in enumerate(leaf for leaf in lines if leaf in shown):
        points = {numbers.get(position, -1): value for position, value in lines[leaf].items()}
        size = 3.5 if len(points) <= 24 else 2
        axes.plot(
            *(list(points), list(points.values())),
            color=_COLORS[i],
            marker=_MARKERS[i],
            markersize=size,
            linewidth=0.9,
            label=leaf,
        )
    axes.set_xlabel("block")
    axes.set_ylabel("weight SQNR (dB)")
    axes.margins(x=0.02, y=0.08)
    _integer_ticks(axes, 14)
    figure.legend(loc="outside right upper")
    return True


def _ranges(figure: Any, data: ReportData) -> bool:
    lows = _by_leaf(data.linears, lambda row: row.low, min)
    highs = _by_leaf(data.linears, lambda row: row.high, max)
    groups: dict[tuple[tuple[int, float, float], ...], list[str]] = {}
    for leaf, series in lows.items():
        bars = tuple((position, low, highs[leaf][position]) for position, low in series.items())
        groups.setdefault(bars, []).append(leaf)
    if not groups:
        return False
    numbers = _block_numbers(data)
    widest = sorted(groups, key=lambda bars: min(low - high for _, low, high in bars))[:_MAX_PANELS]
    shown = [bars for bars in groups if bars in widest]
    columns = min(len(shown), 4)
    rows = -(-len(shown) // columns)
    figure.set_size_inches(8.4, 2.3 * rows)
    for i, bars in enumerate(shown):
        axes = figure.add_subplot(rows, columns, i + 1)
        places = [numbers.get(position, -1) for position, _, _ in bars]
        width = max(1.0, min(6.0, 220 / len(places) / columns))
        axes.vlines(places, [low for _, low, _ in bars], [high for _, _, high in bars], colors=_COLORS[0], lw=width)
        axes.axhline(0, color=_INK, linewidth=0.6)
        axes.set_title(_joined(groups[bars]))
        axes.set_xlim(min(places) - 0.7, max(places) + 0.7)
        _integer_ticks(axes, 24 // columns)
        if i >= len(shown) - columns:
            axes.set_xlabel("block")
        if i % columns == 0:
            axes.set_ylabel("input values")
    return True


def _joined(leaves: Sequence[str]) -> str:
    """``q, k, v_proj`` for names that end alike."""
    endings = {leaf.rpartition("_")[2] for leaf in leaves}
    if len(endings) > 1 or any("_" not in leaf for leaf in leaves):
        return ", ".join(leaves)
    heads = [leaf.rpartition("_")[0] for leaf in leaves]
    return f"{', '.join(heads)}_{endings.pop()}"


_KIND_NAMES = {
    "prologue": "before the blocks",
    "block": "blocks",
    "epilogue": "after the blocks",
    "draft": "drafting layers",
    "extra": "other",
}


def _sizes(figure: Any, data: ReportData) -> bool:
    figure.set_size_inches(8.4, 1.5)
    largest = max(sum(u.bytes_in for u in data.units), sum(u.bytes_out for u in data.units), 1)
    factor, unit = (1 << 30, "GiB") if largest >= 1 << 30 else (1 << 20, "MiB")
    axes = figure.add_subplot()
    left = [0.0, 0.0]
    for color, (kind, label) in zip(_COLORS, _KIND_NAMES.items(), strict=False):
        members: list[UnitRow] = [row for row in data.units if row.kind == kind]
        sizes = [sum(row.bytes_in for row in members) / factor, sum(row.bytes_out for row in members) / factor]
        if any(sizes):
            axes.barh(["before", "after"], sizes, left=left, height=0.62, color=color, label=label)
            left = [start + size for start, size in zip(left, sizes, strict=True)]
    for place, total in enumerate(left):
        axes.annotate(f"{total:.3g}", (total, place), (4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.08)
    figure.legend(loc="outside right upper")
    return True


def _costs(figure: Any, data: ReportData) -> bool:
    measured = [(i, unit) for i, unit in enumerate(data.units) if unit.seconds is not None]
    if not measured:
        return False
    places = [i for i, _ in measured]
    names = [_short(unit.name) for _, unit in measured]
    time_axes, memory_axes = figure.subplots(1, 2)
    _stack_phases(figure, time_axes, measured)
    time_axes.set_ylabel("seconds")
    memory = [(unit.resident_bytes or 0) / (1 << 20) for _, unit in measured]
    memory_axes.plot(
        places, memory, color=_COLORS[1], linewidth=1.2, marker="o", markersize=3 if len(places) < 49 else 1.5
    )
    memory_axes.set_ylabel("resident memory (MiB)")
    memory_axes.set_ylim(0, max(memory) * 1.08 or 1)
    step = -(-len(places) // 12)
    for axes in (time_axes, memory_axes):
        ends = [i for i in range(len(places)) if i % step == 0 or names[i].isalpha()]
        axes.set_xticks([places[i] for i in ends], [names[i] for i in ends])
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("unit")
    return True


def _stack_phases(figure: Any, axes: Any, measured: Sequence[tuple[int, UnitRow]]) -> None:
    """Seconds of each unit, by what was done; what took next to nothing of all is part of the rest."""
    places = [i for i, _ in measured]
    spent: Counter[str] = Counter()
    for _, unit in measured:
        spent.update(unit.phases)
    shown = [phase for phase, seconds in spent.most_common() if seconds >= 0.01 * spent.total() and phase != Phase.REST]
    bottom = [0.0] * len(measured)
    for phase, color in zip(shown, _COLORS, strict=False):
        heights = [unit.phases.get(phase, 0.0) for _, unit in measured]
        axes.bar(places, heights, bottom=bottom, color=color, width=0.8, label=phase)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    rest = [max(0.0, (unit.seconds or 0.0) - low) for (_, unit), low in zip(measured, bottom, strict=True)]
    axes.bar(places, rest, bottom=bottom, color=_GRID, width=0.8, label=str(Phase.REST))
    if shown:
        figure.legend(loc="outside upper left", ncols=len(shown) + 1)


def _short(unit: str) -> str:
    last = unit.rpartition(".")[2]
    return {"prologue": "pre", "epilogue": "post"}.get(last, last)
