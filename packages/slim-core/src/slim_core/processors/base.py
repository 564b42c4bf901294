"""What a processor is, and what it works on.

A processor says which linears it quantizes and into what (:meth:`Processor.rules`), what it must know of which inputs
(:meth:`Processor.requests`), and does its work on one unit at a time (:meth:`Processor.process`). It knows neither
files nor formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from slim_core.checkpoint.source import LazyTensor
from slim_core.model.units import LinearInfo
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.quantization.layers import QuantizedLinear
from slim_core.quantization.statistics import InputStatistics, Need
from slim_core.recipe import NameFilter, ProcessorConfig, processor_class

__all__ = [
    "Assignment",
    "BlockRun",
    "LinearRule",
    "LinearWork",
    "Processor",
    "UnitWork",
    "create_processor",
]


@dataclass(frozen=True)
class LinearRule:
    """``filter`` names the linears that the processor at ``position`` turns into ``form``, knowing ``needs``."""

    position: str
    filter: NameFilter
    form: LayerForm
    needs: frozenset[Need] = frozenset()


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
    """A linear to be worked on: its description, its weight still in the file, its bias, and its assignment."""

    info: LinearInfo
    weight: LazyTensor
    bias: Tensor | None
    assignment: Assignment


class BlockRun(Protocol):
    """The block at work, loaded on the device, with its inputs: for processors that must run it themselves."""

    @property
    def module(self) -> nn.Module:
        """The whole model; the block's linears are found in it by name and may be replaced for a while."""
        ...

    @property
    def samples(self) -> int: ...

    def run(self, sample: int) -> Tensor:
        """The hidden states that the block makes of a sample as it is now, on the device; gradients flow if enabled."""
        ...

    def target(self, sample: int) -> Tensor:
        """The hidden states that the float block should make of this sample, on the device."""
        ...


@dataclass
class UnitWork:
    """One unit on the bench.

    Args:
        name: the unit.
        linears: those with an assignment, by module name.
        statistics: what was observed of their inputs.
        dtype: dtype the engine will run in; None if the model does not say.
        device: where to compute.
        finish: called with every finished layer and its signal-to-noise ratio in decibels.
        block: the block itself, for processors that have ``runs_block``; None outside the blocks.
    """

    name: str
    linears: Mapping[str, LinearWork]
    statistics: Mapping[str, InputStatistics]
    dtype: torch.dtype | None
    device: torch.device
    finish: Callable[[LinearWork, QuantizedLinear, float], None]
    block: BlockRun | None = None

    def owned_by(self, position: str) -> Iterator[LinearWork]:
        """The linears that the plan gave to the processor at ``position``."""
        return (work for work in self.linears.values() if work.assignment.position == position)

    def seen(self, name: str) -> InputStatistics:
        """What was observed of the input of a linear; empty statistics if nothing was."""
        return self.statistics.get(name) or InputStatistics()


class Processor:
    """Base of the processors. ``position`` is where the recipe has it, e.g. ``process[0].configs[1]``."""

    Config: ClassVar[type[ProcessorConfig]]

    def __init__(self, config: Any, position: str) -> None:
        self.config = config
        self.position = position

    @property
    def runs_block(self) -> bool:
        """Whether :meth:`process` needs :attr:`UnitWork.block`, so that inputs and outputs of a block must be kept."""
        return False

    @property
    def wants_float_targets(self) -> bool:
        """Whether, with ``propagate: quantized``, targets must come from a forward that saw no quantized layer."""
        return False

    def rules(self) -> list[LinearRule]:
        """Which linears become what, most important first."""
        return []

    def notes(self) -> list[str]:
        """Remarks on the configuration that the plan passes on to the user."""
        return []

    def requests(
        self, linears: Sequence[LinearInfo], assignments: Mapping[str, Assignment]
    ) -> Mapping[str, frozenset[Need]]:
        """What must be known of the inputs of which linears; by default what the own assignments say."""
        return {
            name: assignment.needs
            for name, assignment in assignments.items()
            if assignment.position == self.position and assignment.needs
        }

    def check(self, linears: Sequence[LinearInfo], assignments: Mapping[str, Assignment]) -> None:
        """Refuse what the plan shows to be impossible, before any weight is read.

        Raises:
            SlimError: e.g. a group size that does not divide the width of a linear.
        """

    def process(self, work: UnitWork) -> None:
        """Do the work on one unit."""


def create_processor(config: ProcessorConfig, position: str) -> Processor:
    """The processor behind a configuration, found through its entry point."""
    return processor_class(config.type)(config, position)
