"""``flex_smooth_quant``: smoothing with exponents that are searched for every subgraph by simulated W8A8."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from torch import Tensor

from slim_core.model.subgraphs import Subgraph
from slim_core.processors.base import UnitWork
from slim_core.processors.searching import SearchingSmoother, evidence_of, largest_inputs, weights_of
from slim_core.processors.smoothing import SubgraphConfig
from slim_core.quantization.statistics import InputStatistics
from slim_core.smoothing.scales import Choice, Smoothing
from slim_core.smoothing.search import Objective, exponent_scale, search_exponents, symmetric_rows

__all__ = ["FlexSmoothQuant", "FlexSmoothQuantConfig"]


class FlexSmoothQuantConfig(SubgraphConfig):
    """Smooth by ``s = A^alpha / B^beta``, with the exponents given, or searched for every subgraph."""

    type: Literal["flex_smooth_quant"] = "flex_smooth_quant"
    alpha: float | None = Field(
        default=None, ge=0, le=1, description="Exponent of the inputs; left out, both exponents are searched"
    )
    beta: float | None = Field(
        default=None, ge=0, le=1, description="Exponent of the weights; left out, both exponents are searched"
    )

    @model_validator(mode="after")
    def _both_or_neither(self) -> FlexSmoothQuantConfig:
        if (self.alpha is None) != (self.beta is None):
            given, missing = ("alpha", "beta") if self.beta is None else ("beta", "alpha")
            raise PydanticCustomError(
                "missing_exponent",
                "{missing} is missing; give it beside {given}, or leave both out to have them searched",
                {"missing": missing, "given": given},
            )
        return self


class FlexSmoothQuant(SearchingSmoother):
    """Exponents by the error of int8 activations per token times int8 weights per channel, whatever the recipe.

    ``A`` is the largest input of a channel, ``B`` its largest weight. Query heads that share a value head share a
    scale, made from the largest ``A`` and ``B`` among them; candidates are judged with the scales so shared.
    """

    Config = FlexSmoothQuantConfig
    config: FlexSmoothQuantConfig

    @property
    def searches(self) -> bool:
        return self.config.alpha is None

    def choose(self, graph: Subgraph, seen: InputStatistics, work: UnitWork) -> Smoothing:
        sample = weights_of(self.readers(graph), work)
        act = graph.gather(largest_inputs(seen, graph, work), "amax")
        weight = graph.gather(sample.maxima.cpu(), "amax")

        def shared(alpha: float, beta: float) -> Tensor:
            return exponent_scale(act, weight, alpha, beta)

        alpha, beta = self.config.alpha, self.config.beta
        if alpha is not None and beta is not None:
            return Smoothing(graph, shared(alpha, beta), choice=Choice(alpha, beta, weight=sample.maxima))
        objective = Objective(evidence_of(seen, sample, work), symmetric_rows(8), symmetric_rows(8))
        found = search_exponents(objective, lambda alpha, beta: graph.spread(shared(alpha, beta)))
        choice = Choice(found.alpha, found.beta, None, found.before, found.after, sample.maxima)
        return Smoothing(graph, shared(found.alpha, found.beta), choice=choice)
