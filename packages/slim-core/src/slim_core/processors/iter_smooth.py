"""``iter_smooth``: closed-form smoothing of all four types of subgraphs."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from slim_core.model.subgraphs import Subgraph
from slim_core.processors.base import UnitWork
from slim_core.processors.smoothing import Smoother, SubgraphConfig
from slim_core.quantization.statistics import ChannelStatistics, InputStatistics
from slim_core.quantization.statistics.problems import not_finite
from slim_core.smoothing.scales import FLOOR, Choice, Smoothing, column_maxima, power_scale

__all__ = ["IterSmooth", "IterSmoothConfig", "closed_form"]


class IterSmoothConfig(SubgraphConfig):
    """Smooth by ``s = A^alpha / B^(1 - alpha)``, A the largest input of a channel, B its largest weight."""

    type: Literal["iter_smooth"] = "iter_smooth"
    alpha: float = Field(default=0.9, ge=0, le=1, description="How much of an outlier moves into the weights")
    scale_min: float = Field(default=FLOOR, gt=0, lt=1, description="Smallest scale")
    symmetric: bool = Field(default=True, description="false: also centre the inputs of linears behind a norm")


class IterSmooth(Smoother):
    """One pass; despite its name nothing iterates."""

    Config = IterSmoothConfig
    config: IterSmoothConfig

    @property
    def shifts(self) -> bool:
        return not self.config.symmetric

    def choose(self, graph: Subgraph, seen: InputStatistics, work: UnitWork) -> Smoothing:
        return closed_form(
            graph, seen.channels, work, self.config.alpha, self.config.scale_min, shifted=self.is_shifted(graph)
        )


def closed_form(
    graph: Subgraph, channels: ChannelStatistics, work: UnitWork, alpha: float, floor: float, *, shifted: bool
) -> Smoothing:
    """The SmoothQuant scale (arXiv 2211.10438) of a subgraph, averaged over the query heads that share a value head.

    Args:
        shifted: also move the middle of every channel to zero.
    """
    low, high = _finite(channels, graph.targets[0])
    act, shift = torch.maximum(low.abs(), high.abs()), None
    if shifted:
        shift, act = (low + high) / 2, (high - low) / 2
    assert work.weights is not None
    weight = column_maxima(work.weights[f"{target}.weight"] for target in graph.targets)
    scale = power_scale(act.cpu(), weight.cpu(), alpha, 1 - alpha, floor)
    choice = Choice(alpha, 1 - alpha, weight=weight)
    return Smoothing(graph, graph.gather(scale, "mean"), None if shift is None else shift.cpu(), choice)


def _finite(channels: ChannelStatistics, name: str) -> tuple[Tensor, Tensor]:
    low, high = channels.minimum, channels.maximum
    assert low is not None
    assert high is not None
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise not_finite(name)
    return low, high
