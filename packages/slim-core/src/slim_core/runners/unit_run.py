"""The work on one unit: it is loaded, observed while it runs, reshaped, quantized and written."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from slim_core.checkpoint.staging import Staging
from slim_core.checkpoint.writer import ShardedWriter
from slim_core.model.units import StreamedModel, Unit
from slim_core.model.weights import UnitWeights
from slim_core.processors.base import AttentionWork, LinearWork, StateRequest, UnitWork
from slim_core.quantization.attention import QuantizedAttention
from slim_core.quantization.layers import QuantizedLinear
from slim_core.quantization.statistics import InputObserver, InputStatistics, Need
from slim_core.quantization.statistics.attention import AttentionStatistics
from slim_core.runners.attention_run import attention_record, attention_work, ranges_for, statistics_for, taps_of
from slim_core.runners.calibration import BlockForwards, KeptBlock, simulated, simulating_taps
from slim_core.runners.plan import Plan
from slim_core.runners.records import LinearRecord, RunResult
from slim_core.savers.base import PlannedTensor

__all__ = ["Bench", "UnitRun"]


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
    forwards: BlockForwards | None = None


@dataclass
class _Observed:
    """What was seen of a block: the inputs of its linears, the states of its attentions that are quantized, and the
    ranges of states that processors asked for."""

    inputs: dict[str, InputStatistics] = field(default_factory=dict[str, InputStatistics])
    states: dict[str, AttentionStatistics] = field(default_factory=dict[str, AttentionStatistics])
    ranges: dict[str, AttentionStatistics] = field(default_factory=dict[str, AttentionStatistics])


@dataclass(frozen=True)
class _Watched:
    """What is to be observed: needs by linear, which attentions that are quantized, and ranges of states."""

    requests: Mapping[str, frozenset[Need]] = field(default_factory=dict[str, frozenset[Need]])
    attention: Callable[[str], bool] = lambda _name: False
    states: Collection[StateRequest] = ()


class UnitRun:
    """One unit of a run.

    Args:
        finished: an interrupted run has already written it; it is worked on only if the next block must see it.
    """

    def __init__(self, bench: Bench, unit: Unit, *, finished: bool) -> None:
        self._bench = bench
        self._unit = unit
        self._write = not finished
        self._layers: dict[str, QuantizedLinear] = {}
        self._attentions: dict[str, QuantizedAttention] = {}
        self._began = time.monotonic()

    def without_data(self) -> None:
        """Quantize from the weights alone."""
        if self._write:
            self._quantize(self._work(_Observed(), live=False))

    def calibrated(self, forwards: BlockForwards) -> None:
        """Observe the block while it runs, quantize it, and hand its exact or its quantized outputs on."""
        bench, plan, unit = self._bench, self._bench.plan, self._unit
        device = plan.devices.first
        bench.model.load(unit.parameters, device)
        works = self._write or bench.propagate_quantized
        fresh, again = (self._fresh(), self._fresh_states()) if works else ({}, frozenset[str]())
        keep = works and (bool(fresh or again) or any(processor.runs_block for processor in plan.processors))
        targets: list[Any] = []
        if plan.streams > 1:
            targets = forwards.run(hand_on=True, stream=0, keep=keep)
        observed = _Observed()
        requests = {name: needs - fresh.get(name, frozenset()) for name, needs in plan.requests.items()}
        if plan.streams == 1 or (works and self._observes(requests)):
            hand_on = not (bench.propagate_quantized or keep)
            watched = _Watched(requests, lambda name: name not in again, plan.states) if works else _Watched()
            observed, outputs = self._observe(forwards, watched, hand_on, keep and plan.streams == 1)
            targets = targets or outputs
        if works:
            work = self._work(observed, live=True)
            work.block = KeptBlock(bench.model, forwards, targets, device) if keep else None
            self._reshape(work)
            if fresh or again:
                anew, _ = self._observe(forwards, _Watched(fresh, again.__contains__), hand_on=False, keep=False)
                work.statistics.update(_joined(work.statistics, anew.inputs))
                work.attentions.update(attention_work(unit, plan.attentions, anew.states, again))
            self._quantize(work)
        if bench.propagate_quantized:
            taps = simulating_taps(self._attentions, device)
            with simulated(bench.model.module, self._layers, device), bench.model.tapped(taps):
                forwards.run(hand_on=True)
        elif keep:
            forwards.hand_on(targets)
        bench.result.block_forwards = forwards.count
        if not plan.runner.keeps_model:
            bench.model.unload([*unit.parameters, *unit.added])

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
        seen = statistics_for(self._unit, plan.attentions, forwards.tokens(), watched.attention)
        ranges = ranges_for(self._unit, watched.states)
        with model.tapped(taps_of(seen, ranges)):
            outputs = forwards.run(hand_on=hand_on, keep=keep)
        observer.stop()
        return _Observed(observer.statistics, seen, ranges), outputs

    def _work(self, observed: _Observed, *, live: bool) -> UnitWork:
        bench, unit, plan = self._bench, self._unit, self._bench.plan
        device = plan.devices.first
        weights = UnitWeights(bench.model, unit, live=live, device=device)
        linears = {
            info.name: LinearWork(info, weights[f"{info.name}.weight"], None, plan.assignments[info.name])
            for info in unit.linears
            if info.name in plan.assignments
        }

        def finish(linear: LinearWork, layer: QuantizedLinear, sqnr_db: float) -> None:
            self._finish(work, linear, layer, sqnr_db)

        work = UnitWork(unit.name, linears, observed.inputs, bench.model.dtype, device, finish)
        work.attentions = attention_work(unit, plan.attentions, observed.states)
        work.states = observed.ranges
        work.finish_attention = self._finish_attention
        work.weights = weights
        if self._write:
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
        for processor in bench.plan.processors:
            if not processor.reshapes:
                processor.process(work)
        if self._write:
            tensors = [tensor for tensor in bench.by_unit[self._unit.name] if tensor.owner is None]
            bench.plan.saver.write_untouched(bench.writer, bench.model, self._unit, work.weights, tensors)

    def _finish(self, work: UnitWork, linear: LinearWork, layer: QuantizedLinear, sqnr_db: float) -> None:
        bench, name = self._bench, linear.info.name
        if self._write:
            bench.plan.saver.write_layer(bench.writer, linear.info, layer)
            seen = work.statistics.get(name)
            low, high = (seen.range.minimum, seen.range.maximum) if seen and seen.tokens else (None, None)
            seconds, self._began = time.monotonic() - self._began, time.monotonic()
            tokens = seen.tokens if seen else None
            bench.result.linears.append(LinearRecord(name, str(layer.kind), sqnr_db, low, high, tokens, seconds))
        if bench.propagate_quantized:
            self._layers[name] = layer
        if bench.forwards is None:
            linear.weight.release()

    def _finish_attention(self, work: AttentionWork, quantized: QuantizedAttention) -> None:
        bench = self._bench
        if self._write:
            bench.plan.saver.write_attention(bench.writer, work.info, quantized)
            bench.result.attentions.append(attention_record(work))
        if bench.propagate_quantized:
            self._attentions[work.info.name] = quantized


def _joined(old: Mapping[str, InputStatistics], new: Mapping[str, InputStatistics]) -> dict[str, InputStatistics]:
    """What was observed anew, with all that the first observation had besides."""
    for name, seen in new.items():
        if (before := old.get(name)) is not None:
            seen.needs |= before.needs
            seen.channels, seen.hessian, seen.kept = before.channels, before.hessian, before.kept
    return dict(new)
