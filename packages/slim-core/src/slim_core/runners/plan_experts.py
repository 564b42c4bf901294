"""The part of the plan that is about experts: where they are, and what is done so that enough tokens reach each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from slim_core.model.experts import ExpertLayer, expert_layers
from slim_core.model.streamed import StreamedModel
from slim_core.recipe.schema import DatasetConfig

__all__ = ["ExpertQuota", "ExtraSamples", "PlannedExperts", "plan_experts"]


@dataclass(frozen=True)
class ExtraSamples:
    """How many extra samples there are, and the bytes of their hidden states at one point of the model."""

    count: int = 0
    hidden_bytes: int = 0


@dataclass(frozen=True)
class ExpertQuota:
    """The tokens that the statistics of every expert should be made of.

    Args:
        minimum: so many.
        extra: samples that help experts below it.
        routes: whether experts still below it are shown tokens that went to others.
        units: those in which something is learnt from experts, in order.
    """

    minimum: int
    extra: ExtraSamples
    routes: bool
    units: tuple[str, ...]


@dataclass(frozen=True)
class PlannedExperts:
    """The layers of experts of every unit that has any, and the quota, if there is one that does anything."""

    layers: Mapping[str, tuple[ExpertLayer, ...]]
    quota: ExpertQuota | None = None

    def summary(self) -> str:
        """What is done for the quota; empty if there is none."""
        quota = self.quota
        if quota is None:
            return ""
        ways = [f"by {quota.extra.count} extra samples"] * bool(quota.extra.count)
        ways += ["by routing tokens to them for statistics only"] * quota.routes
        how = ", then ".join(ways) or "nothing is done for those below"
        count = sum(len(layer.experts) for layers in self.layers.values() for layer in layers)
        return f"at least {quota.minimum} calibration tokens for each of {count}: {how}"


def plan_experts(
    model: StreamedModel,
    dataset: DatasetConfig,
    watched: Collection[str],
    trained: Collection[str],
    extra: Callable[[], ExtraSamples],
) -> tuple[PlannedExperts, list[str]]:
    """Find the experts of a model that will be calibrated, and see what the quota asks for.

    Args:
        watched: the linears of whose inputs something is observed.
        trained: those that learn while their block is run aside, from the samples themselves alone.
        extra: gives the extra samples; asked only if they are of use.

    Returns:
        That, and warnings.
    """
    layers = {
        unit.name: tuple(found)
        for unit in model.units
        if unit.block is not None and (found := expert_layers(model.module, unit.linears))
    }
    minimum = dataset.min_tokens_per_expert
    if not minimum:
        return PlannedExperts(layers), []
    learning = [unit for unit, found in layers.items() if _any_of(found, watched) or _any_of(found, trained)]
    if not learning:
        why = "nothing is learnt from the inputs of experts" if layers else "this model has no routed experts"
        return PlannedExperts(layers), [f"spec.dataset.min_tokens_per_expert has no effect: {why}"]
    observed = any(_any_of(found, watched) for found in layers.values())
    samples = extra() if observed and dataset.num_samples is not None and dataset.extra_share else ExtraSamples()
    routes = observed and dataset.route_starved_experts
    return PlannedExperts(layers, ExpertQuota(minimum, samples, routes, tuple(learning))), []


def _any_of(layers: Iterable[ExpertLayer], names: Collection[str]) -> bool:
    """Whether any of these linears is one of an expert."""
    return any(name in names for layer in layers for linears in layer.experts.values() for name in linears.values())
