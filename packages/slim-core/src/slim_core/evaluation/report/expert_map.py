"""The part of the report that is about experts: a map of where tokens went, drawn without any library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from slim_core.runners.records import ExpertRecord

__all__ = ["LEGEND", "draw_map"]

_WIDTH, _LABEL, _TOP = 960, 150, 16
# Upper bounds of a count over the mean of its layer, and how dark it is drawn.
_SHADES = ((0.25, 0.12), (0.5, 0.26), (1.0, 0.42), (2.0, 0.6), (4.0, 0.8), (float("inf"), 1.0))
_COLOR, _NONE, _FEW = "#3b82c4", "#d1495b", "#e08214"
LEGEND = (
    ("no token", _NONE, 1.0),
    ("below the quota", _FEW, 1.0),
    *(
        (text, _COLOR, shade)
        for text, (_, shade) in zip(("below 1/4", "1/4", "1/2", "1", "2", "4 and more"), _SHADES, strict=True)
    ),
)
"""What the colours mean: text, colour, opacity. The last six: the count over the mean of the layer, from this on."""


def draw_map(layers: Sequence[ExpertRecord]) -> str:
    """Inline SVG: a row for every layer, a column for every expert, by how many tokens were routed to it.

    Cells of one colour are one path, so that a map of many thousand experts stays small.
    """
    columns = max((len(layer.counts) for layer in layers), default=0)
    if not columns:
        return ""
    width = max(2.0, min(22.0, (_WIDTH - _LABEL) / columns))
    height = 10 if len(layers) > 12 else 16
    paths: dict[tuple[str, float], list[str]] = {}
    labels: list[str] = []
    for row, layer in enumerate(layers):
        top = _TOP + row * height
        labels.append(_text(_LABEL - 6, top + height - 2.5, _short(layer.name), "end"))
        for start, stop, color in _runs(_colors(layer)):
            # In units of cells, with a narrow gap between rows.
            paths.setdefault(color, []).append(f"M{start} {row}h{stop - start}v.9h{start - stop}z")
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128, 1 << 30) if step * width >= 28)
    labels += [_text(_LABEL + (i + 0.5) * width, 11, str(i), "middle") for i in range(0, columns, step)]
    cells = [
        f'<path fill="{color}" fill-opacity="{shade:g}" d="{"".join(parts)}"/>'
        for (color, shade), parts in sorted(paths.items())
    ]
    full = _LABEL + columns * width
    return (
        f'<svg role="img" aria-label="experts" viewBox="0 0 {full:g} {_TOP + len(layers) * height}" '
        f'style="max-width:{full:g}px" font-size="9" fill="var(--ink)">'
        f'<g transform="translate({_LABEL} {_TOP}) scale({width:g} {height})">{"".join(cells)}</g>'
        f"{''.join(labels)}</svg>"
    )


def _colors(layer: ExpertRecord) -> list[tuple[str, float]]:
    mean = sum(layer.counts) / len(layer.counts)
    few = {one.expert for one in layer.starved}
    return [_color(count, mean, number in few) for number, count in enumerate(layer.counts)]


def _color(count: int, mean: float, few: bool) -> tuple[str, float]:
    if not count:
        return _NONE, 1.0
    if few:
        return _FEW, 1.0
    return _COLOR, next(shade for bound, shade in _SHADES if count / mean < bound)


def _runs(colors: Sequence[tuple[str, float]]) -> list[tuple[int, int, tuple[str, float]]]:
    """Neighbours of one colour: from, to (not with it), colour."""
    runs: list[tuple[int, int, tuple[str, float]]] = []
    for i, color in enumerate(colors):
        if runs and runs[-1][2] == color:
            runs[-1] = runs[-1][0], i + 1, color
        else:
            runs.append((i, i + 1, color))
    return runs


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _short(name: str) -> str:
    """The end of a module name that tells layers apart, e.g. ``layers.3.mlp.experts``."""
    return name if len(name) <= 30 else f"…{name[-29:]}"
