"""``float_sparse``: prune linears and let the weights that are left make up for it (W16A16S)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from slim_core.logging import get_logger
from slim_core.model.units import LinearInfo
from slim_core.processors.base import Assignment, LinearRule, LinearWork, Processor, UnitWork
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.quantization.layers import SparseFloat
from slim_core.quantization.statistics import InputStatistics, Need
from slim_core.quantization.weights import all_rows, sqnr
from slim_core.recipe import Exclude, Include, NameFilter, Phase, ProcessorConfig
from slim_core.sparsity.admm import InputMetric, prune
from slim_core.sparsity.mantissa import reduce_mantissas

__all__ = ["FloatSparse", "FloatSparseConfig"]

_logger = get_logger(__name__)
_FLOAT16_MAX = torch.finfo(torch.float16).max
_BLOCKS = 40 << 20


class FloatSparseConfig(ProcessorConfig):
    """Set a share of the weights of the linears that ``include`` names to zero, and shorten the others' mantissas."""

    phase = Phase.QUANTIZATION

    type: Literal["float_sparse"] = "float_sparse"
    sparse_ratio: float = Field(
        default=0.3, ge=0, le=1, description="Share of each weight matrix that becomes zero. Default: 0.3"
    )
    include: Include = Field(default=("*",), description="Patterns of linears to prune; empty means all")
    exclude: Exclude = Field(default=(), description="Patterns of linears to leave alone; wins over include")


class FloatSparse(Processor):
    """ADMM on the second moment of the inputs, then short mantissas.

    Memory of a linear at work, beside the block: 15 bytes per weight, some ten blocks of 4 MiB, and 8 bytes per element
    of the second moment ``(in, in)``, once for all linears with the same input. What the forward gathered takes 4 bytes
    per element of every such input of the block.
    """

    Config = FloatSparseConfig
    config: FloatSparseConfig

    def rules(self) -> list[LinearRule]:
        names = NameFilter(self.config.include, self.config.exclude)
        needs = frozenset({Need.HESSIAN}) if self.config.sparse_ratio < 1 else frozenset[Need]()
        return [LinearRule(self.position, names, LayerForm(LayerKind.W16A16S), needs)]

    def working_bytes(self, linears: Sequence[LinearInfo], assignments: Mapping[str, Assignment]) -> int:
        own = self.own(linears, assignments)
        return _BLOCKS + max((_bytes_of(info.out_features, info.in_features) for info in own), default=0)

    def process(self, work: UnitWork) -> None:
        unseen: list[str] = []
        known: InputStatistics | None = None
        metric: InputMetric | None = None
        for linear in work.owned_by(self.position):
            name, seen = linear.info.name, work.seen(linear.info.name)
            if known is not seen:
                known, metric = seen, None  # the one before is given back first
                metric = _metric(seen, name)
            if metric is None and not seen.is_starved:
                unseen.append(name)
            work.finish(linear, *self._pruned(linear, metric, work.device))
        if unseen and 0 < self.config.sparse_ratio < 1:
            _logger.warning(
                "%s: no calibration sample reached these linears (or only zeros did), so they were pruned by magnitude "
                "alone: %s",
                work.name,
                ", ".join(unseen),
            )

    def _pruned(
        self, linear: LinearWork, metric: InputMetric | None, device: torch.device
    ) -> tuple[SparseFloat, float]:
        """The linear with the weights that are left, and their signal-to-noise ratio in decibels."""
        tensor = linear.weight.meta.name
        exact = all_rows(linear.weight, tensor, device)
        pruned = prune(exact, self.config.sparse_ratio, metric, tensor)
        importance = None if metric is None else metric.scale
        weight = reduce_mantissas(pruned, importance, linear.weight.dtype)
        _warn_of_lost_weights(linear.info.name, pruned, weight)
        del pruned
        return SparseFloat(weight.cpu(), linear.bias), sqnr(exact, weight)


def _bytes_of(rows: int, columns: int) -> int:
    return 15 * rows * columns + 8 * columns * columns


def _metric(seen: InputStatistics, name: str) -> InputMetric | None:
    second_moment = None if seen.is_starved else seen.hessian.mean(name)
    return None if second_moment is None else InputMetric.of(second_moment, name)


def _warn_of_lost_weights(name: str, pruned: Tensor, weight: Tensor) -> None:
    """Say so where the step to short mantissas meets numbers that it was not made for."""
    kept, left = int(torch.count_nonzero(pruned)), int(torch.count_nonzero(weight))
    if kept - left > kept // 20:
        _logger.warning(
            "%s: %d of the %d weights that pruning kept are below 2^-14, which this format holds as zero",
            name,
            kept - left,
            kept,
        )
    large = int(torch.count_nonzero(weight.abs() > _FLOAT16_MAX))
    if large:
        _logger.warning("%s: %d weights are above 65504; engines for this format compute in float16", name, large)
