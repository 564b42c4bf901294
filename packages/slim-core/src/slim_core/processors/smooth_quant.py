"""``smooth_quant``: SmoothQuant (arXiv 2211.10438), for linears behind a norm."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from slim_core.model.subgraphs import Subgraph
from slim_core.processors.base import UnitWork
from slim_core.processors.iter_smooth import closed_form
from slim_core.processors.smoothing import Smoother, SmootherConfig
from slim_core.quantization.statistics import InputStatistics
from slim_core.smoothing.scales import FLOOR, Smoothing

__all__ = ["SmoothQuant", "SmoothQuantConfig"]


class SmoothQuantConfig(SmootherConfig):
    """Smooth the linears behind every norm by ``s = A^alpha / B^(1 - alpha)``."""

    kinds = ("norm-linear",)

    type: Literal["smooth_quant"] = "smooth_quant"
    alpha: float = Field(default=0.5, ge=0, le=1, description="How much of an outlier moves into the weights")
    symmetric: bool = Field(default=True, description="false: also centre the inputs")


class SmoothQuant(Smoother):
    """:class:`~slim_core.processors.iter_smooth.IterSmooth` for norms alone, with a gentler exponent."""

    Config = SmoothQuantConfig
    config: SmoothQuantConfig

    @property
    def shifts(self) -> bool:
        return not self.config.symmetric

    def choose(self, graph: Subgraph, seen: InputStatistics, work: UnitWork) -> Smoothing:
        return closed_form(graph, seen.channels, work, self.config.alpha, FLOOR, shifted=self.is_shifted(graph))
