"""``awq``: activation-aware scales (arXiv 2306.00978), searched with the weight quantizer of the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from slim_core.errors import UnsupportedError
from slim_core.model.subgraphs import Subgraph
from slim_core.model.units import LinearInfo
from slim_core.processors.base import Assignment, UnitWork
from slim_core.processors.flex_awq_ssz import searchable
from slim_core.processors.searching import SearchingSmoother, evidence_of, mean_inputs, weights_of
from slim_core.processors.smoothing import SubgraphConfig
from slim_core.quantization.building import check_shape
from slim_core.quantization.kinds import LayerForm, layer_form
from slim_core.quantization.statistics import InputStatistics
from slim_core.recipe.qconfig import ActConfig, LinearQConfig, WeightConfig
from slim_core.smoothing.scales import Choice, Smoothing
from slim_core.smoothing.search import Objective, awq_scales, exact, search_ratio
from slim_core.smoothing.trials import weight_quantizer

__all__ = ["Awq", "AwqConfig"]


class AwqConfig(SubgraphConfig):
    """Smooth by ``s = M^ratio`` over its middle, ``M`` the mean ``|x|`` of a channel; the ratio is searched."""

    type: Literal["awq"] = "awq"
    weight_qconfig: WeightConfig = Field(description="The weight quantizer that the search tries")
    n_grid: int = Field(default=20, gt=0, description="How many ratios are tried: 0, 1/n, ..., (n - 1)/n")

    @model_validator(mode="after")
    def _legal(self) -> AwqConfig:
        try:
            weight_form(self.weight_qconfig)
            searchable(self.weight_qconfig.method, "weight_qconfig.method")
        except UnsupportedError as error:
            text = f"{error.what}; {error.remedy}"
            raise PydanticCustomError("illegal_weight", "{text}", {"text": text}) from error
        return self


def weight_form(config: WeightConfig) -> LayerForm:
    """The form of the plainest layer that has such a weight.

    Raises:
        UnsupportedError: there is none.
    """
    act: ActConfig | None = None
    if config.method == "sparse":
        act = ActConfig()
    elif "fp" in config.dtype:
        scope = "per_token" if config.scope == "per_channel" else config.scope
        method = "dualscale" if scope == "dual_scale" else "minmax"
        act = ActConfig(dtype=config.dtype, scope=scope, symmetric=True, method=method)
    return layer_form(LinearQConfig(act=act, weight=config))


class Awq(SearchingSmoother):
    """The ratio with the least error in the outputs of the targets, weights quantized and activations exact.

    The error is summed over all targets and taken on a sample of tokens that stands for all of them, where the
    reference method runs the module around the targets for every candidate. Query heads that share a value head share a
    scale, made from the mean over these heads.
    """

    Config = AwqConfig
    config: AwqConfig

    @property
    def searches(self) -> bool:
        return True

    def check(self, linears: Sequence[LinearInfo], assignments: Mapping[str, Assignment]) -> None:
        known, whole = self.rescales(), weight_form(self.config.weight_qconfig)
        for info in linears:
            if info.name in known:
                check_shape(whole.for_width(info.in_features), info)

    def choose(self, graph: Subgraph, seen: InputStatistics, work: UnitWork) -> Smoothing:
        names, config = self.readers(graph), self.config.weight_qconfig
        sample = weights_of(names, work)
        magnitude = graph.gather(mean_inputs(seen, graph, work), "mean")
        form = weight_form(config).for_width(len(graph.columns))
        objective = Objective(
            evidence_of(seen, sample, work),
            exact,
            weight_quantizer(config, form, seen.channels, names[0], work.device),
        )
        found = search_ratio(objective, lambda ratio: graph.spread(awq_scales(magnitude, ratio)), self.config.n_grid)
        choice = Choice(None, None, found.alpha, found.before, found.after, sample.maxima)
        return Smoothing(graph, awq_scales(magnitude, found.alpha), choice=choice)
