"""Scales that move outliers from activations into weights, and the edits that carry them out exactly.

``A_j`` is a statistic of input channel ``j``, ``B_j`` the largest ``|W[:, j]|`` over everything that reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from slim_core.model.inputs import mul_scale_of
from slim_core.model.subgraphs import Subgraph
from slim_core.model.weights import Edit, UnitWeights
from slim_core.quantization.row_blocks import rows_per_block
from slim_core.quantization.statistics import ChannelStatistics
from slim_core.quantization.weights import RowSource

__all__ = ["FLOOR", "Choice", "Smoothing", "SmoothingNote", "blocks_of", "column_maxima", "edits_of", "note_of"]
__all__ += ["power_scale", "spread_of"]

FLOOR = 1e-5
_LARGEST = 2.0**20
_FLOAT16 = (2.0**-14, 2.0**15)  # normal numbers


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
    for rows in (rows for weight in weights for rows in blocks_of(weight)):
        here = rows.abs().amax(0).float()
        largest = here if largest is None else torch.maximum(largest, here)
    assert largest is not None
    return largest


def blocks_of(weight: RowSource) -> Iterator[Tensor]:
    """All rows of a matrix, a few at a time."""
    step = rows_per_block(weight.shape[1], None)
    for start in range(0, weight.shape[0], step):
        yield weight.rows(start, min(start + step, weight.shape[0]))


@dataclass(frozen=True, eq=False)
class Choice:
    """Why a scale is what it is; None is what had no part in it.

    Args:
        alpha, beta: exponents of the activations and of the weights.
        ratio: the exponent of AWQ.
        before, after: the error that a search found without smoothing and with its choice.
        weight: ``B``, float32 ``(in,)``, as it was measured.
    """

    alpha: float | None = None
    beta: float | None = None
    ratio: float | None = None
    before: float | None = None
    after: float | None = None
    weight: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Smoothing:
    """What is done to a subgraph: targets see ``(x - shift) / scale``.

    Args:
        scale: float32 ``(scales,)``, one per shared channel.
        shift: float32 ``(in,)`` or None; only for norms.
        choice: for the report.
    """

    graph: Subgraph
    scale: Tensor
    shift: Tensor | None = None
    choice: Choice = field(default_factory=Choice)

    @property
    def changes(self) -> bool:
        """Whether it does anything."""
        return self.shift is not None or bool((self.scale != 1).any())

    @property
    def columns(self) -> Tensor:
        """The scale of every input column of the targets, float32 ``(in,)``."""
        return self.graph.spread(self.scale)


def edits_of(smoothing: Smoothing, weights: UnitWeights) -> tuple[Smoothing, list[Edit]]:
    """The edits that carry a smoothing out without changing what the block computes.

    The weight and bias of a norm are rounded to the dtype of the weight here and now, as engines keep them, and the
    targets are changed by what was really done to it, so nothing is lost to rounding. The same goes for what the input
    of a subgraph without a source is multiplied by.

    Returns:
        The smoothing as it comes out (with the scale and shift really used) and its edits.
    """
    graph = smoothing.graph
    edits: list[Edit] = []
    if not graph.source:
        smoothing, edits = _input_edits(smoothing, weights)
    elif graph.rows is None:
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
    bias, shift = f"{name}.bias", smoothing.shift
    value = weights[bias].load().float() if bias in weights else torch.zeros_like(scale)
    if shift is not None:
        kept = ((value - shift) / scale).to(view.dtype).float()
        kept = torch.where(torch.isfinite(kept), kept, value / scale)
        edits.append(Edit(bias, value=kept))
        shift = value - kept * scale
    elif bias in weights:
        edits.append(Edit(bias, value=value / scale))
    return replace(smoothing, scale=scale, shift=shift), edits


def _input_edits(smoothing: Smoothing, weights: UnitWeights) -> tuple[Smoothing, list[Edit]]:
    """What the input of all targets is multiplied by, ``1 / scale``, on top of what it is multiplied by already.

    It is rounded to bfloat16 whatever the dtype of the weights: engines bring it into the dtype that they run in, and
    so it comes out the same in each. Only float16 does not reach as far; there it is rounded to float16.
    """
    graph = smoothing.graph
    names = [mul_scale_of(target) for target in graph.targets]
    before = weights[names[0]].load() if names[0] in weights else torch.ones(len(graph.columns))
    narrow = any(weights[f"{target}.weight"].dtype == torch.float16 for target in graph.targets)
    wanted = before / smoothing.columns
    factor = wanted.clamp(*_FLOAT16).half().float() if narrow else wanted.bfloat16().float()
    edits = [Edit(name, value=factor) for name in names]
    return replace(smoothing, scale=before / factor), edits


def _bias_edit(target: str, shift: Tensor, weights: UnitWeights) -> Edit:
    """``bias + W shift``, with the weight as it is before it is rescaled."""
    view = weights[f"{target}.weight"]
    gain = torch.cat([(rows.double() @ shift.double()).float() for rows in blocks_of(view)])
    name = f"{target}.bias"
    return Edit(name, value=weights[name].load().float() + gain if name in weights else gain)


@dataclass(frozen=True)
class SmoothingNote:
    """What was done to a subgraph, for the report. None is what is not known.

    Args:
        position: the processor, by its place in the recipe.
        type, source, targets: the subgraph; ``non-fusion`` is called by its first target.
        tokens: how many tokens its scale was made from.
        alpha, beta, ratio, error_before, error_after: as in :class:`Choice`.
        scale_min, scale_max: of the scale that was carried out.
        act_spread_before, act_spread_after: how unlike the channels of the input are: the standard deviation over
            channels of ``log2`` of their largest absolute values.
        weight_spread_before, weight_spread_after: the same of the columns of the weights.
        shifted: whether channels were centred.
        skipped: why nothing was done; None if something was.
    """

    position: str
    type: str
    source: str
    targets: tuple[str, ...]
    tokens: int
    alpha: float | None = None
    beta: float | None = None
    ratio: float | None = None
    scale_min: float | None = None
    scale_max: float | None = None
    act_spread_before: float | None = None
    act_spread_after: float | None = None
    weight_spread_before: float | None = None
    weight_spread_after: float | None = None
    error_before: float | None = None
    error_after: float | None = None
    shifted: bool = False
    skipped: str | None = None

    @classmethod
    def recalled(cls, note: Mapping[str, Any]) -> SmoothingNote:
        """A note from its JSON form."""
        fields: dict[str, Any] = {**note, "targets": tuple(note["targets"])}
        return cls(**fields)


def note_of(done: Smoothing, channels: ChannelStatistics, position: str) -> SmoothingNote:
    """The note of a smoothing.

    Args:
        channels: what was known of the input before it.
        position: the processor.
    """
    columns, choice = done.columns.cpu(), done.choice
    before, after = channels.absmax(), channels.rescaled(columns, done.shift).absmax()
    weight = choice.weight
    return SmoothingNote(
        position,
        done.graph.label,
        done.graph.name,
        done.graph.targets,
        channels.tokens,
        choice.alpha,
        choice.beta,
        choice.ratio,
        float(done.scale.min()),
        float(done.scale.max()),
        spread_of(before),
        spread_of(after),
        spread_of(weight),
        None if weight is None else spread_of(weight.cpu() * columns),
        choice.before,
        choice.after,
        done.shift is not None,
    )


def spread_of(maxima: Tensor | None) -> float | None:
    """How unlike channels are: the standard deviation of ``log2`` of their maxima; None if all are zero or unknown."""
    if maxima is None:
        return None
    alive = maxima[maxima > 0].double().log2()
    return float(alive.std(correction=0)) if len(alive) else None
