"""The subgraphs of all blocks of a model, proved on one block of every kind.

Blocks of one kind have the same class, the same modules and the same settings. One sample of a few tokens is run up to
the first block of each kind; only that block is loaded and computed. The others hand on what the first of their kind
made, which is as good: proofs hold for whatever hidden states a block is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from slim_core.model.expert_weights import loaded
from slim_core.model.probing import BlockProbe, Findings
from slim_core.model.query_keys import KeyFindings, QueryKey, Side, find_query_key
from slim_core.model.skeleton import named_modules
from slim_core.model.streamed import StreamedModel
from slim_core.model.subgraphs import Subgraph
from slim_core.model.suspended import SuspendedForward
from slim_core.model.units import Unit
from slim_core.recipe import NameFilter

__all__ = ["Structure", "discover", "kind_of"]

_SHARED = "other layers have the same weights"
_ALONE = "the model's adapter says to leave it alone"


@dataclass(frozen=True)
class Structure:
    """What was found, by unit.

    Args:
        keys: where scales can move from keys to queries; empty unless it was asked for.
    """

    findings: Mapping[str, Findings]
    keys: Mapping[str, KeyFindings] = field(default_factory=dict[str, KeyFindings])

    def subgraphs(self) -> list[Subgraph]:
        """All of them, in the order of the units."""
        return [graph for found in self.findings.values() for graph in found.subgraphs]

    def refused(self) -> dict[str, str]:
        """Source to the reason why it is in no subgraph."""
        return {source: reason for found in self.findings.values() for source, reason in found.refused.items()}

    def smoothable(self, model: StreamedModel) -> Structure:
        """The same without what must not be rescaled.

        That is what the adapter leaves alone, and weights that another unit has too: each would want its own scales.
        """
        alone = NameFilter(model.unsmoothed) if model.unsmoothed else None
        uses = Counter(stored for unit in model.units for stored in set(unit.parameters.values()))
        findings, keys = dict(self.findings), dict(self.keys)
        for unit in (unit for unit in model.units if unit.name in self.findings):
            shared = {parameter for parameter, stored in unit.parameters.items() if uses[stored] > 1}

            def obstacle(*modules: str, shared: Collection[str] = shared) -> str | None:
                if any(f"{module}.weight" in shared for module in modules):
                    return _SHARED
                return _ALONE if alone is not None and alone.matches(modules[0]) else None

            found, places = findings[unit.name], keys.get(unit.name, KeyFindings())
            left = {g.source: why for g in found.subgraphs if (why := obstacle(g.source, *g.targets))}
            odd = {k.attention: why for k in places.found if (why := obstacle(k.key.module, k.query.module))}
            kept = [one for one in found.subgraphs if one.source not in left]
            findings[unit.name] = Findings(kept, found.refused | left)
            others = [one for one in places.found if one.attention not in odd]
            keys[unit.name] = KeyFindings(others, places.refused | odd)
        return Structure(findings, keys)


def discover(
    model: StreamedModel,
    example: Mapping[str, Any],
    *,
    query_keys: bool = False,
    outside: StreamedModel | None = None,
    by_expert: bool = False,
) -> Structure:
    """Find and prove the subgraphs of every block.

    Args:
        example: keyword arguments of the model for one short sample.
        query_keys: also find where scales can move from keys to queries.
        outside: where to take from what lies outside the blocks, if not from the model: another view of the same, whose
            tensors can be had for less. Proofs hold for whatever hidden states a block is given.
        by_expert: have the weights of one routed expert at a time in memory.

    Raises:
        InvalidModelError: the model does not run its blocks once each, in order.
    """
    known: dict[Any, tuple[str, Findings, KeyFindings, Any]] = {}
    found: dict[str, Findings] = {}
    keys: dict[str, KeyFindings] = {}
    around = outside or model
    around.load(around.outside, torch.device("cpu"))
    try:
        with torch.no_grad(), SuspendedForward(model.module, model.stops, [example], len(model.towers)) as forward:
            forward.start()
            blocks = [unit for unit in model.units if unit.block is not None]
            for unit in blocks:
                kind = kind_of(model, unit)
                if kind not in known:
                    known[kind] = unit.name, *_probe(model, unit, forward, query_keys, by_expert)
                first, findings, of_keys, output = known[kind]
                found[unit.name] = _renamed(findings, first, unit.name)
                keys[unit.name] = _renamed_keys(of_keys, first, unit.name)
                if unit is not blocks[-1]:
                    forward.resume(0, output)
    finally:
        around.unload(around.outside)
    return Structure(found, keys)


def kind_of(model: StreamedModel, unit: Unit) -> Any:
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


def _probe(
    model: StreamedModel, unit: Unit, forward: SuspendedForward, query_keys: bool, by_expert: bool
) -> tuple[Findings, KeyFindings, Any]:
    """The findings of the block that the sample is suspended at, and what the block makes of the sample."""
    call = forward.call(0)
    with loaded(model, unit, torch.device("cpu"), by_expert=by_expert) as on_call:

        def run() -> Tensor:
            return _hidden(forward.compute(call))

        findings = BlockProbe(model.module, unit.name, run, model.subgraphs, on_call).findings()
        _refuse_shared(unit, findings)
        keys = KeyFindings()
        for info in unit.attentions if query_keys else ():
            place = find_query_key(model, info, run)
            if isinstance(place, str):
                keys.refused[info.name] = place
            else:
                keys.found.append(place)
        return findings, keys, forward.compute(call)


def _refuse_shared(unit: Unit, findings: Findings) -> None:
    """The block does not show it, but values that later layers take over cannot be rescaled for this one alone."""
    shared = {info.name for info in unit.attentions if info.shared}
    for graph in [g for g in findings.subgraphs if g.type == "ov" and g.source.rpartition(".")[0] in shared]:
        findings.subgraphs.remove(graph)
        findings.refused[graph.source] = "later layers take over its values"


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


def _renamed_keys(found: KeyFindings, first: str, name: str) -> KeyFindings:
    def moved(module: str) -> str:
        return name + module.removeprefix(first)

    def side(one: Side) -> Side:
        return replace(one, module=moved(one.module))

    def moved_place(place: QueryKey) -> QueryKey:
        return replace(place, attention=moved(place.attention), key=side(place.key), query=side(place.query))

    return KeyFindings(
        list(map(moved_place, found.found)), {moved(attention): why for attention, why in found.refused.items()}
    )
