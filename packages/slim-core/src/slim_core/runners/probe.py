"""A probe: a sample of the work of a run is done to see how long all of it will take.

One unit of every kind is worked on by the code of the run, over a few samples and with one group of linears of every
kind, and what that took is put in proportion. Nothing of it stays: what is written goes to files without a name.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean
from tempfile import TemporaryFile
from typing import Any

import torch

from slim_core.checkpoint.reader import READING_AHEAD
from slim_core.checkpoint.staging import Staging
from slim_core.devices import free_host_memory
from slim_core.model.expert_weights import loaded
from slim_core.model.structure import kind_of
from slim_core.model.units import Unit
from slim_core.phases import Phase, Profile
from slim_core.runners.disk import existing_part
from slim_core.runners.division import chosen
from slim_core.runners.plan import Plan
from slim_core.runners.plan_text import likeness
from slim_core.runners.plan_time import PlannedTime
from slim_core.runners.probe_parts import (
    OutOfTimeError,
    Patience,
    SampledForwards,
    SampledLinears,
    nameless_writer,
    typical,
)
from slim_core.runners.records import RunResult
from slim_core.runners.run import prefetch
from slim_core.runners.spill import Spill
from slim_core.runners.unit_run import Bench, UnitRun

__all__ = ["ProbedSamples", "probe"]

_PATIENCE = 10.0  # seconds
_WRITTEN = 64 << 20
# Linux begins to write what has waited for so long, or if more than this share of the free memory waits.
_DIRTY_SECONDS, _KEPT_DIRTY = 30.0, 0.1
_TRAINING = "training"
Inputs = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class ProbedSamples:
    """What passes through the blocks in a run.

    Args:
        inputs: gives the samples, each when it is asked for.
        tokens: of each.
        extra: tokens of all extra samples for experts.
        stages: tokens of all samples of each stage ahead of the main one.
    """

    inputs: Callable[[], Inputs]
    tokens: Sequence[int] = ()
    extra: int = 0
    stages: Sequence[int] = ()


@dataclass
class _Cost:
    """Seconds that one unit takes in a run.

    Args:
        parts: by what is done.
        reading: of its weights, ahead of the work.
        guessed: those of the parts that were not measured.
    """

    parts: dict[str, float] = field(default_factory=dict[str, float])
    reading: float = 0.0
    guessed: float = 0.0

    def times(self, factor: float) -> _Cost:
        parts = {name: factor * seconds for name, seconds in self.parts.items()}
        return _Cost(parts, factor * self.reading, factor * self.guessed)


def probe(
    plan: Plan, save_path: Path, samples: ProbedSamples, *, quantized: bool = False, patience: float = _PATIENCE
) -> PlannedTime:
    """How long the run of a plan will take.

    Args:
        save_path: where the run will write; only the disk that it lies on counts.
        quantized: whether blocks are given what quantized ones made.
        patience: seconds after which nothing more is begun.

    Raises:
        SlimError: what would go wrong in the run, too.
        OSError: the disk refuses files.
    """
    began, folder = time.perf_counter(), existing_part(save_path)
    with _aside(), ExitStack() as stack:
        costs = _Probe(plan, folder, samples, quantized, patience, stack).costs()
    costs = _completed(plan, costs)
    parts: Counter[str] = Counter()
    for cost in costs:
        parts.update(cost.parts)
    guessed = sum(cost.guessed for cost in costs) / (parts.total() or 1.0)
    writing = plan.bytes_out * _seconds_to_write(folder) / _WRITTEN
    parts.update({Phase.WRITER: writing * _share_left(plan.bytes_out, parts.total())})
    rough = _TRAINING if any(processor.runs_block for processor in plan.processors) else ""
    reading = sum(cost.reading for cost in costs)
    return PlannedTime(dict(parts), reading, writing, time.perf_counter() - began, guessed, rough)


def _share_left(nbytes: int, seconds: float) -> float:
    """What share of bytes written over so many seconds is not on disk at the end, so that the run waits for it."""
    most = min(_KEPT_DIRTY * free_host_memory(), nbytes * _DIRTY_SECONDS / max(seconds, _DIRTY_SECONDS))
    return min(1.0, most / max(nbytes, 1))


@contextmanager
def _aside() -> Generator[None]:
    """Without gradients, remarks, or a trace in what is drawn at random later."""
    logger = logging.getLogger("slim")
    level, drawn = logger.level, torch.get_rng_state()
    logger.setLevel(logging.ERROR)
    try:
        with torch.no_grad():
            yield
    finally:
        logger.setLevel(level)
        torch.set_rng_state(drawn)


def _completed(plan: Plan, costs: Mapping[int, _Cost]) -> list[_Cost]:
    """The cost of every unit; of those that were not reached, in proportion to the bytes of the others."""
    complete: list[_Cost] = []
    for position, (unit, planned) in enumerate(zip(plan.model.units, plan.units, strict=True)):
        if position in costs:
            complete.append(costs[position])
            continue
        alike = [i for i in costs if (plan.model.units[i].stop is None) == (unit.stop is None)] or list(costs)
        known = sum(plan.units[i].bytes_in for i in alike) or 1
        shares = [costs[i].times(planned.bytes_in / known) for i in alike]
        guess = _Cost(reading=sum(share.reading for share in shares))
        for share in shares:
            for name, seconds in share.parts.items():
                guess.parts[name] = guess.parts.get(name, 0.0) + seconds
        guess.guessed = sum(guess.parts.values())
        complete.append(guess)
    return complete


def _seconds_to_write(folder: Path) -> float:
    """Until as many bytes as are tried are on the disk of a folder."""
    block = os.urandom(1 << 20)
    began = time.perf_counter()
    with TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(_WRITTEN // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    return time.perf_counter() - began


class _Probe:
    def __init__(
        self, plan: Plan, folder: Path, samples: ProbedSamples, quantized: bool, patience: float, stack: ExitStack
    ) -> None:
        self._plan, self._samples = plan, samples
        self._model = model = plan.model
        self._result = result = RunResult(folder)
        tried = replace(
            plan,
            processors=[processor for processor in plan.processors if not processor.runs_block],
            runner=replace(plan.runner, name="layer_wise", ranks=1, by_units=False),
            stages=(),
            experts=replace(plan.experts, quota=None),
        )
        self._patience = Patience(patience, result)
        self._linears = SampledLinears(plan, result)
        self._profile = profile = Profile()
        writer = nameless_writer(plan, folder, partial(profile.within, Phase.WRITER))
        stack.callback(writer.close)
        by_unit = {unit.name: [t for t in plan.output.tensors if t.unit == unit.name] for unit in model.units}
        staging = Staging.joined(folder, ())
        shared = model, tried, writer, staging, result, by_unit, quantized, self._linears, self._patience
        self._forwards = self._sampled(folder, stack) if plan.needs_data or plan.stages else None
        self._bench = Bench(*shared, self._forwards, profile=profile)
        self._kinds = [self._kind(position) for position in range(len(model.units))]

    def _sampled(self, folder: Path, stack: ExitStack) -> SampledForwards:
        numbers = typical(self._samples.tokens)
        tokens = [self._samples.tokens[number] for number in numbers]
        spill = Spill(folder) if self._plan.memory.spills else None
        inputs, device = chosen(self._samples.inputs(), numbers), self._plan.devices.first
        forwards = SampledForwards(self._model, inputs, tokens, device, self._plan.streams, spill)
        stack.enter_context(forwards)
        return forwards

    def _kind(self, position: int) -> Any:
        """Equal for units on which there is as much to do."""
        unit = self._model.units[position]
        return likeness(self._plan.units[position]), kind_of(self._model, unit) if unit.stop is not None else None

    def costs(self) -> dict[int, _Cost]:
        """By the positions of the units of all kinds that were reached."""
        units = self._model.units
        known: dict[Any, _Cost] = {}
        for position in sorted(range(len(units)), key=lambda i: (units[i].stop is None, i)):
            kind = self._kinds[position]
            if kind not in known and not (known and self._patience.over):
                known[kind] = self._cost(position)
        return {position: known[kind] for position, kind in enumerate(self._kinds) if kind in known}

    def _cost(self, position: int) -> _Cost:
        """Of one unit, which is worked on."""
        unit, bench, profile = self._model.units[position], self._bench, self._profile
        self._patience.begin()
        read = READING_AHEAD.seconds
        prefetch(bench, position)
        READING_AHEAD.wait()
        read = READING_AHEAD.seconds - read
        before, made, complete = profile.spent(), len(self._result.linears), True
        try:
            run = UnitRun(bench, unit, finished=False)
            if unit.stop is not None and self._forwards is not None:
                stops = [self._kinds[i] for i, one in enumerate(self._model.units) if one.stop is not None]
                self._forwards.turn_to(unit, self._kinds[position], stops)
                if unit.stop == 0:
                    device, by_expert = self._plan.devices.first, self._plan.memory.by_expert
                    with loaded(self._model, unit, device, by_expert=by_expert):
                        self._forwards.warm_up(unit)
                    before = profile.spent()
                run.calibrated(self._forwards)
            else:
                run.without_data()
        except OutOfTimeError:
            complete = False
        finally:
            self._model.unload([*unit.parameters, *unit.added])
        spent = profile.spent(before)
        records = {record.name: record.seconds for record in self._result.linears[made:]}
        return self._in_proportion(unit, spent, records, complete, read)

    def _in_proportion(
        self, unit: Unit, spent: Mapping[str, float], records: Mapping[str, float], complete: bool, read: float
    ) -> _Cost:
        """What all samples and all linears will take, given what some took."""
        runner, samples = self._plan.runner, self._samples
        linears, guessed = self._of_linears(unit, records)
        at_work, waited = spent.get(Phase.QUANTIZING, 0.0), spent.get(Phase.WRITER, 0.0)
        own = at_work / (at_work + waited or 1.0)  # the seconds of a linear are with those spent waiting for the disk
        linears, guessed = own * linears, own * guessed
        others = max(0.0, at_work + waited - sum(records.values())) if complete else 0.0
        cost = _Cost({Phase.QUANTIZING: (linears + others) / runner.ranks}, read, guessed / runner.ranks)
        if unit.stop is None or self._forwards is None:
            return cost
        loading, forwards = spent.get(Phase.LOADING, 0.0), spent.get(Phase.FORWARDS, 0.0)
        sharing = 1 if runner.by_units else runner.ranks
        each, once = self._forwards.of_a_token()
        ready = max(0.0, forwards - each * self._forwards.tokens_run)
        if self._plan.needs_data:
            tokens = sum(samples.tokens) + samples.extra
            cost.parts[Phase.LOADING] = loading
            cost.parts[Phase.FORWARDS] = ready + each * tokens / sharing
            cost.parts[Phase.RESHAPING] = spent.get(Phase.RESHAPING, 0.0)
        for tokens in samples.stages:
            ahead = loading + ready + once * tokens / runner.ranks
            cost.parts[Phase.STAGES] = cost.parts.get(Phase.STAGES, 0.0) + ahead
            cost.reading += read
        count, longest = len(samples.tokens), once * mean(samples.tokens)
        training = sum(processor.block_forwards(count) for processor in self._plan.processors) * longest
        if training:
            cost.parts[_TRAINING] = training / runner.ranks
        return cost

    def _of_linears(self, unit: Unit, records: Mapping[str, float]) -> tuple[float, float]:
        """Seconds of all linears, and those of them that are guessed by how much work there is."""
        measured, done, missing = 0.0, 0, 0
        for groups in self._linears.kinds(unit):
            complete = [group for group in groups if all(info.name in records for info in group)]
            begun = [made for group in groups if (made := [info for info in group if info.name in records])]
            at_work = sum(map(self._linears.work, begun))
            done += at_work
            if complete:
                measured += len(groups) * mean(sum(records[info.name] for info in group) for group in complete)
            else:
                measured += sum(records[info.name] for group in begun for info in group)
                missing += sum(map(self._linears.work, groups)) - at_work
        guessed = missing * sum(records.values()) / done if done else 0.0
        return measured + guessed, guessed
