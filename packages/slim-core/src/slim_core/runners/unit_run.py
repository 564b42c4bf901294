"""The work on one unit: it is loaded, observed while it runs, reshaped, quantized and written."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from slim_core.checkpoint.staging import Staging
from slim_core.checkpoint.writer import ShardedWriter
from slim_core.memory import give_back_freed_memory
from slim_core.model.expert_weights import ExpertsOnCall, ReadInTurn
from slim_core.model.experts import ExpertLayer
from slim_core.model.inputs import drop_input_scales, mul_scale_of
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import Unit
from slim_core.model.weights import UnitWeights
from slim_core.phases import Phase, Profile
from slim_core.processors.base import AttentionState, AttentionWork, LinearWork, UnitWork
from slim_core.quantization.attention import QuantizedAttention
from slim_core.quantization.layers import QuantizedLinear, ScaledInput
from slim_core.quantization.statistics import Hessian, InputObserver, InputStatistics, Need, TokenSample
from slim_core.quantization.statistics.attention import AttentionStatistics
from slim_core.ranks.group import ALONE, Ranks
from slim_core.runners.attention_run import attention_record, attention_work, ranges_for, statistics_for, taps_of
from slim_core.runners.calibration import BlockForwards
from slim_core.runners.division import Division, shares
from slim_core.runners.expert_tokens import ExpertTokens
from slim_core.runners.kept_block import KeptBlock
from slim_core.runners.plan import Plan
from slim_core.runners.plan_portions import portioned
from slim_core.runners.records import LinearRecord, RunResult
from slim_core.runners.reduction import reduced_attentions, reduced_inputs
from slim_core.runners.simulated import simulated, simulating_taps
from slim_core.savers.base import PlannedTensor

__all__ = ["Bench", "UnitRun"]

# Bytes of float32 weights after which the C library is told to return what it keeps of the blocks that were freed. Many
# small linears, as those of experts, leave it with far more than one of them takes. Sooner where a budget is narrow.
_TRIMMED_AFTER, _TRIMMED_SOON = 32 << 20, 8 << 20


@dataclass
class Bench:
    """The state of a run that its units share."""

    model: StreamedModel
    plan: Plan
    writer: ShardedWriter
    staging: Staging
    result: RunResult
    by_unit: dict[str, list[PlannedTensor]]
    propagate_quantized: bool
    division: Division
    ranks: Ranks = ALONE
    forwards: BlockForwards | None = None
    begins: int = 0  # the stop at which the samples are when the run begins
    profile: Profile = field(default_factory=Profile)

    @property
    def shared(self) -> Ranks:
        """Those that work on a unit together."""
        return ALONE if self.division.by_units else self.ranks


@dataclass
class _Observed:
    """What was seen of a block: the inputs of its linears, the states of its attentions that are quantized, the ranges
    of states that processors asked for, and where tokens went; and what it made of the extra samples."""

    inputs: dict[str, InputStatistics] = field(default_factory=dict[str, InputStatistics])
    states: dict[str, AttentionStatistics] = field(default_factory=dict[str, AttentionStatistics])
    ranges: dict[str, AttentionStatistics] = field(default_factory=dict[str, AttentionStatistics])
    experts: ExpertTokens | None = None
    extra: list[Any] = field(default_factory=list[Any])


@dataclass(frozen=True)
class _Watched:
    """What is to be observed: needs by linear, which attentions that are quantized, ranges of states, and whether to
    look after experts."""

    requests: Mapping[str, frozenset[Need]] = field(default_factory=dict[str, frozenset[Need]])
    attention: Callable[[str], bool] = lambda _name: False
    states: Collection[AttentionState] = ()
    experts: bool = False


class UnitRun:
    """One unit of a run.

    Args:
        finished: an interrupted run has already written it, or another rank does; it is worked on only if the next
            block must see it.
    """

    def __init__(self, bench: Bench, unit: Unit, *, finished: bool) -> None:
        self._bench = bench
        self._unit = unit
        self._write = not finished
        self._layers: dict[str, QuantizedLinear] = {}
        self._attentions: dict[str, QuantizedAttention] = {}
        self._waiting: Counter[int] = Counter()
        self._began = time.monotonic()
        self._worked_on = 0

    def without_data(self) -> None:
        """Quantize from the weights alone."""
        if self._write:
            work = self._work(_Observed())
            if self._unit.mirrors:
                unseen = InputStatistics(siblings=InputStatistics())
                work.statistics = dict.fromkeys(work.linears, unseen)
                work.starved = frozenset(work.linears)
            with self._bench.profile.within(Phase.QUANTIZING):
                self._quantize(work)

    def calibrated(self, forwards: BlockForwards) -> None:
        """Observe the block while it runs, quantize it, and hand its exact or its quantized outputs on."""
        unit, plan = self._unit, self._bench.plan
        layers = self._layers_of_experts if plan.memory.by_expert else ()
        parameters = [*unit.parameters, *unit.added]
        on_call = ExpertsOnCall(self._bench.model, layers, parameters, plan.devices.first)
        with self._bench.profile.within(Phase.FORWARDS), on_call:
            self._calibrated(forwards, on_call)

    def _calibrated(self, forwards: BlockForwards, on_call: ExpertsOnCall) -> None:
        bench, plan, unit = self._bench, self._bench.plan, self._unit
        device = plan.devices.first
        forwards.reach(unit)
        with bench.profile.within(Phase.LOADING):
            bench.model.load((name for name in unit.parameters if name not in on_call.owners), device)
        forwards.divide(portioned(bench.model, unit, plan.requests))
        forwards.follow()
        works = self._write or bench.propagate_quantized
        fresh, again = (self._fresh(), self._fresh_states()) if works else ({}, frozenset[str]())
        keep = works and (bool(fresh or again) or any(processor.runs_block for processor in plan.processors))
        targets: list[Any] = []
        observed, experts = _Observed(), None
        requests = {name: needs - fresh.get(name, frozenset()) for name, needs in plan.requests.items()}
        observes = plan.streams == 1 or (works and self._observes(requests))
        if plan.streams > 1:
            experts = None if observes else self._watch_experts(forwards)
            targets = forwards.run(hand_on=True, stream=0, keep=keep)
            self._gather_tokens(experts)
        if observes:
            hand_on = not (bench.propagate_quantized or keep)
            watched = _Watched(requests, lambda name: name not in again, plan.states, True) if works else _Watched()
            observed, outputs = self._observe(forwards, watched, hand_on, keep and plan.streams == 1)
            targets = targets or outputs
            if (experts := observed.experts) is not None:
                experts.help_starved(observed.inputs)
        self._note_experts(experts)
        if not bench.propagate_quantized and not observed.extra:
            observed.extra = [forwards.compute_extra(sample) for sample in range(forwards.extra)]
        live = bool(fresh or again) or keep or bench.propagate_quantized
        self._has_run(again=live)
        if works:
            work = self._work(observed, on_call, live=live)
            work.starved = experts.barely_routed() if experts is not None else frozenset()
            work.block = KeptBlock(bench.model, forwards, targets, device) if keep else None
            with bench.profile.within(Phase.RESHAPING):
                self._reshape(work)
            if fresh or again:
                watched = _Watched(fresh, again.__contains__, experts=bool(fresh))
                anew, _ = self._observe(forwards, watched, hand_on=False, keep=False)
                work.statistics.update(_joined(work.statistics, anew.inputs))
                work.attentions.update(attention_work(unit, plan.attentions, anew.states, again))
            with bench.profile.within(Phase.QUANTIZING):
                self._quantize(work)
        if (quota := plan.experts.quota) is not None and unit.name == quota.units[-1]:
            forwards.drop_extra()
        if bench.propagate_quantized:
            on_call.leave()
            drop_input_scales(bench.model.module, unit.added)  # the quantized layers have them
            taps = simulating_taps(self._attentions, device)
            with simulated(bench.model.module, self._layers, device), bench.model.tapped(taps):
                forwards.run(hand_on=True)
                forwards.hand_on_extra([forwards.compute_extra(sample) for sample in range(forwards.extra)])
        elif keep:
            forwards.hand_on(targets)
        if not bench.propagate_quantized and forwards.extra:
            forwards.hand_on_extra(observed.extra)
        bench.result.block_forwards = forwards.count
        if not plan.runner.keeps_model:
            bench.model.unload([*unit.parameters, *unit.added])

    def _has_run(self, *, again: bool) -> None:
        """The block need not be in memory any more, unless it is run again; nor what came and went inside it."""
        if not (again or self._bench.plan.runner.keeps_model):
            self._bench.model.unload(self._unit.parameters)
        give_back_freed_memory()

    @property
    def _layers_of_experts(self) -> Sequence[ExpertLayer]:
        return self._bench.plan.experts.layers.get(self._unit.name, ())

    def _watch_experts(self, forwards: BlockForwards) -> ExpertTokens | None:
        if not self._layers_of_experts:
            return None
        quota, module = self._bench.plan.experts.quota, self._bench.model.module
        if quota is None or self._unit.name not in quota.units:
            return ExpertTokens(module, self._layers_of_experts)
        tokens = forwards.tokens() if quota.routes else None
        return ExpertTokens(module, self._layers_of_experts, quota.minimum, tokens)

    def _gather_tokens(self, experts: ExpertTokens | None) -> None:
        """The samples of all ranks have passed."""
        if experts is not None:
            experts.gather(self._bench.shared, self._unit.name)

    def _note_experts(self, experts: ExpertTokens | None) -> None:
        if experts is not None:
            experts.stop()
            if self._write and self._bench.shared.first:
                self._bench.result.experts += experts.records(self._bench.plan)

    def _fresh(self) -> dict[str, frozenset[Need]]:
        """What must be observed once more after the block was reshaped."""
        names = {info.name for info in self._unit.linears}
        return {name: needs for name, needs in self._bench.plan.fresh.items() if name in names}

    def _fresh_states(self) -> frozenset[str]:
        """Attentions whose states must wait for that too."""
        return self._bench.plan.fresh_states & {info.name for info in self._unit.attentions}

    def _observes(self, requests: Mapping[str, frozenset[Need]]) -> bool:
        states = any(
            assigned.form.needs_data
            for info in self._unit.attentions
            if (assigned := self._bench.plan.attentions.get(info.name)) is not None
        )
        asked = bool(ranges_for(self._unit, self._bench.plan.states))
        return states or asked or any(requests.get(info.name) for info in self._unit.linears)

    def _observe(
        self, forwards: BlockForwards, watched: _Watched, hand_on: bool, keep: bool
    ) -> tuple[_Observed, list[Any]]:
        """Run the block for every sample and watch what was asked for."""
        model, plan, observer = self._bench.model, self._bench.plan, InputObserver()
        for info in self._unit.linears:
            if needs := watched.requests.get(info.name):
                observer.watch(info.name, model.module.get_submodule(info.name), needs)
        shared = self._bench.shared
        tokens = sum(shared.gather(forwards.attended(), self._unit.name)) if self._unit.attentions else 0
        seen = statistics_for(self._unit, plan.attentions, tokens, watched.attention)
        ranges = ranges_for(self._unit, watched.states)
        experts = self._watch_experts(forwards) if watched.experts else None
        with model.tapped(taps_of(seen, ranges)):
            outputs = forwards.run(hand_on=hand_on, keep=keep)
        extra: list[Any] = []
        if experts is not None:
            self._gather_tokens(experts)
            extra = experts.add_extra(forwards, observer, learn=shared.first)
            experts.route(observer)
            experts.stop()
        observer.stop()
        name, device = self._unit.name, plan.devices.first
        widths = {info.name: info.in_features for info in self._unit.linears}
        owner_of = partial(self._bench.division.owner, name)
        inputs = reduced_inputs(observer, widths, shared, owner_of, device, name)
        seen, ranges = (reduced_attentions(found, shared, name) for found in (seen, ranges))
        return _Observed(inputs, seen, ranges, experts, extra), outputs

    def _work(self, observed: _Observed, on_call: ExpertsOnCall | None = None, *, live: bool = False) -> UnitWork:
        """The unit on the bench; its module is given what processors make of its weights if it is run once more."""
        bench, unit, plan = self._bench, self._unit, self._bench.plan
        device = plan.devices.first
        deferred = on_call.owners if on_call is not None else {}
        owners = {unit.parameters[name]: key for name, key in deferred.items() if name in unit.parameters}
        source = ReadInTurn(bench.model.source, owners) if owners else None
        weights = UnitWeights(bench.model, unit, live=live, device=device, deferred=deferred, source=source)
        if on_call is not None:
            on_call.leave()
            on_call.weights = weights
        linears = {
            info.name: LinearWork(info, weights[f"{info.name}.weight"], None, plan.assignments[info.name])
            for info in unit.linears
            if info.name in plan.assignments
        }
        # Nothing that the work holds may hold the work, or statistics would outlive the unit.
        finish = partial(self._finish, observed.inputs, weights)
        work = UnitWork(unit.name, linears, observed.inputs, bench.plan.saver.engine_dtype(bench.model), device, finish)
        work.attentions = attention_work(unit, plan.attentions, observed.states)
        work.states = observed.ranges
        work.finish_attention = self._finish_attention
        work.weights = weights
        work.divided = partial(_divided, bench.shared, unit.name)
        if self._write and bench.shared.first:
            work.note = bench.result.smoothed.append
        return work

    def _reshape(self, work: UnitWork) -> None:
        for processor in self._bench.plan.processors:
            if processor.reshapes:
                processor.process(work)

    def _quantize(self, work: UnitWork) -> None:
        """Let the other processors work, and write what they leave alone."""
        bench = self._bench
        assert work.weights is not None
        work.weights.fill()
        division, unit = bench.division, self._unit.name
        work.linears = {name: linear for name, linear in work.linears.items() if division.makes(unit, name)}
        self._waiting = Counter(id(work.statistics[name]) for name in work.linears if name in work.statistics)
        self._began = time.monotonic()  # the time of a linear is its own, without the forwards of its block
        for processor in bench.plan.processors:
            if not processor.reshapes:
                processor.process(work)
        if bench.propagate_quantized and bench.shared.size > 1 and self._unit.stop is not None:
            self._exchange()
        if self._write and division.keeper(unit) == division.rank:
            tensors = [tensor for tensor in bench.by_unit[unit] if tensor.owner is None]
            bench.plan.saver.write_untouched(bench.writer, bench.model, self._unit, work.weights, tensors)

    def _exchange(self) -> None:
        """Give every rank the quantized linears that others have made, for the forward through them."""
        bench, unit = self._bench, self._unit.name
        for info in self._unit.linears:
            if info.name in bench.plan.assignments:
                owner, own = bench.division.owner(unit, info.name), self._layers.get(info.name)
                layer = bench.ranks.broadcast(own, owner, f"the quantized {info.name}")
                if layer is not None:
                    self._layers[info.name] = layer

    def _finish(
        self,
        statistics: Mapping[str, InputStatistics],
        weights: UnitWeights,
        linear: LinearWork,
        layer: QuantizedLinear,
        sqnr_db: float,
    ) -> None:
        bench, name = self._bench, linear.info.name
        bench.ranks.tick(name)
        if (factor := mul_scale_of(name)) in weights:
            layer = ScaledInput(layer, weights[factor].stored_form())
        seen = statistics.get(name)
        self._worked_on += 4 * linear.info.in_features * linear.info.out_features
        limit = _TRIMMED_SOON if bench.plan.memory.by_expert else _TRIMMED_AFTER
        if bench.plan.needs_data and self._worked_on >= limit:
            self._worked_on = 0
            give_back_freed_memory()
        if self._write:
            bench.plan.saver.write_layer(bench.writer, linear.info, layer)
            low, high = (seen.range.minimum, seen.range.maximum) if seen and seen.tokens else (None, None)
            seconds, self._began = time.monotonic() - self._began, time.monotonic()
            tokens = seen.tokens if seen else None
            bench.result.linears.append(LinearRecord(name, str(layer.kind), sqnr_db, low, high, tokens, seconds))
        if bench.propagate_quantized:
            self._layers[name] = layer
        if not weights.live:
            linear.weight.release()
        if seen is not None:
            self._waiting[id(seen)] -= 1
            if not self._waiting[id(seen)]:  # the last linear with this input: what took the most memory goes
                seen.hessian, seen.kept = Hessian(), TokenSample(0)

    def _finish_attention(self, work: AttentionWork, quantized: QuantizedAttention) -> None:
        bench = self._bench
        if self._write and bench.division.owns(self._unit.name, work.info.name):
            bench.plan.saver.write_attention(bench.writer, work.info, quantized)
            bench.result.attentions.append(attention_record(work))
        if bench.propagate_quantized:
            self._attentions[work.info.name] = quantized


def _divided(ranks: Ranks, unit: str, sizes: Sequence[int], jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """What jobs give that the ranks share."""
    if ranks.size == 1:
        return [job() for job in jobs]
    owners = shares(sizes, ranks.size)
    done: dict[int, Any] = {}
    for number, (owner, job) in enumerate(zip(owners, jobs, strict=True)):
        if owner == ranks.rank:
            done[number] = job()
            ranks.tick()
    every: dict[int, Any] = {}
    for given in ranks.gather(done, f"the scales of {unit}"):
        every |= given
    return [every[number] for number in range(len(jobs))]


def _joined(old: Mapping[str, InputStatistics], new: Mapping[str, InputStatistics]) -> dict[str, InputStatistics]:
    """What was observed anew, with all that the first observation had besides."""
    joined = dict(new)
    for name, seen in new.items():
        if (before := old.get(name)) is not None:
            if before.is_starved:
                joined[name] = before
                continue
            if before.tokens and not seen.tokens:  # scales are rounded, and by a hair the router chose another expert
                seen.siblings = before
            seen.needs |= before.needs
            seen.channels, seen.hessian, seen.kept = before.channels, before.hessian, before.kept
    return joined
