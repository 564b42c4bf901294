"""One quantization run: what planning and running share, whatever the kind of model and what it is calibrated on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

from pydantic import BaseModel

from slim_core.checkpoint.staging import check_target, partial_folder
from slim_core.devices import Devices, resolve_devices
from slim_core.errors import SlimError, UnsupportedError
from slim_core.evaluation.report import write_report
from slim_core.fingerprint import fingerprint
from slim_core.logging import get_logger
from slim_core.model.streamed import StreamedModel
from slim_core.progress import Progress, SilentProgress
from slim_core.ranks.group import ALONE, Ranks, connected
from slim_core.ranks.launch import Again, started_ranks
from slim_core.ranks.world import World, world_of_environment
from slim_core.recipe import Recipe, SpecV1, dump_recipe, recipe_from_dict
from slim_core.recipe.schema import DatasetConfig
from slim_core.runners.disk import disk_need, disk_problem, has_room_to_keep
from slim_core.runners.plan import Plan, make_plan
from slim_core.runners.plan_experts import ExtraSamples
from slim_core.runners.plan_time import PlannedTime
from slim_core.runners.prediction import TowerLoad
from slim_core.runners.probe import ProbedSamples, probe
from slim_core.runners.run import RunResult, run_plan
from slim_core.savers.side_files import write_text
from slim_core.service import QuantRequest

__all__ = ["Inputs", "Job", "Remarks", "Samples", "arguments_of", "told"]

_logger = get_logger(__name__)
Inputs = Sequence[Mapping[str, Any]]
"""Keyword arguments of the model for each forward."""

Remarks = Callable[[Plan], list[str]]
"""Warnings about a plan that only the caller knows of."""


class Samples(Protocol):
    """Where the samples of a recipe's calibration sets come from."""

    @property
    def token_bytes(self) -> int:
        """Bytes that one token keeps while its sample waits between two blocks."""
        ...

    def inputs(self, dataset: DatasetConfig) -> Inputs:
        """What a calibration set makes; each sample may be made when it is asked for."""
        ...

    def extra(self, dataset: DatasetConfig) -> Inputs:
        """The same of its extra samples, for experts that too few tokens reach."""
        ...

    def tokens(self, dataset: DatasetConfig) -> list[int]:
        """How many tokens each forward has."""
        ...

    def extra_tokens(self, dataset: DatasetConfig) -> list[tuple[int, int]]:
        """How many samples and tokens each forward of the extra ones has."""
        ...

    def tower_load(self, dataset: DatasetConfig) -> TowerLoad:
        """What runs through the towers of the model."""
        ...

    def at_hand(self, dataset: DatasetConfig) -> bool:
        """Whether they can be had at once, without running a model to make them."""
        ...

    def identity(self, dataset: DatasetConfig, *, extra: bool = False) -> Any:
        """Plain data that is different for different samples."""
        ...

    def example(self) -> dict[str, Any]:
        """Keyword arguments of the model for one short sample, always the same one."""
        ...


