"""The ``ssz`` weight method: scales with the least squared error, by a grid and alternating least squares.

The error may be weighted by the mean square of every input (``ext.weighted``): a first approximation of the error in
the output of the linear, where the inputs are not correlated. An input that calibration hardly saw may be seen in
service, so its weights are not given up: the error without weights stays within a bound too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slim_core.quantization.affine import EPSILON, affine_parameters, by_groups, dequantize_groups, quantize_groups
from slim_core.quantization.row_blocks import decibels, energy, for_each_block, rows_per_block
from slim_core.quantization.scale_search import STEPS, TIGHT_BOUND, search_matrix
from slim_core.quantization.weights import QuantizedWeight, RowSource, refuse_infinite
from slim_core.recipe.qconfig import Ext

__all__ = ["SszOptions", "ssz_weight"]


@dataclass(frozen=True)
class SszOptions:
    """``steps``: least-squares steps, at most. ``weighted``: whether the error counts the inputs."""

    steps: int = STEPS
    weighted: bool = False

    @classmethod
    def of(cls, ext: Ext) -> SszOptions:
        """From the settings of a recipe."""
        return cls(steps=ext.get("step", STEPS), weighted=ext.get("weighted", False))


def ssz_weight(
    weight: RowSource,
    *,
    bits: int,
    symmetric: bool = True,
    group_size: int = 0,
    steps: int = STEPS,
    name: str,
    device: torch.device | None = None,
    importance: Tensor | None = None,
) -> QuantizedWeight:
    """Quantize a weight, every row or group of its columns with the scale of least squared error.

    The (weighted) error of a row or group is never above that of ``minmax``; with weights, its error without them is
    never above twice that of ``minmax``.

    Args:
        weight: float matrix ``(out, in)``.
        bits: width of the codes, at most 8.
        group_size: columns that share a scale, a divisor of ``in``; 0: all of them.
        steps: least-squares steps, at most.
        name: the tensor's name, for errors.
        device: where to compute.
        importance: ``(in,)``, what the error of each column counts, e.g. the mean square of the input; None: the same.

    Raises:
        InvalidModelError: the weight holds NaN or infinity.
    """
    out, width = weight.shape
    groups = width // group_size if group_size else 1
    codes = torch.empty(out, width, dtype=torch.int8)
    scale, offset = torch.full((out, max(groups, 1)), EPSILON), torch.zeros(out, max(groups, 1))
    if not out or not width:
        return QuantizedWeight(codes, scale, offset, float("inf"))
    block = rows_per_block(width, device)
    where = device or torch.device("cpu")
    counts = torch.ones(width, dtype=torch.float64) if importance is None else importance.double()
    counts = by_groups(counts.to(where).unsqueeze(0), groups)

    def work(start: int) -> tuple[float, float]:
        rows = weight.rows(start, min(start + block, out)).to(device=where, dtype=torch.float32)
        refuse_infinite(torch.stack([rows.amin(1), rows.amax(1)], 1), name, start)
        found = search_matrix(
            rows,
            bits=bits,
            symmetric=symmetric,
            group_size=group_size,
            importance=importance,
            steps=steps,
            plain_bound=TIGHT_BOUND,
        )
        found = _never_above_minmax(rows, found, counts, bits, symmetric)
        quantized = quantize_groups(rows, *found, bits)
        codes[start : start + block] = quantized
        scale[start : start + block], offset[start : start + block] = found
        noise = dequantize_groups(quantized, *found).sub_(rows)
        return energy(rows), energy(noise)

    energies = for_each_block(work, range(0, out, block))
    return QuantizedWeight(codes, scale, offset, decibels(energies))


def _never_above_minmax(
    rows: Tensor, found: tuple[Tensor, Tensor], counts: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """The found scales and offsets, or those of the extremes where these are better: decided in float64.

    They are better too where the plain error of what was found is beyond its bound.
    """
    groups = found[0].shape[1]
    grouped = by_groups(rows, groups)
    plain = affine_parameters(grouped.amin(2), grouped.amax(2), bits, symmetric)

    def errors(scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        levels = quantize_groups(rows, scale, offset, bits).double()
        exact = (by_groups(levels, groups) - offset.double().unsqueeze(2)) * scale.double().unsqueeze(2)
        squares = (exact - grouped).square_()
        return (squares * counts).sum(2), squares.sum(2)

    (new_weighted, new_plain), (old_weighted, old_plain) = errors(*found), errors(*plain)
    worse = (new_weighted > old_weighted) | (new_plain > TIGHT_BOUND * old_plain)
    scale, offset = (torch.where(worse, old, new) for old, new in zip(plain, found, strict=True))
    return scale, offset
