"""The plan: what every linear becomes and why, what will be written, what it will take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from slim_core.checkpoint.writer import QUEUE_BYTES
from slim_core.devices import Devices
from slim_core.errors import UnsupportedError
from slim_core.model.structure import discover
from slim_core.model.units import LinearInfo, StreamedModel
from slim_core.processors.base import (
    Assignment,
    AttentionAssignment,
    Example,
    LinearRule,
    Processor,
    StateRequest,
    create_processor,
)
from slim_core.quantization.kinds import LayerKind
from slim_core.quantization.statistics import Need
from slim_core.recipe import NameFilter, SpecV1
from slim_core.recipe.schema import DatasetConfig
from slim_core.runners.choice import RunnerChoice, choose_runner, owned_bytes
from slim_core.runners.plan_attention import PlannedAttention, assign_attentions, planned_attentions
from slim_core.runners.prior import PlannedStage, plan_stages
from slim_core.savers.base import Output, Saver, create_saver
from slim_core.savers.loaders import MAIN_ENGINE, lost_biases, mixed_fusions, unloadable, unloadable_attentions

__all__ = ["Plan", "PlannedLinear", "PlannedUnit", "make_plan"]

# Statistics of a whole tensor that say nothing of its channels.
_LOST = frozenset({Need.HISTOGRAM, Need.SAMPLE_RANGES})
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
    """A unit, its linears, its attentions if the recipe is about any, and its size before and after."""

    name: str
    linears: tuple[PlannedLinear, ...]
    bytes_in: int
    bytes_out: int
    attentions: tuple[PlannedAttention, ...] = ()


@dataclass
class Plan:
    """Everything that is known before the run.

    Args:
        model: what is worked on; the model of the checkpoint as processors prepared it.
        assignments: the linears that will be quantized, by module name.
        output: every tensor of the output and the files it falls into.
        requests: what must be observed of the inputs of which linears.
        states: the states of attentions of which processors must know the range of every channel.
        stages: what is carried out first, to learn what the processors need.
        fresh, fresh_states: those of the requests, and the attentions, that are observed once the block was reshaped,
            in a forward of its own.
        streams: how often every sample is carried along: twice where exact and quantized outputs are both needed.
        forwards: forward passes of each block per calibration sample, those of processors that run it aside.
        peak_memory: predicted bytes beyond what the process takes after its imports, activations included.
        attentions: the attentions that will be quantized, by module name.
    """

    model: StreamedModel
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
    attentions: dict[str, AttentionAssignment] = field(default_factory=dict[str, AttentionAssignment])
    fresh: dict[str, frozenset[Need]] = field(default_factory=dict[str, frozenset[Need]])
    fresh_states: frozenset[str] = frozenset()
    states: frozenset[StateRequest] = frozenset()
    stages: tuple[PlannedStage, ...] = ()

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

    def attention_counts(self) -> dict[str, int]:
        """How many attentions become what; empty if the recipe is about linears alone."""
        counts: dict[str, int] = {}
        for attention in (attention for unit in self.units for attention in unit.attentions):
            counts[attention.becomes] = counts.get(attention.becomes, 0) + 1
        return counts


def make_plan(
    model: StreamedModel,
    spec: SpecV1,
    devices: Devices,
    *,
    activation_bytes: Callable[[], int] = lambda: 0,
    stage_bytes: Callable[[DatasetConfig], int] = lambda _: 0,
    example: Example | None = None,
) -> Plan:
    """Work out the plan of a run.

    Reads headers only; where a processor must know the structure of the blocks, also one block of every kind.

    Args:
        activation_bytes: gives the size of the calibration set's hidden states at one point of the model; asked only if
            data is needed.
        stage_bytes: the same of the calibration set of a stage ahead of the main one.
        example: gives keyword arguments of the model for one short sample; asked only if the structure is needed.

    Raises:
        SchemaValidateError, UnsupportedError: the recipe asks for something that does not exist.
    """
    _refuse_unsupported(spec)
    named = [create_processor(config, f"process[{i}]") for i, config in enumerate(spec.process)]
    processors = [leaf for processor in named for leaf in processor.leaves()]
    original, model = model, _prepared(model, processors, example)
    stages = plan_stages(spec, model, processors)
    saver = create_saver(spec.save[0])
    rules = [rule for processor in processors for rule in processor.rules()]
    linears = [linear for unit in model.units for linear in unit.linears]
    assignments, warnings = _assign(linears, rules)
    attention_rules = [rule for processor in processors for rule in processor.attention_rules()]
    infos = [info for unit in model.units for info in unit.attentions]
    attentions, about_attentions = assign_attentions(infos, attention_rules)
    warnings += about_attentions
    if attentions and not saver.holds_attentions:
        raise UnsupportedError(
            f"{spec.save[0].type} has no place for quantized attentions", where="spec.save", remedy="use ascendv1_saver"
        )
    for processor in processors:
        processor.check(linears, assignments)
    warnings += [note for processor in processors for note in processor.notes()]
    forms = {i.name: assignments[i.name].form if i.name in assignments else LayerKind.FLOAT for i in linears}
    widths = {info.name: info.in_features for info in linears}
    warnings += mixed_fusions(forms) + unloadable(forms, widths, saver.labels)
    warnings += unloadable_attentions({info: attentions[info.name].form for info in infos if info.name in attentions})
    warnings += _lost_shifts(model, assignments)
    if not assignments and not attentions:
        changed = model is not original or any(processor.reshapes for processor in processors)
        result = "stay a float model" if changed else "be a copy"
        warnings.append(f"no linear is quantized by this recipe: the output will {result}")
    requests = _requests(processors, linears, assignments)
    states = frozenset(request for processor in processors for request in processor.state_requests())
    observes = bool(requests or states) or any(assignment.form.needs_data for assignment in attentions.values())
    needs_data = observes or any(processor.runs_block for processor in processors)
    runner = choose_runner(spec.runner, model, devices, needs_data=needs_data)
    fresh, fresh_states = _fresh(processors, requests), _fresh_states(processors, attentions)
    streams, forwards = _passes(processors, spec, observes, needs_data)
    output = saver.declare(model, assignments, attentions)
    units = [
        replace(unit, attentions=planned_attentions(real.attentions, attentions, attention_rules))
        for unit, real in zip(_units(model, assignments, rules, output), model.units, strict=True)
    ]
    kept = any(processor.runs_block for processor in processors)  # the outputs of the block at work
    activations = activation_bytes() * (streams + kept) if needs_data else 0
    working = [sum(one.working_bytes(unit.linears, assignments) for one in processors) for unit in model.units]
    peak = max(working, default=0) + _peak(model, units, runner, needs_data, activations, quantized_copy=forwards > 1)
    if stages:
        learning = max(stage_bytes(stage.dataset) + stage.working_bytes(model) for stage in stages)
        peak = max(peak, _peak(model, units, runner, True, learning, quantized_copy=False))
    return Plan(
        model=model,
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
        forwards=forwards + bool(fresh or fresh_states),
        activation_bytes=activations,
        peak_memory=peak,
        attentions=attentions,
        fresh=fresh,
        fresh_states=fresh_states,
        states=states,
        stages=stages,
    )


def _prepared(model: StreamedModel, processors: list[Processor], example: Example | None) -> StreamedModel:
    """The model that the processors will work on, once those that ask for it know its structure."""
    original = model
    for processor in processors:
        model = processor.prepare(model, example)
    curious = [processor for processor in processors if processor.uses_structure]
    if not curious:
        return model
    if example is None:
        raise UnsupportedError(
            "the structure of this kind of model cannot be explored, because its service gives no example of its input",
            where=f"spec.{curious[0].position}",
            remedy="leave this processor out",
        )
    query_keys = any(processor.uses_query_keys for processor in curious)
    structure = discover(model, example(), query_keys=query_keys, outside=original)
    for processor in curious:
        processor.adopt(structure, model)
    return model.with_additions(addition for processor in curious for addition in processor.additions())


def _fresh(processors: list[Processor], requests: Mapping[str, frozenset[Need]]) -> dict[str, frozenset[Need]]:
    """What cannot be carried over to an input that is rescaled, and must be observed again."""
    rescaled = {name for processor in processors for name in processor.rescales()}
    return {name: lost for name in rescaled if (lost := requests.get(name, frozenset()) & _LOST)}


def _fresh_states(processors: list[Processor], attentions: Mapping[str, AttentionAssignment]) -> frozenset[str]:
    """Attentions with a rescaled state whose statistics are not of single channels."""
    changes = [change for processor in processors for change in processor.changes_states()]
    return frozenset(
        change.attention
        for change in changes
        if (assigned := attentions.get(change.attention)) is not None
        and any(
            name == change.state and form.is_static and form.scope != "per_channel"
            for name, form in assigned.form.states()
        )
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


def _passes(processors: list[Processor], spec: SpecV1, observes: bool, needs_data: bool) -> tuple[int, int]:
    """How many streams of samples there are, and how often each block runs for a sample."""
    if not needs_data:
        return 1, 0
    if spec.propagate == "float":
        return 1, 1
    if any(processor.wants_float_targets for processor in processors):
        return 2, 3 if observes else 2
    return 1, 2


def _refuse_unsupported(spec: SpecV1) -> None:
    if len(spec.save) != 1:
        raise UnsupportedError(
            f"{len(spec.save)} savers are given; a run has exactly one", where="spec.save", remedy="give one saver"
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
    # To exclude the head is pointless but no mistake.
    every = [linear.name for linear in linears]
    for rule in rules:
        warnings += [
            f"spec.{rule.position}.{side}: pattern {pattern!r} matches no linear of the decoder blocks"
            for side, known in (("include", names), ("exclude", every))
            for where, pattern in rule.filter.unmatched(known)
            if where == side
        ]
    return assignments, warnings


def _lost_shifts(model: StreamedModel, assignments: Mapping[str, Assignment]) -> list[str]:
    """A warning for linears behind a shifted norm from which the main engine takes the bias away again."""
    given = {
        info.name: assignments[info.name].kind if info.name in assignments else LayerKind.FLOAT
        for unit in model.units
        for info in unit.linears
        if f"{info.name}.bias" in unit.added
    }
    return [
        f"the shift (symmetric: false) gives a bias to {len(names)} {kind} linears whose class has none, e.g. "
        f"{names[0]}; {MAIN_ENGINE} drops it, and the results are wrong. Quantize them to static W8A8, exclude the "
        "norm in front of them from the smoothing, or set symmetric: true"
        for kind, names in lost_biases(given).items()
    ]


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
