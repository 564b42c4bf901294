"""The plan: what every linear becomes and why, what will be written, what it will take. Reads headers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slim_core.checkpoint.writer import QUEUE_BYTES
from slim_core.devices import Devices
from slim_core.errors import UnsupportedError
from slim_core.model.units import LinearInfo, StreamedModel
from slim_core.processors.base import Assignment, LinearRule, Processor, create_processor
from slim_core.quantization.kinds import LayerKind
from slim_core.quantization.statistics import Need
from slim_core.recipe import NameFilter, SpecV1
from slim_core.runners.choice import RunnerChoice, choose_runner, owned_bytes
from slim_core.savers.base import Output, Saver, create_saver
from slim_core.savers.loaders import mixed_fusions, unloadable

__all__ = ["Plan", "PlannedLinear", "PlannedUnit", "make_plan"]

# What the first forward of a block loads (kernels, thread stacks), measured with the CPU build of torch 2.13.
_COMPUTE_LIBRARIES = 130 << 20


@dataclass(frozen=True)
class PlannedLinear:
    """A linear, what it becomes, and why."""

    name: str
    kind: LayerKind
    reason: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class PlannedUnit:
    """A unit, its linears and its size before and after."""

    name: str
    linears: tuple[PlannedLinear, ...]
    bytes_in: int
    bytes_out: int


@dataclass
class Plan:
    """Everything that is known before the first weight is read.

    Args:
        assignments: the linears that will be quantized, by module name.
        output: every tensor of the output and the files it falls into.
        requests: what must be observed of the inputs of which linears.
        streams: how often every sample is carried along: twice where exact and quantized outputs are both needed.
        forwards: forward passes of each block per calibration sample, those of processors that run it aside.
        peak_memory: predicted bytes beyond what the process takes after its imports, activations included.
    """

    runner: RunnerChoice
    devices: Devices
    processors: list[Processor]
    saver: Saver
    units: list[PlannedUnit]
    assignments: dict[str, Assignment]
    output: Output
    warnings: list[str]
    requests: dict[str, frozenset[Need]]
    streams: int
    forwards: int
    activation_bytes: int
    peak_memory: int

    @property
    def needs_data(self) -> bool:
        return self.forwards > 0

    @property
    def bytes_in(self) -> int:
        return sum(unit.bytes_in for unit in self.units)

    @property
    def bytes_out(self) -> int:
        return self.output.nbytes

    def counts(self) -> dict[str, int]:
        """How many linears become what."""
        counts: dict[str, int] = {}
        for unit in self.units:
            for linear in unit.linears:
                counts[linear.kind] = counts.get(linear.kind, 0) + 1
        return counts


def make_plan(model: StreamedModel, spec: SpecV1, devices: Devices, *, activation_bytes: int = 0) -> Plan:
    """Work out the plan of a run.

    Args:
        activation_bytes: size of the calibration set's hidden states at one point of the model.

    Raises:
        SchemaValidateError, UnsupportedError: the recipe asks for something that does not exist.
    """
    _refuse_unsupported(spec)
    processors = [create_processor(config, f"process[{i}]") for i, config in enumerate(spec.process)]
    saver = create_saver(spec.save[0])
    rules = [rule for processor in processors for rule in processor.rules()]
    linears = [linear for unit in model.units for linear in unit.linears]
    assignments, warnings = _assign(linears, rules)
    warnings += [note for processor in processors for note in processor.notes()]
    kinds = {name: assignment.kind for name, assignment in assignments.items()}
    every = {linear.name: kinds.get(linear.name, LayerKind.FLOAT) for linear in linears}
    warnings += mixed_fusions(every) + unloadable(every)
    if not assignments:
        warnings.append("no linear is quantized by this recipe: the output will be a copy")
    for processor in processors:
        processor.check(linears, assignments)
    requests = _requests(processors, linears, assignments)
    runs_block = any(processor.runs_block for processor in processors)
    needs_data = bool(requests) or runs_block
    runner = choose_runner(spec.runner, model, devices, needs_data=needs_data)
    streams, forwards = _passes(processors, spec, requests, needs_data)
    output = saver.declare(model, assignments)
    units = _units(model, assignments, rules, output)
    return Plan(
        runner=runner,
        devices=devices,
        processors=processors,
        saver=saver,
        units=units,
        assignments=assignments,
        output=output,
        warnings=warnings,
        requests=requests,
        streams=streams,
        forwards=forwards,
        activation_bytes=activation_bytes * streams if needs_data else 0,
        peak_memory=_peak(model, units, runner, needs_data, activation_bytes * streams, quantized_copy=forwards > 1),
    )


def _requests(
    processors: list[Processor], linears: list[LinearInfo], assignments: Mapping[str, Assignment]
) -> dict[str, frozenset[Need]]:
    wanted: dict[str, frozenset[Need]] = {}
    for processor in processors:
        for name, needs in processor.requests(linears, assignments).items():
            if needs:
                wanted[name] = wanted.get(name, frozenset()) | needs
    return wanted


def _passes(
    processors: list[Processor], spec: SpecV1, requests: Mapping[str, frozenset[Need]], needs_data: bool
) -> tuple[int, int]:
    """How many streams of samples there are, and how often each block runs for a sample."""
    if not needs_data:
        return 1, 0
    if spec.propagate == "float":
        return 1, 1
    if any(processor.wants_float_targets for processor in processors):
        return 2, 3 if requests else 2
    return 1, 2


def _refuse_unsupported(spec: SpecV1) -> None:
    if len(spec.save) != 1:
        raise UnsupportedError(
            f"{len(spec.save)} savers are given; a run has exactly one", where="spec.save", remedy="give one saver"
        )
    if spec.prior:
        raise UnsupportedError(
            "prior stages are not carried out by this version", where="spec.prior", remedy="leave the stage out"
        )


def _assign(linears: list[LinearInfo], rules: list[LinearRule]) -> tuple[dict[str, Assignment], list[str]]:
    """The first rule that names a linear has it; later ones that name it too are worth a warning."""
    assignments: dict[str, Assignment] = {}
    twice: dict[tuple[str, str], list[str]] = {}
    widths = {linear.name: linear.in_features for linear in linears if linear.in_block}
    names = list(widths)
    for rule in rules:
        for name in names:
            if not rule.filter.matches(name):
                continue
            if owner := assignments.get(name):
                twice.setdefault((rule.position, owner.position), []).append(name)
            else:
                form = rule.form.for_width(widths[name])
                assignments[name] = Assignment(form, rule.position, f"spec.{rule.position}", rule.needs)
    warnings = [
        f"spec.{later} names {len(shared)} linears that spec.{first} has taken (first wins), e.g. {shared[0]}"
        for (later, first), shared in twice.items()
    ]
    for rule in rules:
        warnings += [
            f"spec.{rule.position}.{side}: pattern {pattern!r} matches no linear of the decoder blocks"
            for side, pattern in rule.filter.unmatched(names)
        ]
    return assignments, warnings


def _why_float(linear: LinearInfo, rules: list[LinearRule]) -> str:
    if not linear.in_block:
        return "outside the decoder blocks"
    excluded = [
        f"spec.{rule.position}.exclude"
        for rule in rules
        if rule.filter.exclude and NameFilter(rule.filter.exclude).matches(linear.name)
    ]
    return f"excluded by {', '.join(excluded)}" if excluded else "named by no rule"


def _units(
    model: StreamedModel, assignments: Mapping[str, Assignment], rules: list[LinearRule], output: Output
) -> list[PlannedUnit]:
    written: dict[str, int] = {}
    for tensor in output.tensors:
        written[tensor.unit] = written.get(tensor.unit, 0) + tensor.meta.nbytes
    units: list[PlannedUnit] = []
    for unit in model.units:
        linears: list[PlannedLinear] = []
        for info in unit.linears:
            assigned = assignments.get(info.name)
            kind = assigned.kind if assigned else LayerKind.FLOAT
            reason = assigned.reason if assigned else _why_float(info, rules)
            linears.append(PlannedLinear(info.name, kind, reason, info.out_features, info.in_features))
        units.append(PlannedUnit(unit.name, tuple(linears), owned_bytes(model, unit), written.get(unit.name, 0)))
    return units


def _peak(
    model: StreamedModel,
    units: list[PlannedUnit],
    runner: RunnerChoice,
    needs_data: bool,
    activation_bytes: int,
    quantized_copy: bool,
) -> int:
    """Predicted bytes beyond the imports: what is loaded at once, the codes under way, activations, the write queue."""
    blocks = [unit.bytes_in for unit, real in zip(units, model.units, strict=True) if real.block is not None]
    weights = [
        (linear.out_features * linear.in_features, unit.bytes_in)
        for unit in units
        for linear in unit.linears
        if linear.kind is not LayerKind.FLOAT
    ]
    largest_codes = max((codes for codes, _ in weights), default=0)
    queue = min(QUEUE_BYTES, sum(codes for codes, _ in weights))
    if not needs_data:
        return 2 * largest_codes + 2 * largest_codes + queue
    resident = sum(blocks) if runner.keeps_model else max(blocks, default=0)
    copies = max(blocks, default=0) // 2 if quantized_copy else largest_codes
    return resident + copies + queue + activation_bytes + _COMPUTE_LIBRARIES
