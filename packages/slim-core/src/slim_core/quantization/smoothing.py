"""Scales that move outliers from activations into weights, and the edits that carry them out exactly.

``A_j`` is a statistic of input channel ``j``, ``B_j`` the largest ``|W[:, j]|`` over everything that reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slim_core.model.subgraphs import Subgraph
from slim_core.model.weights import Edit, UnitWeights
from slim_core.quantization.weights import RowSource

__all__ = ["FLOOR", "Smoothing", "column_maxima", "edits_of", "power_scale"]

FLOOR = 1e-5
_LARGEST = 2.0**20
_BLOCK_ELEMENTS = 1 << 20


def power_scale(act: Tensor, weight: Tensor, alpha: float, beta: float, floor: float = FLOOR) -> Tensor:
    """``s_j = max(A_j^alpha / B_j^beta, floor)``, float32.

    SmoothQuant (arXiv 2211.10438) has ``beta = 1 - alpha``. A channel that is always zero, or that nothing reads, is
    left alone (1): it has no outliers to move. Scales stay within ``2^-20`` and ``2^20``.

    Args:
        act, weight: ``A`` and ``B``, non-negative, of one shape.
    """
    a, b = act.double(), weight.double()
    scale = a.clamp(min=1e-30) ** alpha / b.clamp(min=1e-30) ** beta
    scale = scale.clamp(max(floor, 1 / _LARGEST), _LARGEST)
    return torch.where((a > 0) & (b > 0), scale, torch.ones_like(scale)).float()


def column_maxima(weights: Iterable[RowSource]) -> Tensor:
    """The largest ``|W[:, j]|`` over several matrices with the same columns, float32 ``(in,)``."""
    largest: Tensor | None = None
    for weight in weights:
        step = max(1, _BLOCK_ELEMENTS // max(weight.shape[1], 1))
        for start in range(0, weight.shape[0], step):
            rows = weight.rows(start, min(start + step, weight.shape[0]))
            here = rows.abs().amax(0).float()
            largest = here if largest is None else torch.maximum(largest, here)
    assert largest is not None
    return largest


@dataclass(frozen=True, eq=False)
class Smoothing:
    """What is done to a subgraph: targets see ``(x - shift) / scale``.

    Args:
        scale: float32 ``(scales,)``, one per shared channel.
        shift: float32 ``(in,)`` or None; only for norms.
    """

    graph: Subgraph
    scale: Tensor
    shift: Tensor | None = None

    @property
    def columns(self) -> Tensor:
        """The scale of every input column of the targets, float32 ``(in,)``."""
        return self.graph.spread(self.scale)


def edits_of(smoothing: Smoothing, weights: UnitWeights) -> tuple[Smoothing, list[Edit]]:
    """The edits that carry a smoothing out without changing what the block computes.

    The weight of a norm is rounded to its dtype here and now, and the targets are multiplied by what it was really
    divided by, so nothing is lost to rounding.

    Returns:
        The smoothing as it comes out (with the scale really used) and its edits.
    """
    graph = smoothing.graph
    edits: list[Edit] = []
    if graph.rows is None:
        smoothing, norm_edits = _norm_edits(smoothing, weights)
        edits += norm_edits
    else:
        factor = torch.ones(weights[f"{graph.source}.weight"].shape[0])
        factor[graph.rows] = 1 / smoothing.scale
        edits.append(Edit(f"{graph.source}.weight", rows=factor))
        if f"{graph.source}.bias" in weights:
            edits.append(Edit(f"{graph.source}.bias", rows=factor))
    for target in graph.targets:
        if smoothing.shift is not None:
            edits.append(_bias_edit(target, smoothing.shift, weights))
        edits.append(Edit(f"{target}.weight", columns=smoothing.columns))
    return smoothing, edits


def _norm_edits(smoothing: Smoothing, weights: UnitWeights) -> tuple[Smoothing, list[Edit]]:
    name, one = smoothing.graph.source, float(smoothing.graph.plus_one)
    view = weights[f"{name}.weight"]
    before = view.load().float() + one
    rounded = (before / smoothing.scale - one).to(view.dtype).float()
    after = rounded + one
    usable = torch.isfinite(after) & (after != 0) & (before != 0)
    scale = torch.where(usable, before / after, torch.ones_like(before))
    edits = [Edit(f"{name}.weight", value=torch.where(usable, rounded, before - one))]
    bias = f"{name}.bias"
    if bias in weights:
        value = weights[bias].load().float()
        edits.append(Edit(bias, value=(value if smoothing.shift is None else value - smoothing.shift) / scale))
    elif smoothing.shift is not None:
        edits.append(Edit(bias, value=-smoothing.shift / scale))
    return replace(smoothing, scale=scale), edits


def _bias_edit(target: str, shift: Tensor, weights: UnitWeights) -> Edit:
    """``bias + W shift``, with the weight as it is before it is rescaled."""
    view = weights[f"{target}.weight"]
    gain = torch.empty(view.shape[0])
    step = max(1, _BLOCK_ELEMENTS // max(view.shape[1], 1))
    for start in range(0, view.shape[0], step):
        stop = min(start + step, view.shape[0])
        gain[start:stop] = (view.rows(start, stop).double() @ shift.double()).float()
    name = f"{target}.bias"
    return Edit(name, value=weights[name].load().float() + gain if name in weights else gain)
