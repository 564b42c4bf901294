"""The plan: what every linear becomes and why, what will be written, what it will take."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from slim_core.budget import UNLIMITED, MemoryBudget
from slim_core.devices import Devices
from slim_core.errors import SlimError, UnsupportedError
from slim_core.memory import give_back_freed_memory
from slim_core.model.experts import ExpertLayer
from slim_core.model.inputs import MUL_SCALE
from slim_core.model.streamed import StreamedModel
from slim_core.model.structure import discover
from slim_core.processors.base import (
    Assignment,
    AttentionAssignment,
    AttentionState,
    Example,
    LinearRule,
    Processor,
    create_processor,
)
from slim_core.quantization.statistics import Need
from slim_core.recipe import SpecV1
from slim_core.recipe.schema import DatasetConfig
from slim_core.runners.choice import RunnerChoice, choose_runner, owned_bytes
from slim_core.runners.plan_attention import PlannedAttention, assign_attentions, idle_rotations, planned_attentions
from slim_core.runners.plan_experts import ExtraSamples, PlannedExperts, plan_experts
from slim_core.runners.plan_forwards import (
    fresh_requests,
    fresh_states,
    passes,
    requests_of,
    trained_linears,
    training_positions,
)
from slim_core.runners.plan_linears import (
    PlannedLinear,
    assign_linears,
    engine_refusal,
    engine_warnings,
    planned_linears,
)
from slim_core.runners.plan_memory import PlannedMemory, explores_by_expert, plan_memory
from slim_core.runners.plan_time import PlannedTime
from slim_core.runners.prediction import Calibration, Share, TowerLoad, memory_shares
from slim_core.runners.prior import PlannedStage, plan_stages
from slim_core.savers.base import Output, Saver, create_saver
from slim_core.savers.loaders import reads_floats, unloadable_attentions

__all__ = ["Plan", "PlannedUnit", "make_plan"]


@dataclass(frozen=True)
class PlannedUnit:
    """A unit, its linears, its attentions if the recipe is about any, its size before and after, and whether it is a
    drafting layer."""

    name: str
    linears: tuple[PlannedLinear, ...]
    bytes_in: int
    bytes_out: int
    attentions: tuple[PlannedAttention, ...] = ()
    drafts: bool = False


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
        memory: what the run is predicted to take, activations included, and whether that fits its budget.
        attentions: the attentions that will be quantized, by module name.
        experts: where there are experts, and what is done so that enough tokens reach each.
        refusal: why the plan is not carried out; None if it is.
        part: what the model is called in a folder that holds several; empty for the only one.
        others: plans for the other models of the folder, which the same run carries out.
        time: what a probe lets expect; None if there was none.
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
    memory: PlannedMemory
    attentions: dict[str, AttentionAssignment] = field(default_factory=dict[str, AttentionAssignment])
    fresh: dict[str, frozenset[Need]] = field(default_factory=dict[str, frozenset[Need]])
    fresh_states: frozenset[str] = frozenset()
    states: frozenset[AttentionState] = frozenset()
    stages: tuple[PlannedStage, ...] = ()
    experts: PlannedExperts = field(default_factory=lambda: PlannedExperts({}))
    refusal: SlimError | None = None
    part: str = ""
    others: list[Plan] = field(default_factory=list["Plan"])
    time: PlannedTime | None = None

    @property
    def needs_data(self) -> bool:
        return self.forwards > 0

    @property
    def bytes_in(self) -> int:
        return sum(unit.bytes_in for unit in self.units)

    @property
    def bytes_out(self) -> int:
        return self.output.nbytes

    @cached_property
    def trained(self) -> frozenset[str]:
        """The linears that learn while their block is run aside."""
        return trained_linears(self.processors, self.assignments)

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
    largest_forward: Callable[[], int] = lambda: 0,
    stage_bytes: Callable[[DatasetConfig], int] = lambda _: 0,
    tower_load: Callable[[DatasetConfig], TowerLoad] = lambda _: TowerLoad(),
    extra_samples: Callable[[], ExtraSamples] = ExtraSamples,
    example: Example | None = None,
    force: bool = False,
    budget: MemoryBudget = UNLIMITED,
    waiting_bytes: Callable[[], int] = lambda: 0,
    spills: bool = False,
    ranks: int = 1,
    ranks_here: int = 1,
    distributes: bool = False,
) -> Plan:
    """Work out the plan of a run.

    Reads headers only; where a processor must know the structure of the blocks, also one block of every kind.

    Args:
        activation_bytes: gives the size of the calibration set's hidden states at one point of the model; asked only if
            data is needed.
        largest_forward: gives the most tokens of it that go through a block at once.
        tower_load: what of a calibration set runs through the towers of the model.
        stage_bytes: the size of the hidden states of the calibration set of a stage ahead of the main one.
        extra_samples: says how many samples there are for experts below the quota; asked only if they are needed.
        example: gives keyword arguments of the model for one short sample; asked only if the structure is needed.
        budget: what the run may take; beyond it, experts are in memory one at a time, or else the plan is refused.
        waiting_bytes: gives what the largest of its forwards keeps while it is at work, before and after a block.
        spills: whether samples that are not at work wait on disk in any case.
        ranks: how many processes there could be; all of them make the same plan, and its memory is that of one.
        ranks_here: how many of them share the memory of this host, and the budget for it.
        distributes: whether several devices are used whatever the recipe says of the runner.
        force: only warn of what no engine can load; else the plan is one that is refused.

    Raises:
        SchemaValidateError, UnsupportedError: the recipe asks for something that does not exist.
    """
    _refuse_unsupported(spec)
    named = [create_processor(config, f"process[{i}]") for i, config in enumerate(spec.process)]
    processors = [leaf for processor in named for leaf in processor.leaves()]
    original, saver = model, create_saver(spec.save[0])
    for processor in processors:
        model = processor.prepare(model, example)
    rules = [rule for processor in processors for rule in processor.rules()]
    linears = [linear for unit in model.units for linear in unit.linears]
    assignments, warnings = assign_linears(linears, rules, training_positions(processors))
    model = _adopted(model, original, processors, example, budget.of_rank(ranks_here), assignments, saver)
    stages = plan_stages(spec, model, processors)
    linears = [linear for unit in model.units for linear in unit.linears]
    attention_rules = [rule for processor in processors for rule in processor.attention_rules()]
    infos = [info for unit in model.units for info in unit.attentions]
    attentions, about_attentions = assign_attentions(infos, attention_rules)
    warnings += about_attentions
    _check_places(saver, spec.save[0].type, attentions, processors, model)
    for processor in processors:
        processor.check(linears, assignments)
    warnings += [note for processor in processors for note in processor.notes()]
    warnings += engine_warnings(model, assignments, saver, processors)
    warnings += idle_rotations(infos, attentions)
    quantized = {info: attentions[info.name].form for info in infos if info.name in attentions}
    warnings += unloadable_attentions(quantized, saver.engine) if saver.engine else []
    refusal = engine_refusal(model, assignments, saver, quantized)
    if refusal is not None and force:
        warnings.insert(0, refusal.what)
        refusal = None
    if not assignments and not attentions:
        changed = model is not original or any(processor.reshapes for processor in processors)
        result = "stay a float model" if changed else "be a copy"
        warnings.append(f"no linear is quantized by this recipe: the output will {result}")
    requests = requests_of(processors, linears, assignments)
    states = frozenset(request for processor in processors for request in processor.state_requests())
    observes = bool(requests or states) or any(assignment.form.needs_data for assignment in attentions.values())
    needs_data = observes or any(processor.runs_block for processor in processors)
    runner = choose_runner(
        spec.runner,
        model,
        devices,
        needs_data=needs_data or bool(stages),
        budget=budget,
        ranks=ranks,
        whole_units=_why_whole_units(processors, spec, needs_data),
        distributes=distributes,
        searches=any(_searches(scheme) for processor in processors for scheme in processor.schemes().values()),
    )
    fresh, anew = fresh_requests(processors, requests), fresh_states(processors, attentions)
    streams, forwards = passes(processors, spec, observes, needs_data)
    output = saver.declare(model, assignments, attentions)
    warnings += saver.notes(output)
    units = [
        replace(unit, attentions=planned_attentions(real.attentions, attentions, attention_rules))
        for unit, real in zip(_units(model, assignments, rules, output), model.units, strict=True)
    ]
    kept = any(processor.runs_block for processor in processors)  # the outputs of the block at work
    sharing = 1 if runner.by_units else runner.ranks
    activations = -(-activation_bytes() // sharing) * (streams + kept) if needs_data else 0
    calibration, experts = None, PlannedExperts({})
    if needs_data:
        experts, about_experts = plan_experts(
            model, spec.dataset, requests, trained_linears(processors, assignments), extra_samples
        )
        warnings += about_experts
        if experts.quota is not None:  # outputs wait beside inputs until the block is done
            activations += 2 * experts.quota.extra.hidden_bytes
        keeps_layers = spec.propagate == "quantized"
        runs_again = bool(fresh or anew) or kept or keeps_layers
        calibration = Calibration(
            *(activations, largest_forward(), keeps_layers, kept, runs_again),
            tower_load(spec.dataset),
            waiting_bytes(),
            devices.kind,
        )
    learning = [
        (
            stage,
            Calibration(
                -(-stage_bytes(stage.dataset) // runner.ranks), towers=tower_load(stage.dataset), device=devices.kind
            ),
        )
        for stage in stages
    ]

    def shares(by_expert: Mapping[str, Sequence[ExpertLayer]], on_disk: bool) -> list[list[Share]]:
        given = (model, runner, processors, assignments, requests, calibration, by_expert)
        main = memory_shares(*given, spills=on_disk)
        ahead = [
            [
                *memory_shares(model, runner, (), {}, {}, passing, by_expert),
                Share(f"tokens kept in {stage.position}", stage.working_bytes(model)),
            ]
            for stage, passing in learning
        ]
        return [main, *ahead]

    sharers = ranks_here if runner.ranks > 1 else 1
    memory = plan_memory(
        budget.of_rank(sharers),
        devices,
        shares,
        experts.layers,
        _why_whole(runner, processors, needs_data),
        on_disk=((True,) if spills else (False, True)) if needs_data else (False,),
        sharers=sharers,
    )
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
        forwards=forwards + bool(fresh or anew),
        activation_bytes=activations,
        memory=memory,
        attentions=attentions,
        fresh=fresh,
        fresh_states=anew,
        refusal=refusal or memory.refusal,
        states=states,
        stages=stages,
        experts=experts,
    )


def _check_places(
    saver: Saver,
    name: str,
    attentions: Mapping[str, AttentionAssignment],
    processors: Sequence[Processor],
    model: StreamedModel,
) -> None:
    """Refuse what the format has no place for."""
    if attentions and not saver.holds_attentions:
        raise UnsupportedError(
            f"{name} has no place for quantized attentions", where="spec.save", remedy="use ascendv1_saver"
        )
    beside = next((processor for processor in processors if processor.leaves_extras), None)
    if beside is not None and not saver.holds_extras:
        raise UnsupportedError(
            f"{name} has no place for what {beside.config.type} leaves beside the weights",
            where=f"spec.{beside.position}",
            remedy="use ascendv1_saver",
        )
    rotated = [info.name for unit in model.units for info in unit.attentions if info.rotated]
    if rotated and not saver.holds_query_rotations:
        raise UnsupportedError(
            f"{name} has no place for rotations of query and key, e.g. those of {rotated[0]}",
            where="spec.save",
            remedy="use mindie_format_saver, or leave online_quarot out",
        )
    scaled = [name for unit in model.units for name in unit.added if name.endswith(MUL_SCALE)]
    if scaled and not saver.holds_input_scales:
        raise UnsupportedError(
            f"{name} has no place for the scales of {len(scaled)} linears whose input must be smoothed while the model "
            f"runs, because there is nothing to fold them into, e.g. {scaled[0].removesuffix(MUL_SCALE)}",
            where="spec.save",
            remedy="use mindie_format_saver, or exclude these linears from the smoothing",
        )


def _why_whole(runner: RunnerChoice, processors: Sequence[Processor], needs_data: bool) -> str:
    """Why whole blocks must be in memory, or never are; empty if one expert at a time would do."""
    if not needs_data:
        return "no block is loaded, and every linear is quantized by itself"
    if runner.keeps_model:
        return "runner: model_wise keeps all blocks in memory; use layer_wise"
    trains = next((processor for processor in processors if processor.runs_block), None)
    return f"{trains.config.type} learns all weights of a block together" if trains is not None else ""


def _searches(scheme: object) -> bool:
    """Whether linears of this scheme take more than one look at their weights."""
    weight = getattr(scheme, "weight", None)
    return getattr(weight, "method", "minmax") != "minmax"


def _why_whole_units(processors: Sequence[Processor], spec: SpecV1, needs_data: bool) -> str:
    """Why several ranks cannot divide the linears of a unit; empty if they can."""
    trains = next((processor for processor in processors if processor.runs_block), None)
    if trains is not None:
        order = ", one after the other" if spec.propagate == "quantized" else ""
        return f"{trains.config.type} trains all linears of a block together{order}"
    if needs_data and spec.dataset.route_starved_experts and spec.dataset.min_tokens_per_expert:
        return "route_starved_experts chooses among the tokens of all samples"
    return "" if needs_data else "no sample is run"


def _adopted(
    model: StreamedModel,
    original: StreamedModel,
    processors: Sequence[Processor],
    example: Example | None,
    budget: MemoryBudget,
    quantized: Collection[str],
    saver: Saver,
) -> StreamedModel:
    """The model that the processors will work on, once those that ask for it know its structure.

    Args:
        model, original: as processors prepared it, and as it was.
        quantized: the linears that will be quantized.
    """
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
    by_expert = explores_by_expert(budget, model)
    found = discover(model, example(), query_keys=query_keys, inputs=True, outside=original, by_expert=by_expert)
    folds = saver.engine is None or reads_floats(saver.engine)
    give_back_freed_memory()  # what was tried on the way
    structure = found.smoothable(model).settled(quantized, reads_floats=folds)
    for processor in curious:
        processor.adopt(structure, model)
    return model.with_additions(addition for processor in curious for addition in processor.additions())


def _refuse_unsupported(spec: SpecV1) -> None:
    if len(spec.save) != 1:
        raise UnsupportedError(
            f"{len(spec.save)} savers are given; a run has exactly one", where="spec.save", remedy="give one saver"
        )


def _units(
    model: StreamedModel, assignments: Mapping[str, Assignment], rules: list[LinearRule], output: Output
) -> list[PlannedUnit]:
    written: dict[str, int] = {}
    for tensor in output.tensors:
        written[tensor.unit] = written.get(tensor.unit, 0) + tensor.meta.nbytes
    return [
        PlannedUnit(
            unit.name,
            planned_linears(unit, assignments, rules),
            owned_bytes(model, unit),
            written.get(unit.name, 0),
            drafts=bool(unit.mirrors),
        )
        for unit in model.units
    ]
