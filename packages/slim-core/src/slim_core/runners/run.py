"""The run: unit after unit is loaded, observed, quantized, written and released."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from slim_core.checkpoint.header import DTYPE_NAMES
from slim_core.checkpoint.reader import READING_AHEAD
from slim_core.checkpoint.staging import JOURNAL, Staging
from slim_core.checkpoint.writer import ShardedWriter
from slim_core.errors import UnexpectedError, UnsupportedError, VerificationError
from slim_core.logging import get_logger
from slim_core.memory import give_back_freed_memory, peak_memory, resident_memory
from slim_core.model.streamed import StreamedModel
from slim_core.phases import Phase, Profile
from slim_core.progress import Progress
from slim_core.ranks.group import ALONE, Ranks
from slim_core.recipe.schema import DatasetConfig
from slim_core.runners.beginning import begin
from slim_core.runners.boundaries import FOLDER
from slim_core.runners.disk import taken
from slim_core.runners.division import Division
from slim_core.runners.expert_tokens import starved_warning
from slim_core.runners.ledger import Ledger
from slim_core.runners.plan import Plan
from slim_core.runners.prior import LEARNED_FILE, StageInputs, keep_learned, learned_before, run_stages
from slim_core.runners.records import RunResult, TimeRecord, UnitRecord
from slim_core.runners.unit_run import Bench, UnitRun
from slim_core.savers.base import Output, PlannedTensor

__all__ = ["RunResult", "check_shards", "prefetch", "run_plan"]

_logger = get_logger(__name__)
Inputs = Sequence[Mapping[str, Any]]


def run_plan(
    plan: Plan,
    save_path: Path,
    *,
    fingerprint: str,
    progress: Progress,
    calibration: Callable[[], Inputs] | None = None,
    extra_calibration: Callable[[], Inputs] = tuple,
    stage_calibration: StageInputs | None = None,
    propagate: str = "float",
    resume: bool = False,
    finish: Callable[[Path, RunResult], None] | None = None,
    ranks: Ranks = ALONE,
    tokens: Callable[[DatasetConfig | None], Sequence[int]] = lambda _: (),
    example: Callable[[], Mapping[str, Any]] | None = None,
) -> RunResult:
    """Carry out a plan.

    Args:
        save_path: appears when everything is written and checked.
        fingerprint: identifies model, recipe, data and version for ``resume``.
        calibration: gives the keyword arguments of the model for each forward, tensors with samples in their first
            dimension; called only if the plan needs data.
        extra_calibration: the same of the extra samples; called only if the plan has any.
        stage_calibration: the same for the calibration set of a stage ahead of the main one.
        propagate: ``float`` or ``quantized``, what a block hands to the next one during calibration.
        finish: writes further files into the finished folder before it appears.
        ranks: the processes that carry out the same plan together, and call this with the same arguments.
        tokens: gives the tokens of every forward of the calibration set of a stage, or (None) of the main one, by which
            ranks share them.
        example: gives the inputs of one short sample; without it a resumed run runs finished blocks once more.

    Raises:
        SlimError: the plan is refused, or whatever went wrong; an interrupted run can be resumed if at least one unit
            was finished.
    """
    if plan.refusal is not None:
        raise plan.refusal
    began, profile, read = time.monotonic(), Profile(), READING_AHEAD.seconds
    if ranks.size > 1:
        ranks.waiting = partial(profile.within, Phase.RANKS)
    staging = _staged(save_path, fingerprint, resume, ranks)
    result = RunResult(
        save_path,
        warnings=list(plan.warnings),
        resumed_units=len(staging.finished),
        base_bytes=resident_memory(),
        bytes_in=plan.bytes_in,
        bytes_out=plan.bytes_out,
    )
    try:
        if ranks.first:
            _recall(staging.folder / JOURNAL, result)
        recalled = result.counts()
        with profile.within(Phase.STAGES):
            model = _informed(plan, staging, stage_calibration, result, progress, ranks, tokens)
        by_unit: dict[str, list[PlannedTensor]] = {unit.name: [] for unit in model.units}
        for tensor in plan.output.tensors:
            by_unit[tensor.unit].append(tensor)
        written = [tensor.meta.name for name in staging.finished for tensor in by_unit[name]]
        progress.start("Quantizing", {unit.name: unit.bytes_in + unit.bytes_out + 1 for unit in plan.units})
        with ExitStack() as stack:
            division = Division(plan, ranks.rank)
            writer = _writer(plan, staging, written, division, ranks, profile)
            stack.callback(writer.close)
            ledger = Ledger(staging, writer, ranks, [unit.name for unit in model.units], division.keeper)
            stack.callback(ledger.close)
            bench = Bench(model, plan, writer, staging, result, by_unit, propagate == "quantized", division, ranks)
            bench.profile = profile
            if plan.needs_data and calibration is not None:
                sharing = bench.shared
                begun = begin(
                    *(stack, plan, model, staging.folder, staging.finished, calibration, extra_calibration),
                    *(sharing, tokens(None) if sharing.size > 1 else (), example),
                    keeps=ranks.first or not division.by_units,
                )
                bench.forwards, bench.begins = begun.forwards, begun.stop
            before = time.process_time()
            with torch.no_grad():
                _work_through(bench, ledger, progress)
            result.cpu_seconds = (time.process_time() - before,)
            if bench.forwards is not None:
                result.samples, result.extra_samples = bench.forwards.given()
            with profile.within(Phase.RANKS):
                ledger.complete()
            writer.finish(ranks.tick)
            result.times = (TimeRecord(profile.spent(), READING_AHEAD.seconds - read, writer.busy_seconds),)
            _unite(plan, result, recalled, ledger, division, ranks)
        ranks.part()
        if not ranks.first:
            return result
        if (text := starved_warning(result, plan.experts.quota)) is not None:
            _logger.warning("%s", text)
            result.warnings.append(text)
        extras = [found for processor in plan.processors if (found := processor.extras()) is not None]
        shutil.rmtree(staging.folder / FOLDER, ignore_errors=True)
        plan.saver.complete(staging.folder, model, plan.output, extras)
        result.seconds = time.monotonic() - began
        result.peak_bytes = peak_memory()
        result.peak_disk = max(result.peak_disk, taken(staging.folder))
        if finish is not None:
            finish(staging.folder, result)
        check_shards(staging.folder, plan.output)
        (staging.folder / LEARNED_FILE).unlink(missing_ok=True)
        staging.commit()
    except BaseException:
        if ranks.first and staging.leave(keep=(staging.folder / LEARNED_FILE).exists()):
            after = f"the unit after {staging.finished[-1]}" if staging.finished else "the first unit"
            _logger.warning("interrupted; run again with --resume to continue at %s", after)
        raise
    finally:
        progress.stop()
    return result


def _staged(save_path: Path, fingerprint: str, resume: bool, ranks: Ranks) -> Staging:
    """The folder to write to, which the first rank prepares.

    Raises:
        UnsupportedError: the ranks are not about to do the same.
    """
    seen = ranks.gather(fingerprint, "the comparison of all ranks")
    if odd := [rank for rank, other in enumerate(seen) if other != seen[0]]:
        raise UnsupportedError(
            f"rank {odd[0]} sees another model, recipe, calibration set or version than rank 0",
            where=str(save_path),
            remedy="give all hosts the same files, with the same times of change (cp -p, rsync -t), and versions",
        )
    staging = Staging(save_path, fingerprint, resume=resume) if ranks.first else None
    finished = ranks.broadcast(staging.finished if staging is not None else [], 0, "the beginning")
    return staging or Staging.joined(save_path, finished)


def _writer(
    plan: Plan, staging: Staging, written: list[str], division: Division, ranks: Ranks, profile: Profile
) -> ShardedWriter:
    """What writes this rank's tensors, into files that the first rank has begun."""
    own = None if ranks.size == 1 else division.written_by(ranks.rank)
    make = partial(ShardedWriter, done=written, own=own, waiting=partial(profile.within, Phase.WRITER))
    if ranks.first:
        writer = make(staging.folder, plan.output.shards)
        ranks.barrier("the layout of the output")
        return writer
    ranks.barrier("the layout of the output")
    return make(staging.folder, plan.output.shards, joins=True)


