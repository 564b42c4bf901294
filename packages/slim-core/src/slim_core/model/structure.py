"""The subgraphs of all blocks of a model, proved on one block of every kind.

Blocks of one kind have the same class, the same modules and the same settings. One sample of a few tokens is run up to
the first block of each kind; only that block is loaded and computed. The others hand on what the first of their kind
made, which is as good: proofs hold for whatever hidden states a block is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from slim_core.model.probing import BlockProbe, Findings
from slim_core.model.skeleton import named_modules
from slim_core.model.subgraphs import Subgraph
from slim_core.model.suspended import SuspendedForward
from slim_core.model.units import StreamedModel, Unit

__all__ = ["Structure", "discover"]


@dataclass(frozen=True)
class Structure:
    """What was found, by unit."""

    findings: Mapping[str, Findings]

    def subgraphs(self) -> list[Subgraph]:
        """All of them, in the order of the units."""
        return [graph for found in self.findings.values() for graph in found.subgraphs]

    def refused(self) -> dict[str, str]:
        """Source to the reason why it is in no subgraph."""
        return {source: reason for found in self.findings.values() for source, reason in found.refused.items()}


def discover(model: StreamedModel, example: Mapping[str, Any]) -> Structure:
    """Find and prove the subgraphs of every block.

    Args:
        example: keyword arguments of the model for one short sample.

    Raises:
        InvalidModelError: the model does not run its blocks once each, in order.
    """
    known: dict[Any, tuple[str, Findings, Any]] = {}
    found: dict[str, Findings] = {}
    model.load(model.outside, torch.device("cpu"))
    try:
        with torch.no_grad(), SuspendedForward(model.module, model.blocks, [example]) as forward:
            forward.start()
            blocks = [unit for unit in model.units if unit.block is not None]
            for unit in blocks:
                kind = _kind(model, unit)
                if kind not in known:
                    known[kind] = unit.name, *_probe(model, unit, forward)
                first, findings, output = known[kind]
                found[unit.name] = _renamed(findings, first, unit.name)
                if unit is not blocks[-1]:
                    forward.resume(0, output)
    finally:
        model.unload(model.outside)
    return Structure(found)


def _kind(model: StreamedModel, unit: Unit) -> Any:
    """Equal for blocks that compute alike: classes, shapes and plain settings of all modules, their index aside."""
    module = model.module.get_submodule(unit.name)
    parts: list[Any] = []
    for name, child in named_modules(module):
        settings = tuple(
            (key, value)
            for key, value in sorted(vars(child).items())
            if isinstance(value, (bool, int, float, str)) and not key.startswith("_") and key not in _PLACES
        )
        shapes = tuple((key, tuple(value.shape)) for key, value in child.named_parameters(recurse=False))
        parts.append((name, type(child), settings, shapes))
    return tuple(parts)


_PLACES = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number", "training", "gradient_checkpointing"})


def _probe(model: StreamedModel, unit: Unit, forward: SuspendedForward) -> tuple[Findings, Any]:
    """The findings of the block that the sample is suspended at, and what the block makes of the sample."""
    call = forward.call(0)
    model.load(unit.parameters, torch.device("cpu"))
    try:
        findings = BlockProbe(model.module, unit.name, lambda: _hidden(forward.compute(call))).findings()
        return findings, forward.compute(call)
    finally:
        model.unload(unit.parameters)


def _hidden(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _renamed(found: Findings, first: str, name: str) -> Findings:
    """The findings of one block said of another of its kind."""

    def moved(module: str) -> str:
        return name + module.removeprefix(first)

    graphs = [
        replace(graph, source=moved(graph.source), targets=tuple(map(moved, graph.targets)))
        for graph in found.subgraphs
    ]
    refused = {moved(source): reason.replace(f"{first}.", f"{name}.") for source, reason in found.refused.items()}
    return Findings(graphs, refused)
