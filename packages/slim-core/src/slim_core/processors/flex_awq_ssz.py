"""``flex_awq_ssz``: smoothing by the mean input, with an exponent that is searched with the recipe's own quantizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from slim_core.errors import UnsupportedError
from slim_core.model.subgraphs import Subgraph
from slim_core.model.units import LinearInfo
from slim_core.processors.base import Assignment, UnitWork
from slim_core.processors.searching import SearchingSmoother, evidence_of, mean_inputs, weights_of
from slim_core.processors.smoothing import SubgraphConfig
from slim_core.quantization.building import check_shape
from slim_core.quantization.kinds import layer_form
from slim_core.quantization.statistics import InputStatistics
from slim_core.recipe import LinearQConfig
from slim_core.smoothing.scales import Choice, Smoothing
from slim_core.smoothing.search import Objective, exponent_scale, search_alpha
from slim_core.smoothing.trials import act_quantizer, weight_quantizer

__all__ = ["FlexAwqSsz", "FlexAwqSszConfig", "searchable"]


class FlexAwqSszConfig(SubgraphConfig):
    """Smooth by ``s = A^alpha``, ``A`` the mean ``|x|`` of a channel, with ``alpha`` given or searched."""

    type: Literal["flex_awq_ssz"] = "flex_awq_ssz"
    qconfig: LinearQConfig = Field(description="The quantizers that the search tries; usually those of linear_quant")
    alpha: float | None = Field(
        default=None, ge=0, le=1, description="Exponent of the inputs; left out, it is searched for every subgraph"
    )
    beta: float | None = Field(default=None, ge=0, le=1, description="Has no effect; part of the protocol")

    @model_validator(mode="after")
    def _legal(self) -> FlexAwqSszConfig:
        try:
            layer_form(self.qconfig)
            searchable(self.qconfig.weight.method, "qconfig.weight.method")
        except UnsupportedError as error:
            text = f"{error.what}; {error.remedy}"
            raise PydanticCustomError("illegal_pair", "{text}", {"text": text}) from error
        return self

    def warnings(self) -> list[str]:
        found = super().warnings()
        if self.beta is not None:
            found.append("beta has no effect: weights have no part in the scale")
        return found


def searchable(method: str, where: str) -> None:
    """Refuse a weight method that a search cannot try.

    Raises:
        UnsupportedError: it needs a Hessian, which would have to be factorised anew for every candidate.
    """
    if method == "gptq":
        raise UnsupportedError(
            "method 'gptq' cannot be tried in a search, because it needs the Hessian of every candidate",
            where=where,
            remedy="search with 'ssz' or 'minmax' of the same dtype and scope, and quantize with gptq in linear_quant",
        )


class FlexAwqSsz(SearchingSmoother):
    """The exponent with the least output error of the real quantizers.

    The scale has the largest mean among the query heads that share a value head. All targets take part in the search.
    """

    Config = FlexAwqSszConfig
    config: FlexAwqSszConfig

    @property
    def searches(self) -> bool:
        return self.config.alpha is None

    def check(self, linears: Sequence[LinearInfo], assignments: Mapping[str, Assignment]) -> None:
        known, whole = self.rescales(), layer_form(self.config.qconfig)
        for info in linears:
            if self.searches and info.name in known:
                check_shape(whole.for_width(info.in_features), info)

    def choose(self, graph: Subgraph, seen: InputStatistics, work: UnitWork) -> Smoothing:
        names = self.readers(graph)
        sample = weights_of(names, work)
        act = graph.gather(mean_inputs(seen, graph, work), "amax")
        weight = graph.gather(sample.maxima.cpu(), "amax")
        if (alpha := self.config.alpha) is not None:
            scale = exponent_scale(act, weight, alpha, 0.0)
            return Smoothing(graph, scale, choice=Choice(alpha, 0.0, weight=sample.maxima))
        qconfig = self.config.qconfig
        form = layer_form(qconfig).for_width(len(graph.columns))
        objective = Objective(
            evidence_of(seen, sample, work),
            act_quantizer(qconfig.act, form, seen.channels, work.dtype),
            weight_quantizer(qconfig.weight, form, seen.channels, names[0], work.device),
        )
        found = search_alpha(objective, lambda alpha: graph.spread(exponent_scale(act, weight, alpha, 0.0)))
        choice = Choice(found.alpha, 0.0, None, found.before, found.after, sample.maxima)
        return Smoothing(graph, exponent_scale(act, weight, found.alpha, 0.0), choice=choice)