def _unite(
    plan: Plan, result: RunResult, recalled: Mapping[str, int], ledger: Ledger, division: Division, ranks: Ranks
) -> None:
    """Make the result of the first rank that of all of them, and check that nothing was left to nobody.

    Args:
        recalled: how many records of every sort were taken over from an interrupted run.

    Raises:
        UnexpectedError: a tensor was written by none of the ranks, or by several.
    """
    if ranks.size == 1:
        return
    done = ranks.gather(division.written_by(ranks.rank), "the end of writing")
    counts = Counter(name for names in done for name in names)
    wrong = [tensor.meta.name for tensor in plan.output.tensors if counts[tensor.meta.name] != 1]
    if wrong:
        raise UnexpectedError(f"{len(wrong)} tensors were not written by exactly one rank", where=wrong[0])
    told = ranks.gather((result.samples, result.block_forwards, peak_memory(), *result.cpu_seconds), "the account")
    result.rank_peak_bytes = tuple(peak for _, _, peak, _ in told)
    result.cpu_seconds = tuple(seconds for *_, seconds in told)
    result.times = tuple(record for (record,) in ranks.gather(result.times, "the account of time"))
    result.peak_disk = sum(ranks.gather(result.peak_disk, "the account of disk space"))
    if not ranks.first:
        return
    if not division.by_units:
        result.samples = sum(samples for samples, *_ in told)
    result.block_forwards = sum(forwards for _, forwards, *_ in told)
    del result.units[result.resumed_units :]
    for name, count in recalled.items():
        del getattr(result, name)[count:]
    for unit in plan.units:
        if (note := ledger.notes.get(unit.name)) is not None:
            result.units.append(UnitRecord(**note["cost"]))
            result.recall(note)
    order = {linear.name: at for at, linear in enumerate(linear for unit in plan.units for linear in unit.linears)}
    result.linears.sort(key=lambda record: order[record.name])


