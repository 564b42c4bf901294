"""Stand-ins with which a probe does a sample of a run: some of the linears and samples, files without a name."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from slim_core.checkpoint.header import StoredTensor
from slim_core.checkpoint.writer import ShardedWriter
from slim_core.model.streamed import StreamedModel
from slim_core.model.units import LinearInfo, Unit
from slim_core.quantization.statistics import Need
from slim_core.quantization.statistics.inputs import SAMPLED_TOKENS
from slim_core.ranks.group import Ranks
from slim_core.runners.calibration import BlockForwards
from slim_core.runners.division import Division
from slim_core.runners.plan import Plan
from slim_core.runners.prediction import input_of
from slim_core.runners.records import RunResult
from slim_core.runners.spill import Spill

__all__ = ["OutOfTimeError", "Patience", "SampledForwards", "SampledLinears", "nameless_writer", "typical"]

_ALIKE = 4  # so many of equal groups of linears, such as those of experts, are made: some are worked on side by side
_FEWEST, _MOST = 3, 8  # samples


class OutOfTimeError(Exception):
    """The probe has taken long enough."""


class Patience(Ranks):
    """One rank, which gives up a unit when the time is over, but not before a linear of it was made.

    Args:
        result: where linears are noted.
    """

    def __init__(self, seconds: float, result: RunResult) -> None:
        super().__init__()
        self._ends = time.monotonic() + seconds
        self._result = result
        self._before = 0

    @property
    def over(self) -> bool:
        return time.monotonic() > self._ends

    def begin(self) -> None:
        """With another unit."""
        self._before = len(self._result.linears)

    def tick(self, where: str | None = None) -> None:
        if self.over and len(self._result.linears) > self._before:
            raise OutOfTimeError


class SampledLinears(Division):
    """Of the linears of a unit that are quantized, some of every kind are made.

    A group are linears that share their input; groups are of one kind if their linears have the same shapes and become
    the same. Of experts those are taken that most tokens have reached.
    """

    def __init__(self, plan: Plan, result: RunResult) -> None:
        super().__init__(replace(plan, runner=replace(plan.runner, ranks=1, by_units=False)), 0)
        self._plan = plan
        self._result = result
        self._chosen: dict[str, frozenset[str]] = {}

    def kinds(self, unit: Unit) -> list[list[list[LinearInfo]]]:
        """The groups of a unit, by kind."""
        groups: dict[Any, list[LinearInfo]] = {}
        for info in unit.linears:
            if info.name in self._plan.assignments and info.name not in self._plan.trained:
                groups.setdefault(input_of(info), []).append(info)
        kinds: dict[Any, list[list[LinearInfo]]] = {}
        for group in groups.values():
            kinds.setdefault(tuple(map(self._likeness, group)), []).append(group)
        return list(kinds.values())

    def _likeness(self, info: LinearInfo) -> Any:
        assigned = self._plan.assignments[info.name]
        return info.out_features, info.in_features, assigned.kind, assigned.position

    def work(self, group: Sequence[LinearInfo]) -> int:
        """Products of numbers that a group takes, or nearly: each weight once, or against its row of a Hessian."""
        solved = {info.name for info in group if Need.HESSIAN in self._plan.assignments[info.name].needs}
        return sum(
            info.out_features * info.in_features * (info.in_features if info.name in solved else 1) for info in group
        )

    def makes(self, unit: str, name: str) -> bool:
        if unit not in self._chosen:
            reached = self._reached(unit)
            best = [
                sorted(groups, key=lambda group: -reached.get(group[0].name, 0))[:_ALIKE]
                for groups in self.kinds(self._units[unit])
            ]
            self._chosen[unit] = frozenset(info.name for groups in best for group in groups for info in group)
        return name in self._chosen[unit]

    def _reached(self, unit: str) -> dict[str, int]:
        """How many tokens have reached each linear of an expert."""
        counts = {record.name: record.counts for record in self._result.experts}
        return {
            name: count
            for layer in self._plan.experts.layers.get(unit, ())
            for linears, count in zip(layer.experts.values(), counts.get(layer.name, ()), strict=False)
            for name in linears.values()
        }


class SampledForwards(BlockForwards):
    """Some samples, which notes how long each takes, and which pass blocks by.

    Args:
        tokens: of each of these samples.
    """

    def __init__(
        self,
        model: StreamedModel,
        inputs: Sequence[Mapping[str, Any]],
        tokens: Sequence[int],
        device: torch.device,
        streams: int,
        spill: Spill | None,
    ) -> None:
        super().__init__(model, inputs, device, streams, spill=spill)
        self._tokens = tokens
        self._spent = [0.0] * len(inputs)
        self._passes = [0] * len(inputs)
        self._outputs: dict[Any, dict[int, Any]] = {}
        self._kind: Any = None
        self._starting = 0.0

    def turn_to(self, unit: Unit, kind: Any, kinds: Sequence[Any]) -> None:
        """Bring all samples to a unit: blocks ahead of it give what the last one of their kind gave.

        Args:
            kind: of the unit.
            kinds: by the stops of the model.
        """
        assert unit.stop is not None
        for index in range(len(self._carried)):
            while (call := self._forward.call(index)).block < unit.stop:
                self._forward.resume(index, self._outputs[kinds[call.block]][index])
        self._kind, self._starting = kind, 0.0
        self._forget()

    def _forget(self) -> None:
        self._spent, self._passes = [0.0] * self.samples, [0] * self.samples

    def warm_up(self, unit: Unit) -> None:
        """Run a unit once, which is loaded, for what libraries make ready at the first forward of a process."""
        self.reach(unit)
        self._on_host(0)
        self._forget()

    def _all_started(self) -> None:
        began = time.perf_counter()
        super()._all_started()
        self._starting += time.perf_counter() - began

    def _on_host(self, index: int) -> Any:
        began = time.perf_counter()
        output = super()._on_host(index)
        self._spent[index % self.samples] += time.perf_counter() - began
        self._passes[index % self.samples] += 1
        return output

    def _resume(self, index: int, output: Any) -> None:
        began = time.perf_counter()
        super()._resume(index, output)
        self._spent[index % self.samples] += time.perf_counter() - began
        self._outputs.setdefault(self._kind, {})[index] = output

    def of_a_token(self) -> tuple[float, float]:
        """Seconds of the unit for each token, in all its forwards and in one of them.

        The first sample does not count if there are others: it is slower, since all that follows is made ready.
        """
        warm = range(1, self.samples) if self.samples > 1 else range(1)
        tokens = max(1, sum(self._tokens[sample] for sample in warm))
        spent = sum(self._spent[sample] for sample in warm) / tokens
        passes = max(1, max(self._passes))
        starting = self._starting / max(1, sum(self._tokens))
        return spent + starting, spent / passes

    @property
    def tokens_run(self) -> int:
        return sum(self._tokens)


def typical(tokens: Sequence[int]) -> list[int]:
    """The numbers of a few samples that are about as long as the mean."""
    mean = sum(tokens) / max(1, len(tokens))
    nearest = sorted(range(len(tokens)), key=lambda number: (abs(tokens[number] - mean), number))
    count = _FEWEST
    while count < _MOST and sum(tokens[number] for number in nearest[:count]) < SAMPLED_TOKENS:
        count += 1
    return sorted(nearest[:count])


class _Writer(ShardedWriter):
    """What is copied from file to file costs the thread that does the work nothing, so it is left out."""

    def copy(self, name: str, stored: StoredTensor) -> None:
        del name, stored


def nameless_writer(plan: Plan, folder: Path, waiting: Any) -> ShardedWriter:
    """A writer of the output of a plan into files that are gone when it is closed, or the process ends."""
    with TemporaryDirectory(prefix=".slim-probe-", dir=folder) as scratch:
        return _Writer(Path(scratch), plan.output.shards, waiting=waiting)
