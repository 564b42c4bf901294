"""What a processor is, and what it works on.

A processor says which linears it quantizes and into what (:meth:`Processor.rules`), which inputs it must know about
(:meth:`Processor.observes`), and does its work on one unit at a time (:meth:`Processor.process`). It knows neither
files nor formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from slim_core.checkpoint.source import LazyTensor
from slim_core.model.units import LinearInfo
from slim_core.quantization.kinds import LayerKind
from slim_core.quantization.layers import QuantizedLinear
from slim_core.quantization.statistics import TensorRange
from slim_core.recipe import NameFilter, ProcessorConfig, processor_class

__all__ = ["Assignment", "LinearRule", "LinearWork", "Processor", "UnitWork", "create_processor"]


@dataclass(frozen=True)
class LinearRule:
    """``filter`` names the linears that the processor at ``position`` turns into ``kind``."""

    position: str
    filter: NameFilter
    kind: LayerKind


@dataclass(frozen=True)
class Assignment:
    """What the plan decided for a linear: its kind, the position of the processor that makes it, and why."""

    kind: LayerKind
    position: str
    reason: str


@dataclass(frozen=True)
class LinearWork:
    """A linear to be worked on: its description, its weight still in the file, its bias, and its assignment."""

    info: LinearInfo
    weight: LazyTensor
    bias: Tensor | None
    assignment: Assignment


@dataclass
class UnitWork:
    """One unit on the bench.

    Args:
        name: the unit.
        linears: those with an assignment, by module name.
        ranges: what was observed of their inputs.
        dtype: dtype the engine will run in; None if the model does not say.
        device: where to compute.
        finish: called with every finished layer and its signal-to-noise ratio in decibels.
    """

    name: str
    linears: Mapping[str, LinearWork]
    ranges: Mapping[str, TensorRange]
    dtype: torch.dtype | None
    device: torch.device
    finish: Callable[[LinearWork, QuantizedLinear, float], None]

    def owned_by(self, position: str) -> Iterator[LinearWork]:
        """The linears that the plan gave to the processor at ``position``."""
        return (work for work in self.linears.values() if work.assignment.position == position)


class Processor:
    """Base of the processors. ``position`` is where the recipe has it, e.g. ``process[0].configs[1]``."""

    Config: ClassVar[type[ProcessorConfig]]

    def __init__(self, config: Any, position: str) -> None:
        self.config = config
        self.position = position

    def rules(self) -> list[LinearRule]:
        """Which linears become what, most important first."""
        return []

    def notes(self) -> list[str]:
        """Remarks on the configuration that the plan passes on to the user."""
        return []

    def observes(self, linear: str, assignment: Assignment) -> bool:
        """Whether the input range of this linear must be observed."""
        return assignment.position.startswith(self.position) and assignment.kind.needs_data

    def process(self, work: UnitWork) -> None:
        """Do the work on one unit."""


def create_processor(config: ProcessorConfig, position: str) -> Processor:
    """The processor behind a configuration, found through its entry point."""
    return processor_class(config.type)(config, position)
