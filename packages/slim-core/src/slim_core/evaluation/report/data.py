"""What a report is made of: everything a run planned and measured, as plain data."""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from slim_core.devices import Devices
from slim_core.runners.disk import disk_need
from slim_core.runners.plan import Plan
from slim_core.runners.records import ExpertRecord, TimeRecord
from slim_core.runners.run import RunResult
from slim_core.savers.loaders import layer_class
from slim_core.service import SERVICE_GROUP
from slim_core.smoothing.scales import SmoothingNote

__all__ = ["LinearRow", "ReportData", "UnitRow", "collect", "finite", "role"]

_LIBRARIES = ("slim-core", "torch", "torch-npu", "transformers", "safetensors", "numpy")


@dataclass(frozen=True)
class LinearRow:
    """One linear: what it became, why, and what was measured of it. None is what was not measured.

    Args:
        leaf: last part of its name, which linears of the same role share.
        unit, position: the unit it lies in, and that unit's place among all.
        sqnr_db: signal to quantization noise of the weight in decibels; None also if there is no noise at all.
        low, high: extremes of its observed inputs.
        tokens: how many tokens they were observed on.
    """

    name: str
    leaf: str
    unit: str
    position: int
    kind: str
    reason: str
    out_features: int
    in_features: int
    sqnr_db: float | None
    low: float | None
    high: float | None
    tokens: int | None
    seconds: float | None


@dataclass(frozen=True)
class AttentionRow:
    """One attention, if the recipe is about any: what it became, why, and what was observed of its states.

    ``states`` has ``query``, ``key`` and ``value`` as far as they were observed, each with its extremes ``low`` and
    ``high`` and the widest range ``clip_low`` to ``clip_high`` that is not clipped.
    """

    name: str
    unit: str
    becomes: str
    reason: str
    tokens: int | None
    states: dict[str, dict[str, float]]


@dataclass(frozen=True)
class UnitRow:
    """Size and cost of one unit; ``seconds`` and ``resident_bytes`` are None if it was not done in this run.

    ``phases`` are the seconds by what was done, of the one of several ranks that keeps the unit.
    """

    name: str
    kind: str
    bytes_in: int
    bytes_out: int
    seconds: float | None
    resident_bytes: int | None
    phases: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class ReportData:
    """A whole report. Sizes are bytes, times seconds; memory is counted beyond what the process took before the run."""

    title: str
    created: str
    runner: str
    runner_reason: str
    device: str
    counts: dict[str, int]
    samples: int
    extra_samples: int
    forwards_per_sample: int
    block_forwards: int
    resumed_units: int
    seconds: float
    bytes_in: int
    bytes_out: int
    predicted_bytes_out: int
    predicted_peak_memory: int
    peak_memory: int
    process_peak_memory: int
    process_base_memory: int
    device_peak_memory: int | None
    warnings: list[str]
    units: list[UnitRow]
    linears: list[LinearRow]
    attentions: list[AttentionRow]
    smoothing: list[SmoothingNote]
    experts: list[ExpertRecord]
    versions: dict[str, str]
    machine: dict[str, Any]
    rank_peak_memory: list[int] = field(default_factory=list[int])
    predicted_peak_disk: int = 0
    peak_disk: int = 0
    predicted_seconds: float | None = None
    predicted_phases: dict[str, float] = field(default_factory=dict[str, float])
    times: list[TimeRecord] = field(default_factory=list[TimeRecord])

    @property
    def quantized(self) -> list[LinearRow]:
        """The linears that are not left as they were."""
        return [row for row in self.linears if row.kind != "FLOAT"]

    @property
    def worst(self) -> list[LinearRow]:
        """Linears with a known error, the largest first."""
        return sorted((row for row in self.linears if row.sqnr_db is not None), key=lambda row: row.sqnr_db or 0.0)

    @property
    def median_sqnr(self) -> float | None:
        known = [row.sqnr_db for row in self.worst if row.sqnr_db is not None]
        return median(known) if known else None

    @property
    def phases(self) -> list[str]:
        """What time was spent on by any rank, the longest first."""
        spent: Counter[str] = Counter()
        for record in self.times:
            spent.update(record.phases)
        return [phase for phase, _ in spent.most_common()]

    def as_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {"format": 1, **asdict(self), "median_sqnr_db": self.median_sqnr}


