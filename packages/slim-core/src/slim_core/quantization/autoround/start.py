"""Where training starts: the range of every group with which rounding to nearest loses least."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from slim_core.quantization.affine import by_groups
from slim_core.quantization.autoround.rounding import WeightGrid, WeightRange, fake_quantized
from slim_core.quantization.row_blocks import for_each_block, rows_per_block
from slim_core.quantization.scale_search import LOOSE_BOUND, search_matrix

__all__ = ["searched_factors"]


def searched_factors(
    weight: Tensor, span: WeightRange, grid: WeightGrid, energy: Tensor, group_size: int = 0
) -> tuple[Tensor, Tensor]:
    """The factors alpha and beta that lower ``sum_i energy_i (w_i - w'_i)^2``, each group by itself.

    This is the expected squared error of the output, were the inputs not correlated. It is never above that of the
    whole range, which a group keeps if the search found nothing better for a scale of this precision.

    Args:
        weight: float32 ``(rows, in)``.
        span: its range, with factors of one.
        energy: mean square of each input ``(in,)``, in any unit.

    Returns:
        Two new float32 tensors ``(rows, groups, 1)``, not negative; a little more than 1 where a wider range is better.
    """
    scale, offset = search_matrix(
        weight,
        bits=grid.bits,
        symmetric=grid.symmetric,
        group_size=group_size,
        importance=energy,
        plain_bound=LOOSE_BOUND,
    )
    scale, offset = scale.unsqueeze(2), offset.unsqueeze(2)
    if grid.symmetric:
        alpha = beta = _ratio(scale * grid.steps, torch.maximum(-span.low, span.high))
    else:
        alpha = _ratio((offset - grid.lowest) * scale, -span.low)
        beta = _ratio((grid.highest - offset) * scale, span.high)
    worse = _is_worse(weight, replace(span, alpha=alpha, beta=beta), span, grid, energy)
    return torch.where(worse, span.alpha, alpha), torch.where(worse, span.beta, beta)


def _ratio(wanted: Tensor, extreme: Tensor) -> Tensor:
    return torch.where(extreme > 0, wanted / extreme, torch.ones_like(extreme))


def _is_worse(weight: Tensor, one: WeightRange, other: WeightRange, grid: WeightGrid, energy: Tensor) -> Tensor:
    """Whether the error of a group ``(rows, groups, 1)`` is not below that with another range."""
    groups = one.low.shape[1]
    mean = energy.mean()
    counts = by_groups((energy / mean if bool(mean > 0) else torch.ones_like(energy)).unsqueeze(0), groups)
    block = rows_per_block(weight.shape[1], weight.device)

    def work(start: int) -> Tensor:
        rows = slice(start, start + block)
        exact = by_groups(weight[rows], groups)
        errors = [
            (fake_quantized(exact, span.rows(rows), None, grid).sub_(exact).square_() * counts).sum(-1, keepdim=True)
            for span in (one, other)
        ]
        return ~(errors[0] < errors[1])

    return torch.cat(for_each_block(work, range(0, weight.shape[0], block)))