def _informed(
    plan: Plan,
    staging: Staging,
    inputs: StageInputs | None,
    result: RunResult,
    progress: Progress,
    ranks: Ranks,
    tokens: Callable[[DatasetConfig], Sequence[int]],
) -> StreamedModel:
    """The model to be worked on, once the stages ahead have learned what they should, or did so before."""
    model = plan.model
    if not plan.stages:
        return model
    learned = ranks.broadcast(learned_before(staging.folder) if ranks.first else None, 0, "what was learned before")
    if learned is None:
        if inputs is None:
            raise UnsupportedError(
                "this kind of model has no stages ahead of the main one",
                where=f"spec.{plan.stages[0].position}",
                remedy="leave the stage out",
            )
        by_expert = plan.memory.by_expert
        learned, result.stage_forwards = run_stages(
            *(plan.stages, model, inputs, plan.devices.first, progress),
            by_expert=by_expert,
            ranks=ranks,
            tokens=tokens,
        )
        if ranks.first:
            keep_learned(staging.folder, learned)
    for processor in plan.processors:
        model = processor.inherit(learned, model)
    return model


def _recall(journal: Path, result: RunResult) -> None:
    """Take over what an interrupted run noted of the units it finished."""
    for note in map(json.loads, journal.read_text("utf-8").splitlines()):
        if cost := note.get("cost"):
            result.units.append(UnitRecord(**cost))
            result.recall(note)


def _work_through(bench: Bench, ledger: Ledger, progress: Progress) -> None:
    model, plan, result = bench.model, bench.plan, bench.result
    prefetch(bench, 0)
    for position, unit in enumerate(model.units):
        prefetch(bench, position + 1)
        progress.begin(unit.name)
        bench.ranks.tick(unit.name)
        began, before, spent = time.monotonic(), result.counts(), bench.profile.spent()
        finished = unit.name in bench.staging.finished
        run = UnitRun(bench, unit, finished=finished or not bench.division.works_on(unit.name))
        if unit.stop is not None and unit.stop < bench.begins:
            pass  # written by an interrupted run, and what it gave is known
        elif unit.stop is not None and bench.forwards is not None:
            with bench.forwards.passing(unit):
                run.calibrated(bench.forwards)
        else:
            run.without_data()
        if not finished:
            planned, seconds = plan.units[position], time.monotonic() - began
            sizes = resident_memory(), planned.bytes_in, planned.bytes_out
            cost = UnitRecord(unit.name, seconds, *sizes, bench.profile.spent(spent))
            result.units.append(cost)
            note: dict[str, object] = {"cost": asdict(cost), **result.noted_since(before)}
            ledger.note(unit.name, note)
            _look_at_disk(bench)
        if not plan.runner.keeps_model:
            model.source.release(unit.tensors.values())
        if plan.needs_data:  # weights alone leave little behind, and touching fresh memory costs time
            give_back_freed_memory()
        progress.done(unit.name)


def _look_at_disk(bench: Bench) -> None:
    """Note what the run has on disk now: of the folder that ranks share, the first one tells."""
    waiting = bench.forwards.on_disk if bench.forwards is not None else 0
    folder = taken(bench.staging.folder) if bench.ranks.first else 0
    bench.result.peak_disk = max(bench.result.peak_disk, folder + waiting)


def prefetch(bench: Bench, position: int) -> None:
    """Begin to read what the work on a unit will need."""
    if position < len(bench.model.units):
        unit = bench.model.units[position]
        if not bench.plan.needs_data and not bench.division.works_on(unit.name):
            return
        assigned = {info.prefix for info in unit.linears if info.name in bench.plan.assignments}
        source, needed = bench.model.source, bench.plan.needs_data and not unit.mirrors
        # Without data, what is stored as it will be written is copied without being read.
        names = [n for n in unit.tensors.values() if needed or n.rpartition(".")[0] in assigned or not source.stored(n)]
        bench.model.source.prefetch(names)


def check_shards(folder: Path, output: Output) -> None:
    """Read the headers of the written files back with the safetensors library and hold them against the plan.

    Raises:
        VerificationError: a file does not hold exactly what was planned.
    """
    for shard in output.shards:
        reader: Any = safe_open(folder / shard.file_name, "np")  # torch would map the whole file as writable memory
        with reader as file:
            found = set(file.keys())
            if found != {meta.name for meta in shard.tensors}:
                raise VerificationError("the file does not hold the tensors that were planned", where=shard.file_name)
            for meta in shard.tensors:
                part = file.get_slice(meta.name)
                if tuple(part.get_shape()) != meta.shape or part.get_dtype() != DTYPE_NAMES[meta.dtype]:
                    raise VerificationError(f"tensor {meta.name!r} has another dtype or shape", where=shard.file_name)
