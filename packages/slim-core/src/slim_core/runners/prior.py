"""Stages ahead of the main one: they look at the prepared model while it runs, and leave what they learn from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from slim_core.errors import UnsupportedError
from slim_core.logging import get_logger
from slim_core.model.expert_weights import loaded
from slim_core.model.streamed import StreamedModel
from slim_core.processors.base import Processor, create_processor
from slim_core.progress import Progress
from slim_core.quantization.statistics import InputObserver, InputStatistics, Need
from slim_core.ranks.group import ALONE, Ranks
from slim_core.recipe import SpecV1
from slim_core.recipe.schema import DatasetConfig
from slim_core.runners.calibration import BlockForwards
from slim_core.runners.division import part_of
from slim_core.runners.plan_portions import portioned
from slim_core.runners.reduction import reduced_inputs

__all__ = ["LEARNED_FILE", "PlannedStage", "StageInputs", "keep_learned", "learned_before", "plan_stages", "run_stages"]

LEARNED_FILE = "learned.safetensors"
StageInputs = Callable[[DatasetConfig], Sequence[Mapping[str, Any]]]
_logger = get_logger(__name__)
_library: Any = safetensors.torch


@dataclass(frozen=True)
class PlannedStage:
    """A stage ahead of the main one.

    Args:
        position: where the recipe has it, e.g. ``prior[0]``.
        watched: for each processor, the linears whose inputs it is shown, and how many tokens of each.
        dataset: its calibration set.
    """

    position: str
    processors: tuple[Processor, ...]
    watched: tuple[Mapping[str, int], ...]
    dataset: DatasetConfig

    @property
    def tokens(self) -> dict[str, int]:
        """How many tokens to keep of the input of each linear."""
        most: dict[str, int] = {}
        for wanted in self.watched:
            for name, count in wanted.items():
                most[name] = max(count, most.get(name, 0))
        return most

    def working_bytes(self, model: StreamedModel) -> int:
        """Memory that the tokens kept take."""
        widths = {name: model.module.get_parameter(f"{name}.weight").shape[1] for name in self.tokens}
        return sum(4 * count * widths[name] for name, count in self.tokens.items())


def plan_stages(spec: SpecV1, model: StreamedModel, followers: Sequence[Processor]) -> tuple[PlannedStage, ...]:
    """The stages ahead of the main one.

    Args:
        model: as the processors of the main stage have prepared it.
        followers: those processors.

    Raises:
        UnsupportedError: a processor stands in a stage to which it has nothing to contribute.
        SlimError: whatever a processor has to object.
    """
    linears = [info for unit in model.units for info in unit.linears]
    stages: list[PlannedStage] = []
    for i, stage in enumerate(spec.prior):
        position = f"prior[{i}]"
        named = [create_processor(config, f"{position}.process[{j}]") for j, config in enumerate(stage.process)]
        processors = [leaf for processor in named for leaf in processor.leaves()]
        for processor in processors:
            if not processor.learns:
                raise UnsupportedError(
                    f"{processor.config.type} learns nothing that the main stage could use",
                    where=f"spec.{processor.position}",
                    remedy="move it to process",
                )
        watched = tuple(processor.watches(linears, followers) for processor in processors)
        stages.append(PlannedStage(position, tuple(processors), watched, stage.dataset or spec.dataset))
    return tuple(stages)


def run_stages(
    stages: Sequence[PlannedStage],
    model: StreamedModel,
    inputs: StageInputs,
    device: torch.device,
    progress: Progress,
    *,
    by_expert: bool = False,
    ranks: Ranks = ALONE,
    tokens: Callable[[DatasetConfig], Sequence[int]] = lambda _: (),
) -> tuple[dict[str, Tensor], int]:
    """Carry out the stages.

    Args:
        by_expert: have the weights of one routed expert at a time in memory.
        ranks: who runs the samples; the first of them learns.
        tokens: gives the tokens of every sample of a calibration set.

    Returns:
        What was learned, by name, and how many forward passes of single blocks it took.
    """
    learned: dict[str, Tensor] = {}
    forwards = 0
    for stage in stages:
        with torch.no_grad():
            mine = part_of(inputs(stage.dataset), tokens(stage.dataset), ranks.rank, ranks.size)
            seen, count = _observe(stage, model, mine, device, progress, by_expert, ranks)
        forwards += sum(ranks.gather(count, stage.position))
        if not ranks.first:
            continue
        samples = {id(statistics): statistics.kept.tokens() for statistics in seen.values() if statistics.tokens}
        for processor, watched in zip(stage.processors, stage.watched, strict=True):
            shown = {name: samples[id(seen[name])] for name in watched if seen[name].tokens}
            learned |= processor.learn(shown)
    return ranks.broadcast(learned, 0, "what the stages have learned"), forwards


def _observe(
    stage: PlannedStage,
    model: StreamedModel,
    inputs: Sequence[Mapping[str, Any]],
    device: torch.device,
    progress: Progress,
    by_expert: bool,
    ranks: Ranks,
) -> tuple[dict[str, InputStatistics], int]:
    """What was seen of the inputs of the linears of a stage, and how many blocks were run for it."""
    seen: dict[str, InputStatistics] = {}
    blocks = model.running
    tokens = stage.tokens
    progress.start(f"Learning ({stage.position})", dict.fromkeys((unit.name for unit in blocks), 1))
    with BlockForwards(model, inputs, device, tick=ranks.tick) as forwards:
        for unit in blocks:
            progress.begin(unit.name)
            forwards.reach(unit)
            observer = InputObserver()
            with loaded(model, unit, device, by_expert=by_expert):
                forwards.divide(portioned(model, unit, {}))
                for name in (name for name in tokens if name.startswith(f"{unit.name}.")):
                    observer.watch(name, model.module.get_submodule(name), (Need.TOKENS,), tokens[name])
                forwards.run(hand_on=True)
                observer.stop()
                widths = {info.name: info.in_features for info in unit.linears}
                seen |= reduced_inputs(observer, widths, ranks, lambda _: 0, device, unit.name)
            progress.done(unit.name)
        return seen, forwards.count


def learned_before(folder: Path) -> dict[str, Tensor] | None:
    """What the stages of an interrupted run have learned; None if they did not get to the end."""
    path = folder / LEARNED_FILE
    try:
        return _library.load_file(path) if path.exists() else None
    except (OSError, SafetensorError) as error:
        _logger.warning("%s cannot be read (%s), so the stages ahead are carried out again", path, error)
        return None


def keep_learned(folder: Path, learned: Mapping[str, Tensor]) -> None:
    """Leave what was learned where a resumed run finds it."""
    path = folder / f"{LEARNED_FILE}.partial"
    _library.save_file({name: tensor.contiguous() for name, tensor in learned.items()}, path)
    os.replace(path, folder / LEARNED_FILE)