def finite(value: float | None) -> float | None:
    """The value, or None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None


def collect(folder: Path, plan: Plan, result: RunResult, *, title: str) -> ReportData:
    """Bring together what was planned, what was measured and what lies in the finished folder."""
    units = _units(plan, result)
    written = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return ReportData(
        title=title,
        created=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        runner=plan.runner.name,
        runner_reason=plan.runner.reason,
        device=str(plan.devices),
        counts=plan.counts(),
        samples=result.samples,
        extra_samples=result.extra_samples,
        forwards_per_sample=plan.forwards,
        block_forwards=result.block_forwards,
        resumed_units=result.resumed_units,
        seconds=result.seconds,
        bytes_in=sum(unit.bytes_in for unit in units),
        bytes_out=written,
        predicted_bytes_out=plan.bytes_out,
        predicted_peak_memory=plan.memory.peak,
        peak_memory=max(0, result.peak_bytes - result.base_bytes),
        process_peak_memory=result.peak_bytes,
        process_base_memory=result.base_bytes,
        device_peak_memory=_device_peak(plan.devices),
        warnings=list(result.warnings),
        units=units,
        linears=_linears(plan, result),
        attentions=_attentions(plan, result),
        smoothing=[replace(note, **_finite_parts(note)) for note in result.smoothed],
        experts=list(result.experts),
        versions=_versions(),
        machine=_machine(plan.devices),
        rank_peak_memory=list(result.rank_peak_bytes),
        predicted_peak_disk=disk_need(plan).total,
        peak_disk=result.peak_disk,
        predicted_seconds=plan.time.seconds if plan.time is not None and not plan.time.unknown else None,
        predicted_phases=dict(plan.time.parts) if plan.time is not None else {},
        times=list(result.times),
    )


def _units(plan: Plan, result: RunResult) -> list[UnitRow]:
    measured = {record.name: record for record in result.units}
    rows: list[UnitRow] = []
    for unit in plan.units:
        record = measured.get(unit.name)
        kind = unit.name if unit.name in ("prologue", "epilogue", "extra") else "draft" if unit.drafts else "block"
        rows.append(
            UnitRow(
                unit.name,
                kind,
                unit.bytes_in,
                unit.bytes_out,
                record.seconds if record else None,
                record.resident_bytes if record else None,
                dict(record.phases) if record else {},
            )
        )
    return rows


def _linears(plan: Plan, result: RunResult) -> list[LinearRow]:
    measured = {record.name: record for record in result.linears}
    rows: list[LinearRow] = []
    for position, unit in enumerate(plan.units):
        for linear in unit.linears:
            record = measured.get(linear.name)
            rows.append(
                LinearRow(
                    linear.name,
                    role(linear.name),
                    unit.name,
                    position,
                    str(linear.kind),
                    linear.reason,
                    linear.out_features,
                    linear.in_features,
                    finite(record.weight_sqnr_db) if record else None,
                    finite(record.low) if record else None,
                    finite(record.high) if record else None,
                    record.tokens if record else None,
                    record.seconds if record else None,
                )
            )
    return rows


def _attentions(plan: Plan, result: RunResult) -> list[AttentionRow]:
    measured = {record.name: record for record in result.attentions}
    rows: list[AttentionRow] = []
    for unit in plan.units:
        for planned in unit.attentions:
            record = measured.get(planned.name)
            states = {state.state: asdict(state) for state in record.states} if record is not None else {}
            for state in states.values():
                del state["state"]
            tokens = record.tokens or None if record is not None else None
            rows.append(AttentionRow(planned.name, unit.name, planned.becomes, planned.reason, tokens, states))
    return rows


def _finite_parts(note: SmoothingNote) -> dict[str, Any]:
    """The numbers of a note, as far as JSON has them."""
    return {name: finite(value) for name, value in vars(note).items() if isinstance(value, float)}


def role(name: str) -> str:
    """What modules of the same place in different blocks, or different experts, have in common."""
    leaf = name.rpartition(".")[2]
    return f"experts.{leaf}" if layer_class(name) == "experts" else leaf


def _device_peak(devices: Devices) -> int | None:
    if devices.kind == "cpu":
        return None
    return int(getattr(torch, devices.kind).max_memory_allocated(devices.first))


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    services = {point.dist.name for point in entry_points(group=SERVICE_GROUP) if point.dist is not None}
    for name in (*_LIBRARIES, *sorted(services - set(_LIBRARIES))):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _machine(devices: Devices) -> dict[str, Any]:
    machine: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if devices.kind != "cpu":
        machine["device_name"] = str(getattr(torch, devices.kind).get_device_name(devices.first))
    return machine
