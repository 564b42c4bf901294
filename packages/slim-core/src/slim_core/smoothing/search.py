"""The search for the scale that moves outliers, by what quantization would do to the outputs of a subgraph.

Candidates are judged on a sample of the input tokens and of the output channels, all candidates on the same: what is
compared is the error ``X W^T -> Q(X / s) Q(W s)^T``, not estimated from moments. Nothing is run but these products, so
a search costs what a matrix product with some ten thousand tokens costs, and takes no forward of the block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slim_core.errors import InvalidModelError
from slim_core.quantization.affine import EPSILON
from slim_core.quantization.row_blocks import scratch
from slim_core.quantization.statistics.tokens import TokenSample
from slim_core.quantization.weights import RowSource
from slim_core.smoothing.scales import blocks_of, power_scale

__all__ = ["GRID", "Evidence", "Exponents", "Objective", "Quantizer", "WeightSample", "awq_scales", "exact"]
__all__ += ["exponent_scale", "ratio_grid", "search_alpha", "search_exponents", "search_ratio", "symmetric_rows"]
__all__ += ["working_bytes"]

_linalg: Any = torch.linalg  # its members have no types

GRID = tuple(round(0.05 * i, 2) for i in range(21))
"""The exponents that are tried: 0, 0.05, ..., 1."""

TOKENS = 256
ROWS = 128
_CANDIDATE_BYTES = 1 << 22
_DEVICE_BYTES = 1 << 30
_POINTS_AT_ONCE = 64
_AWQ_FLOOR = 1e-4

Quantizer = Callable[[Tensor, Tensor], Tensor]
"""What quantization leaves of float32 rows ``(candidates, rows, in)``, given the scales ``(candidates, in)``."""


@dataclass(frozen=True, eq=False)
class WeightSample:
    """What a search must know of the matrices that read an input.

    Args:
        maxima: the largest ``|W[:, j]|`` over all rows, float32 ``(in,)``.
        rows: some rows of all of them, float32 ``(rows, in)``.
    """

    maxima: Tensor
    rows: Tensor

    @classmethod
    def of(cls, weights: Sequence[tuple[str, RowSource]], limit: int = ROWS) -> WeightSample:
        """Maxima over all rows, and a sample of rows spread evenly over their sizes, the smallest and largest among it.

        Each matrix is read once, a few rows at a time; the rows of the sample are then read again.

        Args:
            weights: names, for errors, and matrices with the same columns.
            limit: rows in the sample, at most.

        Raises:
            InvalidModelError: a weight holds NaN or infinity.
        """
        maxima: Tensor | None = None
        sizes: list[Tensor] = []
        for name, weight in weights:
            for rows in blocks_of(weight):
                magnitudes = rows.abs()
                largest = magnitudes.amax(0).float()
                if not bool(torch.isfinite(largest).all()):
                    raise InvalidModelError("the weight holds NaN or infinity", where=name, remedy="repair it")
                maxima = largest if maxima is None else torch.maximum(maxima, largest)
                sizes.append(magnitudes.amax(1).float())
        assert maxima is not None
        chosen = _spread(torch.cat(sizes), limit)
        return cls(maxima, _picked([weight for _, weight in weights], chosen))


def _spread(sizes: Tensor, limit: int) -> list[int]:
    """The indices of at most ``limit`` values, evenly spread over their order by size."""
    if len(sizes) <= limit:
        return list(range(len(sizes)))
    places = torch.linspace(0, len(sizes) - 1, limit, dtype=torch.float64).round().long()
    chosen = sizes.argsort(stable=True)[places]
    return sorted(int(index) for index in chosen)


def _picked(weights: Sequence[RowSource], indices: Sequence[int]) -> Tensor:
    """Some rows of several matrices on top of each other, as new float32 rows."""
    rows: list[Tensor] = []
    first = position = 0
    for weight in weights:
        count = weight.shape[0]
        while position < len(indices) and indices[position] < first + count:
            stop = position + 1  # neighbours are read together
            while stop < len(indices) and indices[stop] == indices[stop - 1] + 1 and indices[stop] < first + count:
                stop += 1
            rows.append(weight.rows(indices[position] - first, indices[stop - 1] + 1 - first).float())
            position = stop
        first += count
    return torch.cat(rows)


@dataclass(frozen=True, eq=False)
class Evidence:
    """Inputs and weights that candidates are judged on, on the device.

    Args:
        tokens: float32 ``(tokens, in)``.
        counts: float32 ``(tokens,)``: how many tokens each stands for.
        rows: float32 ``(rows, in)``.
    """

    tokens: Tensor
    counts: Tensor
    rows: Tensor

    @classmethod
    def of(cls, kept: TokenSample, rows: Tensor, device: torch.device, limit: int = TOKENS) -> Evidence:
        """At most ``limit`` of the tokens kept.

        Raises:
            UnsupportedError: no token was kept.
        """
        sample = TokenSample(limit)
        sample.merge(kept)
        return cls(sample.tokens().to(device), sample.counts().to(device), rows.to(device))


class Objective:
    """How wrong the outputs become, relative to what they are: root of the mean squares over tokens and channels.

    Biases have no part in it; they are added exactly, quantized or not.

    Args:
        act, weight: what is done to the inputs ``X / s`` and the weights ``W s``.
    """

    def __init__(self, evidence: Evidence, act: Quantizer, weight: Quantizer) -> None:
        self._evidence, self._act, self._weight = evidence, act, weight
        self._exact = evidence.tokens @ evidence.rows.T
        share = evidence.counts / evidence.counts.max()
        self._root = share.sqrt().unsqueeze(1)
        norm: Tensor = _linalg.vector_norm(self._exact * self._root)
        self._norm = float(norm)

    def errors(self, columns: Tensor) -> list[float]:
        """The error with each of several scales; infinity where it is not a number.

        Args:
            columns: float32 ``(candidates, in)``.
        """
        tokens, rows = self._evidence.tokens, self._evidence.rows
        at_once = _CANDIDATE_BYTES if tokens.device.type == "cpu" else _DEVICE_BYTES
        step = max(1, at_once // (4 * (tokens.numel() + rows.numel())))
        found: list[Tensor] = []
        for start in range(0, len(columns), step):
            part = columns[start : start + step].to(tokens.device)
            scale = part.unsqueeze(1)
            act = self._act(_filled(torch.div, tokens, scale), part)
            weight = self._weight(_filled(torch.mul, rows, scale), part)
            y = torch.bmm(act, weight.mT)
            del act, weight
            norm: Tensor = _linalg.vector_norm(y.sub_(self._exact).mul_(self._root), dim=(1, 2))
            found.append(norm)
        errors = torch.cat(found).double().cpu() / max(self._norm, torch.finfo(torch.float32).tiny)
        return [float(error) if math.isfinite(error) else math.inf for error in errors]


def _filled(operation: Callable[..., Tensor], matrix: Tensor, scale: Tensor) -> Tensor:
    """A matrix with each of several scales ``(candidates, 1, columns)``, float32."""
    return operation(matrix, scale, out=scratch((len(scale), *matrix.shape), matrix.dtype, matrix.device))


def working_bytes(width: int) -> int:
    """Memory that a search takes on the CPU at most, with inputs of this width."""
    one = 4 * width * (TOKENS + ROWS)
    return one + 3 * max(one, _CANDIDATE_BYTES)


def exact(rows: Tensor, columns: Tensor) -> Tensor:
    """No quantization."""
    return rows


def symmetric_rows(bits: int) -> Quantizer:
    """Symmetric integers with one scale per row: activations per token, weights per output channel."""
    most = 2 ** (bits - 1) - 1

    def quantizer(rows: Tensor, columns: Tensor) -> Tensor:
        scratched = scratch(rows.shape, rows.dtype, rows.device)
        scale = (torch.abs(rows, out=scratched).amax(-1, keepdim=True) / most).clamp_(min=EPSILON)
        return torch.div(rows, scale, out=scratched).round_().mul_(scale)

    return quantizer


def exponent_scale(act: Tensor, weight: Tensor, alpha: float, beta: float) -> Tensor:
    """``s_j = A_j^alpha / B_j^beta``, float32, as :func:`~slim_core.smoothing.scales.power_scale` bounds it.

    A channel that is always zero, or that nothing reads, serves the side that is left: it comes to lie where the others
    lie in the geometric mean, by a scale within theirs. With 1 it could outgrow all others or vanish beside them.
    """
    scale = power_scale(act, weight, alpha, beta)
    alive = (act > 0) & (weight > 0)
    if bool(alive.all()) or not bool(alive.any()):
        return scale
    known = scale[alive]
    filled = torch.full_like(scale, float(_geometric_mean(known)))
    filled = torch.where(weight > 0, _geometric_mean(weight[alive] * known) / weight, filled)
    filled = torch.where(act > 0, act / _geometric_mean(act[alive] / known), filled)
    return torch.where(alive, scale, filled.clamp(known.min(), known.max()))


def _geometric_mean(values: Tensor) -> Tensor:
    return values.log().mean().exp()


def awq_scales(magnitude: Tensor, ratio: float) -> Tensor:
    """``s = max(M^ratio, 1e-4)``, divided by the root of its largest times its smallest, float32 (arXiv 2306.00978).

    With ``ratio`` 0 all are exactly 1. A channel that is always zero has 1, the middle of all others.

    Args:
        magnitude: ``M``, the mean of ``|x|`` of every channel.
    """
    exact_values = magnitude.double()
    alive = (exact_values > 0) & torch.isfinite(exact_values)
    if not bool(alive.any()):
        return torch.ones_like(exact_values).float()
    scale = exact_values.clamp(min=1e-30).pow(ratio).clamp(min=_AWQ_FLOOR)
    middle = (scale[alive].max() * scale[alive].min()).sqrt()
    return torch.where(alive, scale / middle, torch.ones_like(scale)).float()


def ratio_grid(count: int) -> tuple[float, ...]:
    """``0, 1/n, ..., (n - 1)/n``."""
    return tuple(i / count for i in range(count))


@dataclass(frozen=True)
class Exponents:
    """What a search chose. ``before`` is the error without smoothing, ``after`` that of the choice."""

    alpha: float
    beta: float
    before: float
    after: float


def search_exponents(objective: Objective, scale: Callable[[float, float], Tensor]) -> Exponents:
    """The exponents of ``A^alpha / B^beta`` with the least error, along two lines.

    First ``beta = 1 - alpha``, then ``beta`` by itself with the best ``alpha``; each over :data:`GRID`. The error found
    is no larger than that of any other point of these lines, nor than that of no smoothing (0, 0). Of equals the
    first counts, in this order: no smoothing, the first line from ``alpha`` 0 on, the second from ``beta`` 0 on.

    Args:
        scale: gives the scale of every input column ``(in,)``.
    """
    points = [(0.0, 0.0), *((alpha, round(1 - alpha, 2)) for alpha in GRID)]
    errors = objective.errors(torch.stack([scale(*point) for point in points]))
    found = dict(zip(points, errors, strict=True))
    alpha = min(points[1:], key=found.__getitem__)[0]
    more = [point for point in ((alpha, beta) for beta in GRID) if point not in found]
    found |= zip(more, objective.errors(torch.stack([scale(*point) for point in more])), strict=True)
    best = min(found, key=found.__getitem__)
    return Exponents(*best, before=errors[0], after=found[best])


def search_alpha(objective: Objective, scale: Callable[[float], Tensor]) -> Exponents:
    """The exponent of ``A^alpha`` with the least error over :data:`GRID`; of equals the smallest, 0 if all are."""
    return _line(objective, scale, GRID)


def search_ratio(objective: Objective, scale: Callable[[float], Tensor], count: int) -> Exponents:
    """The ratio of :func:`awq_scales` with the least error over :func:`ratio_grid`; of equals the smallest."""
    return _line(objective, scale, ratio_grid(count))


def _line(objective: Objective, scale: Callable[[float], Tensor], points: Sequence[float]) -> Exponents:
    errors: list[float] = []
    for start in range(0, len(points), _POINTS_AT_ONCE):
        part = points[start : start + _POINTS_AT_ONCE]
        errors += objective.errors(torch.stack([scale(point) for point in part]))
    best = min(range(len(points)), key=errors.__getitem__)
    return Exponents(points[best], 0.0, before=errors[0], after=errors[best])
