"""Planning and running of ``multimodal_sd_modelslim_v1``: from a request to a finished folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from slim_core.checkpoint.staging import Staging, check_target
from slim_core.errors import UnsupportedError
from slim_core.job import Job, arguments_of, told
from slim_core.logging import get_logger
from slim_core.progress import Progress
from slim_core.ranks.launch import Again
from slim_core.ranks.world import world_of_environment
from slim_core.recipe import Recipe, dump_recipe
from slim_core.runners.plan import Plan
from slim_core.runners.run import RunResult
from slim_core.service import QuantRequest
from slim_sd.calibration import Calibration, expert_name
from slim_sd.loading import open_transformer
from slim_sd.recipe import SpecSd
from slim_sd.resources import KEPT_FILES
from slim_sd.samples import CapturedSamples

__all__ = ["DiffusionRun", "job_of_rank"]

_logger = get_logger(__name__)


class DiffusionRun:
    """The run that a request and its recipe ask for: one job for each transformer of the model.

    That of a model with one transformer is written to ``save_path`` itself; of several, each to a folder in it.

    Raises:
        SchemaValidateError: the recipe is invalid.
    """

    def __init__(self, request: QuantRequest, recipe: Recipe) -> None:
        self._request = request
        self._recipe = recipe
        self._spec = recipe.spec(SpecSd)
        self._calibration = Calibration(request, recipe, self._spec)

    @cached_property
    def _names(self) -> list[str]:
        return self._calibration.components

    def plan(self) -> Plan:
        """The plan for the first transformer, with those for the others; nothing is captured for it."""
        jobs = {name: self._job(name, self._request) for name in self._names}
        first, *others = self._plans(jobs)
        first.others = others
        return first

    def _plans(self, jobs: dict[str, Job]) -> list[Plan]:
        for name, job in jobs.items():
            job.plan.part = expert_name(name) if len(jobs) > 1 else ""
        return [job.plan for job in jobs.values()]

    def _job(self, component: str, request: QuantRequest, finish: Callable[[Path], None] | None = None) -> Job:
        names = self._spec.multimodal_sd_config.tensor_names

        def remarks(plan: Plan) -> list[str]:
            source = self._calibration.remarks(component, needed=plan.needs_data)
            return [*self._recipe.placed(self._spec.warnings()), *source]

        given = {**arguments_of(self._request, self._recipe), "component": component}
        inner = request.model_dump(mode="json", exclude_unset=True)
        return Job(
            request,
            self._recipe,
            self._spec,
            partial(open_transformer, self._request.model_path, component, names),
            partial(CapturedSamples, self._calibration, component),
            remarks,
            keeps=KEPT_FILES,
            spills=True,
            finish=finish,
            again=Again("slim_sd.quantize:job_of_rank", {**given, "inner": inner}),
            distributes=True,
        )

    def job_of_rank(self, component: str, inner: QuantRequest) -> Job:
        """The job for one transformer in the process of another rank than the first, which sees to all the rest."""
        return self._job(component, inner)

    def run(self, progress: Progress, on_plan: Callable[[Plan], None] | None = None) -> RunResult:
        """Carry out the recipe; ``on_plan`` is shown the plan before anything is captured or written.

        Raises:
            SlimError: whatever stands in the way; nothing at ``save_path`` has changed then.
        """

        def told(plan: Plan) -> None:
            if not any(one.needs_data for one in (plan, *plan.others)):
                _logger.info("no processor of this recipe needs calibration inputs: the pipeline is not run")
            if on_plan is not None:
                on_plan(plan)

        if len(self._names) > 1:
            result = self._run_all(progress, told)
        else:
            result = self._job(self._names[0], self._request, self._calibration.keep).run(progress, told)
        if not world_of_environment().rank:  # only the first one of several knows that the output is in place
            self._calibration.tidy_up()
        return result

    def _run_all(self, progress: Progress, on_plan: Callable[[Plan], None]) -> RunResult:
        """One transformer after the other, into folders of a folder that takes its place when all are done."""
        request = self._request
        if world_of_environment().size > 1:
            raise UnsupportedError(
                f"ranks that were started from outside cannot quantize {len(self._names)} transformers in turn",
                where="WORLD_SIZE",
                remedy="start one process and give it all devices, e.g. --device npu:0,1; it starts the ranks itself",
            )
        check_target(request.save_path, request.model_path, request.overwrite, KEPT_FILES)
        shown = self.plan()
        times = dict(zip(self._names, (plan.time for plan in (shown, *shown.others)), strict=True))
        on_plan(shown)
        for plan in (shown, *shown.others):
            if plan.refusal is not None:
                raise plan.refusal
        identity = json.dumps([dump_recipe(self._recipe, self._spec), str(request.model_path.resolve()), self._names])
        staging = Staging(request.save_path, identity, resume=request.resume)
        results: list[RunResult] = []
        try:
            for component in self._names:
                name = expert_name(component)
                if name in staging.finished:
                    continue
                begun = (staging.folder / f".{name}.slim-partial").exists()
                inner = request.model_copy(
                    update={"save_path": staging.folder / name, "resume": request.resume and begun, "overwrite": True}
                    | {"probe": False}
                )
                job = self._job(component, inner)
                job.plan.time = times[component]
                results.append(job.run(progress))
                staging.record(name)
            self._calibration.keep(staging.folder)
            staging.commit()
        except BaseException:
            staging.leave(keep=any(staging.folder.glob(".*.slim-partial")))
            raise
        return _together(request.save_path, results)


def job_of_rank(request: dict[str, Any], recipe: dict[str, Any], component: str, inner: dict[str, Any]) -> Job:
    """The job for one transformer in the process of another rank."""
    return DiffusionRun(*told(request, recipe)).job_of_rank(component, QuantRequest(**inner))


def _together(save_path: Path, results: Sequence[RunResult]) -> RunResult:
    """What the runs of all transformers did, in one."""
    return RunResult(
        save_path,
        linears=[record for result in results for record in result.linears],
        attentions=[record for result in results for record in result.attentions],
        smoothed=[record for result in results for record in result.smoothed],
        units=[record for result in results for record in result.units],
        warnings=[text for result in results for text in result.warnings],
        samples=sum(result.samples for result in results),
        block_forwards=sum(result.block_forwards for result in results),
        resumed_units=sum(result.resumed_units for result in results),
        seconds=sum(result.seconds for result in results),
        base_bytes=min((result.base_bytes for result in results), default=0),
        peak_bytes=max((result.peak_bytes for result in results), default=0),
        rank_peak_bytes=tuple(
            max(peaks)
            for peaks in zip(*(result.rank_peak_bytes for result in results if result.rank_peak_bytes), strict=True)
        ),
        bytes_in=sum(result.bytes_in for result in results),
        bytes_out=sum(result.bytes_out for result in results),
    )
