"""How many calibration tokens reach every expert of a block, and what is done for those that too few reach."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from slim_core.model.experts import ExpertLayer
from slim_core.quantization.statistics import InputObserver, InputStatistics
from slim_core.ranks.group import Ranks
from slim_core.runners.calibration import BlockForwards
from slim_core.runners.expert_routing import RoutedTokens
from slim_core.runners.plan import Plan
from slim_core.runners.plan_experts import ExpertQuota
from slim_core.runners.plan_rules import weight_rule
from slim_core.runners.records import ExpertRecord, RunResult, StarvedExpert

__all__ = ["NOTHING_LEARNT", "ExpertTokens", "starved_warning"]

NOTHING_LEARNT = "nothing is learnt from its inputs"
_Key = tuple[str, int]


class ExpertTokens:
    """Watches the experts of a block while it runs.

    What goes into an expert is what its first linear is given, so a token counts once for every expert that its router
    chose. Nothing here changes what the block computes.

    Args:
        layers: the layers of experts of the block.
        minimum: the quota; 0 if there is none.
        tokens: of all samples, to be spread over where tokens are kept to route them; None: none are kept.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[ExpertLayer], minimum: int = 0, tokens: int | None = None
    ) -> None:
        self._layers = layers
        self._minimum = minimum
        self._counts = {(layer.name, number): 0 for layer in layers for number in layer.experts}
        self._extra = dict.fromkeys(self._counts, 0)
        self._forced = dict.fromkeys(self._counts, 0)
        self._now = self._counts
        self._handles: list[Any] = []
        for layer in layers:
            for number, linears in layer.experts.items():
                linear = model.get_submodule(next(iter(linears.values())))
                count = partial(self._count, (layer.name, number))
                self._handles.append(linear.register_forward_pre_hook(count, with_kwargs=True))
        self._kept = [RoutedTokens(model, layer, minimum, tokens) for layer in layers] if tokens and minimum else []

    def _count(self, key: _Key, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        self._now[key] += x.shape[:-1].numel()

    def gather(self, ranks: Ranks, unit: str) -> None:
        """Count what went into the experts on all ranks, now that the samples of each have passed."""
        counts = ranks.gather(self._counts, f"the experts of {unit}")
        for key in self._counts:
            self._counts[key] = sum(given[key] for given in counts)

    def _below(self) -> Iterator[tuple[ExpertLayer, int]]:
        """The experts that have not reached the quota."""
        for layer in self._layers:
            for number in layer.experts:
                if self._seen(layer.name, number) < self._minimum:
                    yield layer, number

    def _seen(self, layer: str, number: int) -> int:
        """The tokens that the statistics of an expert are made of."""
        return self._counts[layer, number] + self._extra[layer, number] + self._forced[layer, number]

    def add_extra(self, forwards: BlockForwards, observer: InputObserver, *, learn: bool = True) -> list[Any]:
        """Run the extra samples; experts below the quota learn from them until they have reached it.

        Args:
            learn: whether that is the business of this rank; all of them run the same samples.

        Returns:
            The outputs of the block, on the host.
        """
        for kept in self._kept:
            kept.stop()
        outputs: list[Any] = []
        for sample in range(forwards.extra):
            below = list(self._below())
            observer.only = {name for layer, number in below for name in layer.experts[number].values() if learn}
            before = self._now = dict.fromkeys(self._counts, 0)
            outputs.append(forwards.compute_extra(sample))
            for layer, number in below:
                self._extra[layer.name, number] += before[layer.name, number]
        return outputs

    def route(self, observer: InputObserver) -> None:
        """Give experts that are still below the quota tokens that were not routed to them; outputs are dropped."""
        for kept in self._kept:
            kept.stop()
            for number, linears in kept.layer.experts.items():
                missing = self._minimum - self._seen(kept.layer.name, number)
                if missing > 0:
                    observer.only = set(linears.values())
                    self._now = dict.fromkeys(self._counts, 0)
                    kept.route(number, missing)
                    self._forced[kept.layer.name, number] = self._now[kept.layer.name, number]

    def stop(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for kept in self._kept:
            kept.stop()

    def help_starved(self, statistics: Mapping[str, InputStatistics]) -> None:
        """Tell the statistics of experts that too few tokens reached what all experts of their layer saw."""
        for layer in self._layers:
            starved = [number for number in layer.experts if self._is_starved(layer.name, number)]
            for place in dict.fromkeys(place for number in starved for place in layer.experts[number]):
                names = [layer.experts[number][place] for number in starved if place in layer.experts[number]]
                seen = [found for name in names if (found := statistics.get(name)) is not None]
                if seen:
                    together = _together(statistics, layer.siblings(place))
                    for one in seen:
                        one.siblings = together

    def _is_starved(self, layer: str, number: int) -> bool:
        return self._seen(layer, number) < max(1, self._minimum)

    def barely_routed(self) -> frozenset[str]:
        """The linears of experts to which too few tokens of the samples themselves were routed."""
        few = [
            linears
            for layer in self._layers
            for number, linears in layer.experts.items()
            if self._counts[layer.name, number] < max(1, self._minimum)
        ]
        return frozenset(name for linears in few for name in linears.values())

    def records(self, plan: Plan) -> list[ExpertRecord]:
        """What is to be told of every layer."""
        return [self._record(layer, plan) for layer in self._layers]

    def _record(self, layer: ExpertLayer, plan: Plan) -> ExpertRecord:
        told: list[StarvedExpert] = []
        for number, linears in layer.experts.items():
            key = layer.name, number
            if self._counts[key] < max(1, self._minimum):
                starved = self._is_starved(*key)
                rules = dict.fromkeys(_rule(name, plan, starved) for name in linears.values())
                rule = "; ".join(filter(None, rules)) or (NOTHING_LEARNT if starved else None)
                told.append(StarvedExpert(number, self._counts[key], self._extra[key], self._forced[key], rule))
        counts = tuple(self._counts[layer.name, number] for number in layer.experts)
        return ExpertRecord(layer.name, counts, tuple(told))


def _together(statistics: Mapping[str, InputStatistics], names: Sequence[str]) -> InputStatistics:
    """Extremes of what these linears saw, as a whole and by channel; those with NaN or infinity raise by themselves."""
    whole = InputStatistics()
    for seen in {id(found): found for name in names if (found := statistics.get(name)) is not None}.values():
        if seen.tokens and seen.range.minimum > float("-inf") and seen.range.maximum < float("inf"):
            whole.range.merge(seen.range)
            whole.channels.merge(seen.channels)
    return whole


def _rule(name: str, plan: Plan, starved: bool) -> str:
    """By what rule a linear of an expert that was routed too few tokens is quantized; empty if as all others.

    Args:
        starved: whether its statistics are of too few tokens too.
    """
    assigned = plan.assignments.get(name)
    if assigned is None:
        return ""
    parts: list[str] = []
    if starved and assigned.kind.has_static_input:
        parts.append("input range of all experts of its layer")
    parts.append(weight_rule(assigned.kind, assigned.needs if starved else (), trained=name in plan.trained))
    return ", ".join(filter(None, parts))


def starved_warning(result: RunResult, quota: ExpertQuota | None) -> str | None:
    """One sentence on all experts for which a rule had to stand in; None if there are none."""
    starved = [
        (record.name, expert)
        for record in result.experts
        for expert in record.starved
        if expert.rule not in (None, NOTHING_LEARNT)
    ]
    if not starved:
        return None
    none = sum(not expert.tokens for _, expert in starved)
    few = len(starved) - none
    whom = [f"{none} by none"] * bool(none)
    whom += [f"{few} by fewer than {quota.minimum}"] if few and quota is not None else []
    layers = len({name for name, _ in starved})
    name, first = starved[0]
    helps = "" if quota is not None and quota.routes else ", and so does dataset.route_starved_experts"
    return (
        f"{len(starved)} experts of {layers} layers were reached by too few calibration tokens ({', '.join(whom)}), "
        f"e.g. {name}.{first.expert}; a rule stands in for what is not known of them: {first.rule}. The report lists "
        f"all; more samples help{helps}"
    )
