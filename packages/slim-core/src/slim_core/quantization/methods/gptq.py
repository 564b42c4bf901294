"""The ``gptq`` weight method: columns are rounded one after the other, and the rest makes good what each one lost.

Scales are those of least squared error, where a column's error counts as much as GPTQ will count it (the pivots of the
Hessian's factor). With activation ordering, the columns with the largest inputs are rounded first, while they have the
most columns left to make good for them; groups stay runs of columns as they lie in the weight, with scales from the
original weights. Without it, the scales of a group are searched when its turn comes, on weights that have made good for
all groups before: on the linears of a small trained model that left 5 to 7 % less output error than scales from the
original weights, but activation ordering left 30 % less again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from slim_core.logging import get_logger
from slim_core.quantization.methods.gptq_factor import Factor, factor_of
from slim_core.quantization.methods.ssz import ssz_weight
from slim_core.quantization.row_blocks import decibels, energy, for_each_block, on_one_thread, rows_per_block
from slim_core.quantization.scale_search import LOOSE_BOUND, search_matrix
from slim_core.quantization.statistics import Hessian
from slim_core.quantization.weights import QuantizedWeight, RowSource, refuse_infinite
from slim_core.recipe.qconfig import Ext

__all__ = ["GptqOptions", "Grid", "gptq_bytes", "gptq_weight", "solve"]

_logger = get_logger(__name__)
_OUTER, _INNER = 4, 32


@dataclass(frozen=True)
class GptqOptions:
    """Settings of ``gptq``.

    Args:
        percdamp: what is added to the Hessian's diagonal, as a share of its mean.
        block_size: input columns between two updates of all the rest; changes the speed, not the result.
        actorder: whether the columns with the largest inputs are rounded first.
    """

    percdamp: float = 0.01
    block_size: int = 128
    actorder: bool = True

    @classmethod
    def of(cls, ext: Ext) -> GptqOptions:
        """From the settings of a recipe."""
        return cls(
            percdamp=ext.get("percdamp", cls.percdamp),
            block_size=ext.get("block_size", cls.block_size),
            actorder=ext.get("actorder", cls.actorder),
        )


def gptq_weight(
    weight: RowSource,
    hessian: Hessian | None,
    *,
    bits: int,
    symmetric: bool,
    group_size: int = 0,
    options: GptqOptions,
    name: str,
    linear: str,
    device: torch.device | None = None,
) -> QuantizedWeight:
    """Quantize a weight so that the output of its linear changes little on the observed inputs.

    Where GPTQ cannot work (nothing was observed, or only zeros, or the Hessian cannot be factorised), the weight is
    rounded to nearest with the scales of least squared error, and a warning says so. So are the columns of inputs that
    are always zero.

    Args:
        weight: float matrix ``(out, in)``.
        hessian: second moments of the inputs, which are not changed; None if nothing was observed.
        bits: width of the codes, at most 8.
        group_size: columns that share a scale, a divisor of ``in``; 0: all of them.
        name, linear: names of the tensor and of the module, for errors and warnings.
        device: where to compute.

    Raises:
        InvalidModelError: the weight or its inputs hold NaN or infinity.
    """
    factor = factor_of(hessian or Hessian(), linear, options.percdamp, options.actorder, device)
    if factor is None or not all(weight.shape):
        if all(weight.shape):
            _logger.warning("%s: %s; its weight is rounded to nearest instead", linear, _why_not(hessian))
        return ssz_weight(weight, bits=bits, symmetric=symmetric, group_size=group_size, name=name, device=device)
    _tell(linear, factor, options)
    stored = weight.rows(0, weight.shape[0])
    columns = _columns(stored, factor.order, name)
    signal = energy(columns)
    in_place = not options.actorder and 0 < group_size < len(columns)
    grid = _grid(stored, group_size, bits, symmetric, None if in_place else factor.importance, columns.device)
    codes = solve(columns, factor, grid, options.block_size, in_place=in_place)
    return QuantizedWeight(
        codes.T.contiguous().cpu(),
        grid.scale.T.contiguous().cpu(),
        grid.offset.T.contiguous().cpu(),
        decibels([(signal, energy(columns))]),
    )


def gptq_bytes(rows: int, columns: int) -> int:
    """Memory that :func:`gptq_weight` takes for a weight of this shape, beside the weight and the Hessian.

    Either the Hessian in order and its factor (measured on one thread: 8.8 bytes per element at 2048 columns, 8.0 at
    4096); or the factor, two copies of the weight and what is made good for.
    """
    factorising = 8 * columns * columns
    solving = 4 * columns * columns + 7 * rows * columns + 4 * rows * (_OUTER + 2) * GptqOptions.block_size
    return max(factorising, solving)


def _columns(stored: Tensor, order: Tensor, name: str) -> Tensor:
    """A weight ``(out, in)`` as a new float32 matrix ``(in, out)`` in the given order, on its device.

    Raises:
        InvalidModelError: it holds NaN or infinity.
    """
    turned = stored.to(order.device).T.contiguous()
    columns = torch.empty(turned.shape, device=order.device)
    block = rows_per_block(turned.shape[1], order.device)

    def work(start: int) -> None:
        columns[start : start + block] = turned.index_select(0, order[start : start + block])

    for_each_block(work, range(0, len(turned), block))
    if not bool(torch.isfinite(columns.sum())):  # large numbers add up to infinity too
        refuse_infinite(columns.T, name)
    return columns


@dataclass(eq=False)
class Grid:
    """The values that weights may take: ``scale`` and ``offset`` are ``(groups, out)``."""

    scale: Tensor
    offset: Tensor
    symmetric: bool
    bits: int

    def search(self, group: int, columns: Tensor, importance: Tensor) -> None:
        """Fit one group to columns ``(columns, out)`` whose squared errors count ``importance``."""
        scale, offset = search_matrix(
            columns.T,
            bits=self.bits,
            symmetric=self.symmetric,
            importance=importance,
            steps=0,
            thorough=False,
            plain_bound=LOOSE_BOUND,
        )
        self.scale[group], self.offset[group] = scale[:, 0], offset[:, 0]


def _grid(
    stored: Tensor, group_size: int, bits: int, symmetric: bool, importance: Tensor | None, device: torch.device
) -> Grid:
    """The grid of a weight ``(out, in)``; still empty if it is to be searched in place, without ``importance``."""
    if importance is None:
        empty = torch.zeros(stored.shape[1] // group_size, len(stored), device=device)
        return Grid(empty, empty.clone(), symmetric, bits)
    scale, offset = search_matrix(
        stored,
        bits=bits,
        symmetric=symmetric,
        group_size=group_size,
        importance=importance,
        steps=0,
        thorough=False,
        plain_bound=LOOSE_BOUND,
        device=device,
    )
    return Grid(scale.T.contiguous(), offset.T.contiguous(), symmetric, bits)


def solve(weight: Tensor, factor: Factor, grid: Grid, block_size: int, *, in_place: bool = False) -> Tensor:
    """Round the columns of a weight from the last to the first; each makes good for those before it.

    Args:
        weight: ``(in, out)``, input columns in the order of the factor. Becomes the residual: what it was, less what
            its codes stand for.
        block_size: columns between two updates of all the rest.
        in_place: whether to fit the grid of every group at its turn, to its columns as they are then. Needs columns in
            reverse order.

    Returns:
        int8 codes ``(in, out)``, input columns in the order of the weight.
    """
    width = len(weight)
    size = width // len(grid.scale)
    group_of = [int(column) // size for column in factor.order.cpu().numpy()]
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    # Blocks of blocks of blocks: large products where many columns are made good for, small vectors in the innermost.
    sizes = (size if in_place else width, _OUTER * block_size, block_size, _INNER)
    _Descent(weight, factor, grid, group_of, codes, sizes, in_place).round(weight, 0, width, 0)
    return codes


@dataclass(eq=False)
class _Descent:
    """What the levels of :func:`solve` share; ``sizes`` are the numbers of columns on each."""

    weight: Tensor
    factor: Factor
    grid: Grid
    group_of: list[int]
    codes: Tensor
    sizes: tuple[int, int, int, int]
    in_place: bool

    def round(self, columns: Tensor, start: int, stop: int, level: int) -> None:
        """Round ``start:stop``; ``columns`` are they, with all that was lost after ``stop`` made good."""
        weight, factor, grid = self.weight, self.factor, self.grid
        if level == len(self.sizes):
            coefficients = factor.coefficients[start:stop, start:stop]
            found = _round(columns.clone(), weight[start:stop], coefficients, grid, self.group_of[start:stop])
            self.codes.index_copy_(0, factor.order[start:stop], found.to(torch.int8))
            return
        for first, last in _runs(start, stop, self.sizes[level]):
            part = columns[first - start : last - start]
            if last < stop:
                part = torch.addmm(part, factor.coefficients[first:last, last:stop], weight[last:stop])
            if self.in_place and not level:
                grid.search(self.group_of[first], part, factor.pivots[first:last])
            deeper = partial(self.round, part, first, last, level + 1)
            if level == len(self.sizes) - 2 and weight.device.type == "cpu":
                on_one_thread(deeper)
            else:
                deeper()


def _runs(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """``start`` to ``stop`` in runs of ``size``, the last one first."""
    while stop > start:
        first = max(start, stop - size)
        yield first, stop
        stop = first


def _round(block: Tensor, residual: Tensor, coefficients: Tensor, grid: Grid, group_of: list[int]) -> Tensor:
    """Codes of a few columns ``(columns, out)``, one after the other.

    ``block`` is overwritten; ``residual`` holds the weights and becomes what is left of them.
    """
    half = 2 ** (grid.bits - 1)
    codes = torch.empty_like(block)
    scales, offsets = grid.scale.unbind(0), grid.offset.unbind(0)
    rows = zip(block.unbind(0), codes.unbind(0), residual.unbind(0), coefficients.unbind(0), group_of, strict=True)
    after = residual.T
    for k, (value, code, left, row, group) in reversed(list(enumerate(rows))):
        scale, offset = scales[group], offsets[group]
        if k + 1 < len(block):
            value.addmv_(after[:, k + 1 :], row[k + 1 :])
        torch.div(value, scale, out=code)
        if grid.symmetric:
            code.round_().clamp_(-half, half - 1)
            left.addcmul_(code, scale, value=-1)
        else:
            code.add_(offset).round_().clamp_(-half, half - 1)
            left.addcmul_(code - offset, scale, value=-1)
    return codes


def _why_not(hessian: Hessian | None) -> str:
    if hessian is None or not hessian.tokens:
        return "no calibration sample reached it, so gptq knows nothing of its inputs"
    if not bool(hessian.total.any() if hessian.total is not None else False):
        return "its inputs were zero in every sample, so gptq knows nothing of them"
    return "the second moments of its inputs cannot be factorised for gptq"


def _tell(linear: str, factor: Factor, options: GptqOptions) -> None:
    if factor.dead:
        _logger.warning(
            "%s: %d of its %d inputs were zero in every sample; their weights are rounded to nearest",
            linear,
            factor.dead,
            len(factor.order),
        )
    if factor.damping > options.percdamp:
        _logger.warning("%s: gptq needed a damping of %g instead of %g", linear, factor.damping, options.percdamp)
