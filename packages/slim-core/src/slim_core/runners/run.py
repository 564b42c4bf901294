"""The run: unit after unit is loaded, observed, quantized, written and released."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from slim_core.checkpoint.header import DTYPE_NAMES
from slim_core.checkpoint.source import LazyTensor
from slim_core.checkpoint.staging import JOURNAL, Staging
from slim_core.checkpoint.writer import ShardedWriter
from slim_core.errors import VerificationError
from slim_core.logging import get_logger
from slim_core.memory import give_back_freed_memory, peak_memory, resident_memory
from slim_core.model.units import StreamedModel, Unit
from slim_core.processors.base import BlockRun, LinearWork, UnitWork
from slim_core.progress import Progress
from slim_core.quantization.layers import QuantizedLinear
from slim_core.quantization.statistics import InputObserver, InputStatistics
from slim_core.runners.calibration import BlockForwards, KeptBlock, simulated
from slim_core.runners.plan import Plan
from slim_core.savers.base import Output, PlannedTensor

__all__ = ["LinearRecord", "RunResult", "UnitRecord", "run_plan"]

_logger = get_logger(__name__)
Inputs = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class LinearRecord:
    """What happened to one linear. ``low`` and ``high`` bound its inputs on ``tokens`` tokens; None if not observed."""

    name: str
    kind: str
    weight_sqnr_db: float
    low: float | None
    high: float | None
    tokens: int | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class UnitRecord:
    """Cost and size of one unit."""

    name: str
    seconds: float
    resident_bytes: int
    bytes_in: int
    bytes_out: int


@dataclass
class RunResult:
    """What a run did, for the report.

    Args:
        block_forwards: forward passes of single blocks that were run.
        peak_bytes: the most memory the process ever had.
        base_bytes: its memory when the run began.
    """

    save_path: Path
    linears: list[LinearRecord] = field(default_factory=list[LinearRecord])
    units: list[UnitRecord] = field(default_factory=list[UnitRecord])
    warnings: list[str] = field(default_factory=list[str])
    samples: int = 0
    block_forwards: int = 0
    resumed_units: int = 0
    seconds: float = 0.0
    base_bytes: int = 0
    peak_bytes: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


@dataclass
class _Bench:
    """The state of a run that its steps share."""

    model: StreamedModel
    plan: Plan
    output: Output
    writer: ShardedWriter
    staging: Staging
    result: RunResult
    by_unit: dict[str, list[PlannedTensor]]
    propagate_quantized: bool
    block_forwards: BlockForwards | None = None

    def prefetch(self, position: int) -> None:
        if position < len(self.model.units):
            unit = self.model.units[position]
            assigned = {info.prefix for info in unit.linears if info.name in self.plan.assignments}
            names = [
                name for name in unit.tensors.values() if self.plan.needs_data or name.rpartition(".")[0] in assigned
            ]
            self.model.source.prefetch(names)


def run_plan(
    model: StreamedModel,
    plan: Plan,
    save_path: Path,
    *,
    fingerprint: str,
    progress: Progress,
    calibration: Callable[[], Inputs] | None = None,
    propagate: str = "float",
    resume: bool = False,
    finish: Callable[[Path, RunResult], None] | None = None,
) -> RunResult:
    """Carry out a plan.

    Args:
        save_path: appears when everything is written and checked.
        fingerprint: identifies model, recipe, data and version for ``resume``.
        calibration: gives the keyword arguments of the model for each forward, tensors with samples in their first
            dimension; called only if the plan needs data.
        propagate: ``float`` or ``quantized``, what a block hands to the next one during calibration.
        finish: writes further files into the finished folder before it appears.

    Raises:
        SlimError: whatever went wrong; an interrupted run can be resumed if at least one unit was finished.
    """
    began = time.monotonic()
    staging = Staging(save_path, fingerprint, resume=resume)
    result = RunResult(
        save_path,
        warnings=list(plan.warnings),
        resumed_units=len(staging.finished),
        base_bytes=resident_memory(),
        bytes_in=plan.bytes_in,
        bytes_out=plan.bytes_out,
    )
    try:
        _recall(staging.folder / JOURNAL, result)
        by_unit: dict[str, list[PlannedTensor]] = {unit.name: [] for unit in model.units}
        for tensor in plan.output.tensors:
            by_unit[tensor.unit].append(tensor)
        written = [tensor.meta.name for name in staging.finished for tensor in by_unit[name]]
        progress.start("Quantizing", {unit.name: unit.bytes_in + unit.bytes_out + 1 for unit in plan.units})
        with ExitStack() as stack:
            writer = ShardedWriter(staging.folder, plan.output.shards, done=written)
            stack.callback(writer.close)
            bench = _Bench(model, plan, plan.output, writer, staging, result, by_unit, propagate == "quantized")
            if plan.needs_data and calibration is not None:
                inputs = calibration()
                result.samples = sum(_samples(batch) for batch in inputs)
                bench.block_forwards = stack.enter_context(
                    BlockForwards(model, inputs, plan.devices.first, plan.streams)
                )
            with torch.no_grad():
                _work_through(bench, progress)
            writer.finish()
        plan.saver.complete(staging.folder, model, plan.output)
        result.seconds = time.monotonic() - began
        result.peak_bytes = peak_memory()
        if finish is not None:
            finish(staging.folder, result)
        check_shards(staging.folder, plan.output)
        staging.commit()
    except BaseException:
        if staging.leave():
            _logger.warning(
                "interrupted; run again with --resume to continue at the unit after %s", staging.finished[-1]
            )
        raise
    finally:
        progress.stop()
    return result


def _samples(batch: Mapping[str, Any]) -> int:
    """How many samples share a forward."""
    return max((len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.dim()), default=1)


def _recall(journal: Path, result: RunResult) -> None:
    """Take over what an interrupted run noted of the units it finished."""
    for note in map(json.loads, journal.read_text("utf-8").splitlines()):
        if cost := note.get("cost"):
            result.units.append(UnitRecord(**cost))
            result.linears += [LinearRecord(**linear) for linear in note["linears"]]


def _work_through(bench: _Bench, progress: Progress) -> None:
    model, plan = bench.model, bench.plan
    if bench.block_forwards is not None:
        bench.block_forwards.start()
    bench.prefetch(0)
    for position, unit in enumerate(model.units):
        bench.prefetch(position + 1)
        progress.begin(unit.name)
        began, before = time.monotonic(), len(bench.result.linears)
        finished = unit.name in bench.staging.finished
        if unit.block is not None and bench.block_forwards is not None:
            _calibrated_block(bench, unit, bench.block_forwards, finished)
        elif not finished:
            _quantize(bench, unit, {})
        if not finished:
            planned, seconds = plan.units[position], time.monotonic() - began
            cost = UnitRecord(unit.name, seconds, resident_memory(), planned.bytes_in, planned.bytes_out)
            bench.result.units.append(cost)
            records = [asdict(record) for record in bench.result.linears[before:]]
            note: dict[str, object] = {"cost": asdict(cost), "linears": records}
            bench.writer.after_writing(lambda name=unit.name, note=note: bench.staging.record(name, note))
        if not plan.runner.keeps_model:
            model.source.release(unit.tensors.values())
        if plan.needs_data:  # weights alone leave little behind, and touching fresh memory costs time
            give_back_freed_memory()
        progress.done(unit.name)


def _calibrated_block(bench: _Bench, unit: Unit, forwards: BlockForwards, finished: bool) -> None:
    """Observe a block while it runs, quantize it, and hand its exact or its quantized outputs on."""
    model, plan, device = bench.model, bench.plan, bench.plan.devices.first
    model.load(unit.parameters, device)
    work = not finished or bench.propagate_quantized
    keep = work and any(processor.runs_block for processor in plan.processors)
    targets: list[Any] = []
    if plan.streams > 1:
        targets = forwards.run(hand_on=True, stream=0, keep=keep)
    observer = InputObserver()
    if work:
        for info in unit.linears:
            if needs := plan.requests.get(info.name):
                observer.watch(info.name, model.module.get_submodule(info.name), needs)
    if plan.streams == 1 or observer.statistics:
        hand_on = not (bench.propagate_quantized or keep)
        outputs = forwards.run(hand_on=hand_on, keep=keep and plan.streams == 1)
        targets = targets or outputs
    observer.stop()
    block = KeptBlock(model, forwards, targets, device) if keep else None
    layers = _quantize(
        bench, unit, observer.statistics, block=block, keep=bench.propagate_quantized, write=not finished
    )
    if bench.propagate_quantized:
        with simulated(model.module, layers, device):
            forwards.run(hand_on=True)
    elif keep:
        forwards.hand_on(targets)
    bench.result.block_forwards = forwards.count
    if not plan.runner.keeps_model:
        model.unload(unit.parameters)


def _quantize(
    bench: _Bench,
    unit: Unit,
    statistics: Mapping[str, InputStatistics],
    *,
    block: BlockRun | None = None,
    keep: bool = False,
    write: bool = True,
) -> dict[str, QuantizedLinear]:
    """Let the processors work on a unit; finished layers go to the saver at once and are returned if kept."""
    model, plan, saver = bench.model, bench.plan, bench.plan.saver
    layers: dict[str, QuantizedLinear] = {}
    if not (write or keep):
        return layers

    began = [time.monotonic()]

    def finish(work: LinearWork, layer: QuantizedLinear, sqnr_db: float) -> None:
        if write:
            saver.write_layer(bench.writer, work.info, layer)
            seen = statistics.get(work.info.name)
            low, high = (seen.range.minimum, seen.range.maximum) if seen and seen.tokens else (None, None)
            tokens = seen.tokens if seen else None
            seconds, began[0] = time.monotonic() - began[0], time.monotonic()
            record = LinearRecord(work.info.name, str(layer.kind), sqnr_db, low, high, tokens, seconds)
            bench.result.linears.append(record)
        if keep:
            layers[work.info.name] = layer
        if bench.block_forwards is None:
            work.weight.release()

    linears = {
        info.name: LinearWork(
            info,
            LazyTensor(model.source, model.source.meta(unit.parameters[f"{info.name}.weight"])),
            model.source.load(unit.parameters[f"{info.name}.bias"]) if info.has_bias else None,
            plan.assignments[info.name],
        )
        for info in unit.linears
        if info.name in plan.assignments
    }
    work = UnitWork(unit.name, linears, statistics, model.dtype, plan.devices.first, finish, block)
    for processor in plan.processors:
        processor.process(work)
    if write:
        untouched = [tensor for tensor in bench.by_unit[unit.name] if tensor.origin is not None]
        saver.write_untouched(bench.writer, model, untouched)
    return layers


def check_shards(folder: Path, output: Output) -> None:
    """Read the headers of the written files back with the safetensors library and hold them against the plan.

    Raises:
        VerificationError: a file does not hold exactly what was planned.
    """
    for shard in output.shards:
        reader: Any = safe_open(folder / shard.file_name, "pt")
        with reader as file:
            found = set(file.keys())
            if found != {meta.name for meta in shard.tensors}:
                raise VerificationError("the file does not hold the tensors that were planned", where=shard.file_name)
            for meta in shard.tensors:
                part = file.get_slice(meta.name)
                if tuple(part.get_shape()) != meta.shape or part.get_dtype() != DTYPE_NAMES[meta.dtype]:
                    raise VerificationError(f"tensor {meta.name!r} has another dtype or shape", where=shard.file_name)