@dataclass
class Job:
    """A request and its recipe; each part of the rest is made when it is first needed.

    Args:
        spec: the recipe's, typed.
        open_model: opens the model of the request.
        samples_of: gives the samples for that model.
        remarks: gives warnings to put before those of the plan.
        keeps: patterns of files that ``save_path`` may hold; :attr:`finish` takes them over.
        spills: whether samples that are not at work wait on disk in any case; otherwise only to stay within a budget.
        finish: puts further files into the finished folder before it appears.
        again: how the process of another rank makes the same job; None: nobody does.
        distributes: whether several devices are used whatever the recipe says of the runner.
    """

    request: QuantRequest
    recipe: Recipe
    spec: SpecV1
    open_model: Callable[[], StreamedModel]
    samples_of: Callable[[StreamedModel], Samples]
    remarks: Remarks | None = None
    keeps: tuple[str, ...] = ()
    spills: bool = False
    finish: Callable[[Path], None] | None = None
    again: Again | None = None
    distributes: bool = False

    @cached_property
    def world(self) -> World:
        """Where this process stands among the ranks that somebody has started."""
        return world_of_environment()

    @cached_property
    def devices(self) -> Devices:
        devices = resolve_devices(self.request.device, explicit="device" in self.request.model_fields_set)
        return devices.of_rank(self.world.local_rank) if self.world.size > 1 else devices

    @property
    def _possible_ranks(self) -> int:
        """How many processes there are, or could be started."""
        return self.world.size if self.world.size > 1 else len(self.devices.indices)

    @property
    def _ranks_here(self) -> int:
        """How many of them share the memory of this host."""
        return self.world.local_size if self.world.size > 1 else self._possible_ranks

    @cached_property
    def model(self) -> StreamedModel:
        return self.open_model()

    @cached_property
    def samples(self) -> Samples:
        return self.samples_of(self.model)

    @cached_property
    def plan(self) -> Plan:
        """The plan of the run.

        Reads the recipe, the model's headers and, if they are needed, the calibration set and one block of every kind.
        """
        dataset = self.spec.dataset
        plan = make_plan(
            self.model,
            self.spec,
            self.devices,
            activation_bytes=lambda: self._activation_bytes(dataset),
            largest_forward=lambda: max(self.samples.tokens(dataset)),
            stage_bytes=self._activation_bytes,
            tower_load=lambda dataset: self.samples.tower_load(dataset),
            extra_samples=self._extra_samples,
            example=lambda: self.samples.example(),
            force=self.request.force,
            budget=self.request.memory_budget,
            waiting_bytes=lambda: 2 * max(self.samples.tokens(dataset)) * self.samples.token_bytes,
            spills=self.spills,
            ranks=self._possible_ranks,
            ranks_here=self._ranks_here,
            distributes=self.distributes,
        )
        ranks = plan.runner.ranks
        if ranks > 1 and plan.needs_data and not plan.runner.by_units:
            count = len(self.samples.tokens(dataset))
            if count < ranks:
                plan.warnings.insert(0, f"{count} calibration samples for {ranks} ranks: {ranks - count} run none")
        if self.remarks is not None:
            plan.warnings[:0] = self.remarks(plan)
        if self.request.probe and not self.world.rank and plan.refusal is None:
            plan.time = self._probed(plan)
        return plan

    def _probed(self, plan: Plan) -> PlannedTime:
        """How long the run will take, tried out."""
        datasets = [self.spec.dataset] * plan.needs_data + [stage.dataset for stage in plan.stages]
        if not all(map(self.samples.at_hand, datasets)):
            return PlannedTime(unknown="its calibration inputs were not captured yet")
        tokens = [self.samples.tokens(dataset) for dataset in datasets]
        quota = plan.experts.quota
        extra = self.samples.extra_tokens(self.spec.dataset) if quota is not None and quota.extra.count else ()
        samples = ProbedSamples(
            lambda: self.samples.inputs(datasets[0]),
            tokens[0] if tokens else (),
            sum(count for _, count in extra),
            [sum(stage) for stage in tokens[plan.needs_data :]],
        )
        try:
            return probe(plan, self.request.save_path, samples, quantized=self.spec.propagate == "quantized")
        except (SlimError, OSError) as error:
            return PlannedTime(unknown=f"the probe failed: {error}")

    def _activation_bytes(self, dataset: DatasetConfig) -> int:
        return sum(self.samples.tokens(dataset)) * self.samples.token_bytes

    def _extra_samples(self) -> ExtraSamples:
        batches = self.samples.extra_tokens(self.spec.dataset)
        tokens = sum(tokens for _, tokens in batches)
        return ExtraSamples(sum(count for count, _ in batches), tokens * self.samples.token_bytes)

    def _identity(self) -> list[Any]:
        """Everything that is calibrated on."""
        main = self.spec.dataset
        datasets = [stage.dataset for stage in self.plan.stages] + [main] * self.plan.needs_data
        quota = self.plan.experts.quota
        extra = [self.samples.identity(main, extra=True)] if quota is not None and quota.extra.count else []
        return [*(self.samples.identity(dataset) for dataset in datasets), *extra]

    def run(self, progress: Progress, on_plan: Callable[[Plan], None] | None = None) -> RunResult:
        """Carry out the recipe; ``on_plan`` is shown the plan before that begins.

        Raises:
            SlimError: whatever stands in the way; nothing at ``save_path`` has changed then.
        """
        request, world = self.request, self.world
        if not world.rank:
            check_target(request.save_path, request.model_path, request.overwrite, self.keeps)
            if on_plan is not None:
                on_plan(self.plan)
        ranks = self.plan.runner.ranks
        if self.plan.refusal is not None:
            raise self.plan.refusal
        if not world.rank:
            self._check_disk()
        if world.size > 1 and ranks == 1:
            raise UnsupportedError(
                f"{world.size} ranks were started, but this run takes one process: {self.plan.runner.reason}",
                where="spec.runner",
                remedy="start one process, or write runner: dp_layer_wise",
            )
        if ranks == 1:
            return self._carry_out(progress, ALONE)
        device = self.devices.first
        if not world.rank:
            self._identity()  # a calibration set that is made when it is first needed is made once
        if world.size > 1:
            with connected(world, self.devices.kind, device, None) as group:
                return self._carry_out(progress if group.first else SilentProgress(), group)
        if self.again is None:
            raise UnsupportedError(
                "this kind of run cannot start other ranks", where="--device", remedy="give one device, or use torchrun"
            )
        with started_ranks(self.again, ranks, self.devices.kind, device) as group:
            return self._carry_out(progress, group)

    def _check_disk(self) -> None:
        target = self.request.save_path
        problem = disk_problem(disk_need(self.plan), target, partial_folder(target))
        if problem is None:
            return
        if not self.request.force:
            raise problem
        _logger.warning("%s", problem)
        self.plan.warnings.append(str(problem))

    def _carry_out(self, progress: Progress, ranks: Ranks) -> RunResult:
        """The run of this process, which is one of the ranks."""
        request = self.request
        effective = dump_recipe(self.recipe, self.spec)

        def finish(folder: Path, result: RunResult) -> None:
            write_text(folder / f"{_safe_name(request.model_type)}_best_practice.yaml", effective)
            write_report(folder, self.plan, result, title=request.model_type, debug=request.debug)
            if self.finish is not None:
                self.finish(folder)

        origin = [self._identity(), self.devices.kind]
        return run_plan(
            self.plan,
            request.save_path,
            fingerprint=fingerprint(self.model.folder, self.model.source, effective, origin),
            progress=progress,
            calibration=lambda: self.samples.inputs(self.spec.dataset),
            extra_calibration=lambda: self.samples.extra(self.spec.dataset),
            stage_calibration=self.samples.inputs,
            propagate=self.spec.propagate,
            resume=request.resume,
            finish=finish,
            ranks=ranks,
            tokens=lambda dataset: self.samples.tokens(dataset or self.spec.dataset),
            example=(lambda: self.samples.example()) if self._keeps() else None,
        )

    def _keeps(self) -> bool:
        """Whether activations are kept for ``--resume``."""
        target = self.request.save_path
        return has_room_to_keep(disk_need(self.plan), target, partial_folder(target))


def arguments_of(request: QuantRequest, recipe: Recipe) -> dict[str, Any]:
    """A request and a recipe as plain data for JSON; :func:`told` understands it."""
    told = {
        "apiversion": recipe.apiversion,
        "spec": recipe.raw_spec,
        "metadata": recipe.metadata.model_dump(mode="json", exclude_unset=True),
        **recipe.extra,
    }
    return {"request": request.model_dump(mode="json", exclude_unset=True), "recipe": _plain(told)}


def told(request: Mapping[str, Any], recipe: Mapping[str, Any]) -> tuple[QuantRequest, Recipe]:
    """The request and the recipe that another process was given."""
    return QuantRequest(**request), recipe_from_dict(recipe)


def _plain(value: Any) -> Any:
    """The same with models, tuples and paths as what JSON has."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _safe_name(model_type: str) -> str:
    """A model type as part of a file name."""
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in model_type)
