"""What a processor is, and what it works on.

A processor says which linears it quantizes and into what (:meth:`Processor.rules`), which attentions
(:meth:`Processor.attention_rules`), what it must know of which inputs (:meth:`Processor.requests`), and does its work
on one unit at a time (:meth:`Processor.process`). One that reshapes the model before others quantize it looks at the
model's structure first (:meth:`Processor.adopt`). It knows neither files nor formats.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor

from slim_core.checkpoint.source import LazyTensor
from slim_core.model.attention import AttentionInfo
from slim_core.model.block_run import BlockRun
from slim_core.model.streamed import StreamedModel
from slim_core.model.structure import Structure
from slim_core.model.units import Addition, LinearInfo
from slim_core.model.weights import UnitWeights, WeightView
from slim_core.quantization.attention import AttentionForm, QuantizedAttention
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.quantization.layers import QuantizedLinear
from slim_core.quantization.statistics import InputStatistics, Need
from slim_core.quantization.statistics.attention import AttentionStatistics
from slim_core.quantization.weights import refuse_infinite
from slim_core.recipe import NameFilter, ProcessorConfig, processor_class
from slim_core.smoothing.scales import SmoothingNote

__all__ = [
    "Assignment",
    "AttentionAssignment",
    "AttentionRule",
    "AttentionState",
    "AttentionWork",
    "Example",
    "Extras",
    "LinearRule",
    "LinearWork",
    "Processor",
    "UnitWork",
    "create_processor",
]


@dataclass(frozen=True)
class LinearRule:
    """``filter`` names the linears that the processor at ``position`` turns into ``form``, knowing ``needs``.

    Args:
        unseen: what the processor makes of a linear that is never run, so that nothing is known of its input, where
            ``form`` has a static one; None: such a linear stays as it is.
    """

    position: str
    filter: NameFilter
    form: LayerForm
    needs: frozenset[Need] = frozenset()
    unseen: LayerForm | None = None


@dataclass(frozen=True)
class Assignment:
    """What the plan decided for a linear: its form, the position of the processor that makes it, and why."""

    form: LayerForm
    position: str
    reason: str
    needs: frozenset[Need] = frozenset()

    @property
    def kind(self) -> LayerKind:
        return self.form.kind


@dataclass(frozen=True)
class LinearWork:
    """A linear to be worked on: its description, its weight not yet read, its bias, and its assignment."""

    info: LinearInfo
    weight: LazyTensor | WeightView
    bias: Tensor | None
    assignment: Assignment


@dataclass(frozen=True)
class AttentionRule:
    """``filter`` names the attentions that the processor at ``position`` turns into ``form``."""

    position: str
    filter: NameFilter
    form: AttentionForm


@dataclass(frozen=True)
class AttentionAssignment:
    """What the plan decided for an attention: its form, the position of the processor that makes it, and why."""

    form: AttentionForm
    position: str
    reason: str


@dataclass(frozen=True)
class AttentionWork:
    """An attention to be worked on: its description, its assignment, and what was observed of its states."""

    info: AttentionInfo
    assignment: AttentionAssignment
    statistics: AttentionStatistics | None


@dataclass(frozen=True)
class AttentionState:
    """A state (``query``, ``key`` or ``value``) of an attention."""

    attention: str
    state: str


@dataclass(frozen=True)
class Extras:
    """What a processor leaves beside the weights.

    Args:
        files: path in the output folder to the tensors of a safetensors file there.
        description: merged into the global keys of the description, nested objects included.
    """

    files: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict[str, Mapping[str, Tensor]])
    description: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass
class UnitWork:
    """One unit on the bench.

    Args:
        name: the unit.
        linears: those with an assignment, by module name.
        statistics: what was observed of the inputs of linears, with an assignment or not.
        dtype: dtype the engine will run in; None if the model does not say.
        device: where to compute.
        finish: called with every finished layer and its signal-to-noise ratio in decibels.
        block: the block itself, for processors that have ``runs_block``; None outside the blocks.
        attentions: those with an assignment, by module name.
        finish_attention: called with every finished attention.
        weights: all parameters of the unit, to be reshaped before they are quantized.
        states: what was observed of attentions because a processor asked for it, by module name.
        starved: the linears of experts to which too few tokens were routed to learn from, and those of drafting layers,
            which nothing runs.
        note: called with what was done to every subgraph that was to be smoothed, for the report.
        divided: carries out jobs that do not depend on each other, given with their sizes, and gives what they gave, in
            their order; several ranks share them. What they give must be small, and without ties to the unit.
    """

    name: str
    linears: Mapping[str, LinearWork]
    statistics: dict[str, InputStatistics]
    dtype: torch.dtype | None
    device: torch.device
    finish: Callable[[LinearWork, QuantizedLinear, float], None]
    block: BlockRun | None = None
    attentions: dict[str, AttentionWork] = field(default_factory=dict[str, AttentionWork])
    finish_attention: Callable[[AttentionWork, QuantizedAttention], None] = lambda _work, _quantized: None
    weights: UnitWeights | None = None
    states: dict[str, AttentionStatistics] = field(default_factory=dict[str, AttentionStatistics])
    starved: frozenset[str] = frozenset()
    note: Callable[[SmoothingNote], None] = lambda _note: None
    divided: Callable[[Sequence[int], Sequence[Callable[[], Any]]], list[Any]] = lambda _sizes, jobs: [
        job() for job in jobs
    ]

    def owned_by(self, position: str) -> Iterator[LinearWork]:
        """The linears that the plan gave to the processor at ``position``, with their weights as they are now.

        Raises:
            InvalidModelError: a bias holds NaN or infinity; names the tensor and the row.
        """
        return (self._current(work) for work in self.linears.values() if work.assignment.position == position)

    def _current(self, work: LinearWork) -> LinearWork:
        if self.weights is None:
            return work
        name = f"{work.info.name}.bias"
        bias = self.weights[name].load() if name in self.weights else None
        if bias is not None:
            refuse_infinite(bias.unsqueeze(1), name, what="bias")
        return replace(work, weight=self.weights[f"{work.info.name}.weight"], bias=bias)

    def rescale(self, targets: Sequence[str], scale: Tensor, shift: Tensor | None = None) -> None:
        """From now on these linears, which share their input, see ``(x - shift) / scale``.

        Args:
            scale, shift: float32 ``(in,)``.
        """
        done: dict[int, InputStatistics] = {}
        for name in targets:
            if (seen := self.statistics.get(name)) is not None:
                if id(seen) not in done:
                    done[id(seen)] = seen.rescaled(scale, shift)
                self.statistics[name] = done[id(seen)]

    def seen(self, name: str) -> InputStatistics:
        """What was observed of the input of a linear; empty statistics if nothing was."""
        return self.statistics.get(name) or InputStatistics()

    def rescale_states(self, attention: str, state: str, factor: Tensor) -> None:
        """From now on the channels of this state are multiplied by positive factors ``(heads * channels,)``."""
        if (asked := self.states.get(attention)) is not None:
            self.states[attention] = asked.rescaled(state, factor)
        work = self.attentions.get(attention)
        if work is not None and work.statistics is not None:
            self.attentions[attention] = replace(work, statistics=work.statistics.rescaled(state, factor))


Example = Callable[[], Mapping[str, Any]]


class Processor:
    """Base of the processors. ``position`` is where the recipe has it, e.g. ``process[0].configs[1]``."""

    Config: ClassVar[type[ProcessorConfig]]

    def __init__(self, config: Any, position: str) -> None:
        self.config = config
        self.position = position

    def leaves(self) -> list[Processor]:
        """The processors that do the work: itself, unless it stands for others."""
        return [self]

    @property
    def reshapes(self) -> bool:
        """Whether it changes weights for others to quantize, so that it works ahead of all that do not."""
        return False

    @property
    def changes_floats(self) -> bool:
        """Whether it may change tensors that stay in floating point, such as weights of norms."""
        return self.reshapes

    @property
    def leaves_extras(self) -> bool:
        """Whether :meth:`extras` will give something."""
        return False

    @property
    def uses_structure(self) -> bool:
        """Whether :meth:`adopt` must be told what is known of the blocks."""
        return False

    @property
    def uses_query_keys(self) -> bool:
        """Whether the structure must also say where scales can move from keys to queries."""
        return False

    @property
    def runs_block(self) -> bool:
        """Whether :meth:`process` needs :attr:`UnitWork.block`, so that inputs and outputs of a block must be kept."""
        return False

    def block_forwards(self, samples: int) -> int:
        """About how many forwards it runs of a block, given so many samples; one with gradients is as long as three."""
        return 0

    @property
    def wants_float_targets(self) -> bool:
        """Whether, with ``propagate: quantized``, targets must come from a forward that saw no quantized layer."""
        return False

    def prepare(self, model: StreamedModel, example: Example | None) -> StreamedModel:
        """The model that all else works on, where that is not the one in the checkpoint: e.g. a rotated view of it.

        Args:
            example: gives keyword arguments of the model for one short sample; None if nobody can.

        Raises:
            SlimError: the model does not allow it.
        """
        return model

    @property
    def learns(self) -> bool:
        """Whether its place is a stage ahead of the main one, where it only looks and leaves what it has learned."""
        return False

    def watches(self, linears: Sequence[LinearInfo], followers: Sequence[Processor]) -> Mapping[str, int]:
        """The linears of whose inputs it must see a sample, and how many tokens; asked only if it learns.

        Args:
            followers: the processors of the main stage, which have prepared the model that it will look at.

        Raises:
            SlimError: there is nothing to learn, or nobody to learn it for.
        """
        return {}

    def learn(self, seen: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What it has learned, by name.

        Args:
            seen: by linear, float32 ``(tokens, channels)``; linears that share their input have the same tensor.
        """
        return {}

    def inherit(self, learned: Mapping[str, Tensor], model: StreamedModel) -> StreamedModel:
        """The model to be worked on, now that the stages ahead have learned what they should.

        It has the same tensors as the one that was prepared, in name, dtype and shape.
        """
        return model

    def adopt(self, structure: Structure, model: StreamedModel) -> None:
        """Take note of the subgraphs of the model, before anything else is asked.

        Raises:
            SlimError: there is nothing in the model that it could work on.
        """

    def rescales(self) -> Collection[str]:
        """The linears whose inputs it will rescale, known after :meth:`adopt`."""
        return ()

    def state_requests(self) -> Collection[AttentionState]:
        """The states whose channels it must know, of attentions quantized or not; asked after :meth:`adopt`.

        What was seen is in :attr:`UnitWork.states`.
        """
        return ()

    def changes_states(self) -> Collection[AttentionState]:
        """The states of attentions that it will rescale, known after :meth:`adopt`."""
        return ()

    def additions(self) -> list[Addition]:
        """Parameters that the model will have beyond those of the checkpoint, known after :meth:`adopt`."""
        return []

    def extras(self) -> Extras | None:
        """What goes beside the weights, asked for after the last unit."""
        return None

    def rules(self) -> list[LinearRule]:
        """Which linears become what, most important first."""
        return []

    def attention_rules(self) -> list[AttentionRule]:
        """Which attentions become what, most important first."""
        return []

    def summary(self) -> str:
        """What it does to the model before anything is quantized, for the plan; empty if there is nothing to say."""
        return ""

    def schemes(self) -> Mapping[str, BaseModel]:
        """By the positions in :meth:`rules` and :meth:`attention_rules`: what the recipe says of layers of these."""
        return {self.position: self.config}

    def own(self, linears: Sequence[LinearInfo], assignments: Mapping[str, Assignment]) -> list[LinearInfo]:
        """Those of the linears that the plan gave to it, at one of its positions."""
        positions = self.schemes()
        return [info for info in linears if (a := assignments.get(info.name)) is not None and a.position in positions]

    def notes(self) -> list[str]:
        """Remarks on the configuration that the plan passes on to the user."""
        return []

    def requests(
        self, linears: Sequence[LinearInfo], assignments: Mapping[str, Assignment]
    ) -> Mapping[str, frozenset[Need]]:
        """What must be known of the inputs of which linears; by default what the own assignments say."""
        return {info.name: needs for info in self.own(linears, assignments) if (needs := assignments[info.name].needs)}

    def check(self, linears: Sequence[LinearInfo], assignments: Mapping[str, Assignment]) -> None:
        """Refuse what the plan shows to be impossible, before any weight is read.

        Raises:
            SlimError: e.g. a group size that does not divide the width of a linear.
        """

    def working_bytes(self, linears: Sequence[LinearInfo], assignments: Mapping[str, Assignment]) -> int:
        """Memory that the work on one unit takes, beyond its weights, what was observed, and the finished layers.

        Of a processor that reshapes, what it leaves behind counts too.
        """
        return 0

    def copied_bytes(self, linears: Sequence[LinearInfo]) -> int:
        """How much of that is copies of the weights it changes, which are made only if the block is run once more."""
        return 0

    def process(self, work: UnitWork) -> None:
        """Do the work on one unit."""


def create_processor(config: ProcessorConfig, position: str) -> Processor:
    """The processor behind a configuration, found through its entry point."""
    return processor_class(config.type)(config, position)
