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
from slim_core.model.shared_inputs import find_shared_inputs
from slim_core.model.skeleton import named_modules
from slim_core.model.streamed import StreamedModel
from slim_core.model.subgraphs import Subgraph
from slim_core.model.suspended import SuspendedForward
from slim_core.model.units import Unit
from slim_core.recipe import NameFilter

__all__ = ["Structure", "discover", "kind_of"]

_SHARED = "other layers have the same weights"
_ALONE = "the model's adapter says to leave it alone"
_FLOAT = "it stays FLOAT, and only the input of a quantized linear can be scaled while the model runs"
_NOT_READ = "engines take {} from the float model, so nothing can be folded here"


@dataclass(frozen=True)
class Structure:
    """What was found, by unit.

    Args:
        keys: where scales can move from keys to queries; empty unless it was asked for.
        folds_floats: whether scales may be folded into tensors that stay in floating point.
    """

    findings: Mapping[str, Findings]
    keys: Mapping[str, KeyFindings] = field(default_factory=dict[str, KeyFindings])
    folds_floats: bool = True

    def subgraphs(self) -> list[Subgraph]:
        """All of them, in the order of the units."""
        return [graph for found in self.findings.values() for graph in found.every]

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
            bare = {g.name: why for g in found.inputs if (why := obstacle(*g.targets))}
            inputs = [one for one in found.inputs if one.name not in bare]
            findings[unit.name] = Findings(kept, found.refused | bare | left, inputs)
            others = [one for one in places.found if one.attention not in odd]
            keys[unit.name] = KeyFindings(others, places.refused | odd)
        return Structure(findings, keys)

    def settled(self, quantized: Collection[str], *, reads_floats: bool) -> Structure:
        """The same once it is known which linears are quantized.

        What can be folded is not scaled while the model runs, and neither is the input of a linear that stays FLOAT.

        Args:
            reads_floats: whether engines read from what is written all that is not quantized. If they have it from the
                float model, nothing can be folded into it.
        """
        findings, keys, quantized = dict(self.findings), dict(self.keys), set(quantized)
        for name, found in self.findings.items():

            def lost(*modules: str) -> str | None:
                one = None if reads_floats else next((module for module in modules if module not in quantized), None)
                return None if one is None else _NOT_READ.format(one)

            left = {g.source: why for g in found.subgraphs if (why := lost(g.source, *g.targets))}
            kept = [one for one in found.subgraphs if one.source not in left]
            folded = {target for graph in kept for target in graph.targets}
            inputs, floats = list[Subgraph](), dict[str, str]()
            for graph in found.inputs:
                floats |= {target: _FLOAT for target in graph.targets if target not in quantized | folded}
                if rest := tuple(target for target in graph.targets if target in quantized and target not in folded):
                    inputs.append(replace(graph, targets=rest))
            scaled = {target for graph in inputs for target in graph.targets}
            for graph in found.subgraphs:  # nothing is lost where the input is scaled another way
                if (wanted := quantized.intersection(graph.targets)) and wanted <= scaled:
                    left.pop(graph.source, None)
            findings[name] = Findings(kept, found.refused | floats | left, inputs)
            places = self.keys.get(name, KeyFindings())
            odd = {k.attention: why for k in places.found if (why := lost(k.key.module, k.query.module))}
            others = [one for one in places.found if one.attention not in odd]
            keys[name] = KeyFindings(others, places.refused | odd)
        return Structure(findings, keys, reads_floats)


def discover(
    model: StreamedModel,
    example: Mapping[str, Any],
    *,
    query_keys: bool = False,
    inputs: bool = False,
    outside: StreamedModel | None = None,
    by_expert: bool = False,
) -> Structure:
    """Find and prove the subgraphs of every block.

    Args:
        example: keyword arguments of the model for one short sample.
        query_keys: also find where scales can move from keys to queries.
        inputs: also find the linears whose shared input may be scaled while the model runs.
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
                    known[kind] = unit.name, *_probe(model, unit, forward, query_keys, inputs, by_expert)
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
    model: StreamedModel, unit: Unit, forward: SuspendedForward, query_keys: bool, inputs: bool, by_expert: bool
) -> tuple[Findings, KeyFindings, Any]:
    """The findings of the block that the sample is suspended at, and what the block makes of the sample."""
    call = forward.call(0)
    with loaded(model, unit, torch.device("cpu"), by_expert=by_expert) as on_call:

        def run() -> Tensor:
            return _hidden(forward.compute(call))

        findings = BlockProbe(model.module, unit.name, run, model.subgraphs, on_call).findings()
        _refuse_shared(unit, findings)
        if inputs and model.scaled_inputs != ():
            linears = [info.name for info in unit.linears]
            findings.inputs, why = find_shared_inputs(model.module, unit.name, run, linears, model.scaled_inputs)
            findings.refused = why | findings.refused
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
    """The hidden states that a block makes; of one with several streams, such as text and image, all of them."""
    if isinstance(output, Tensor):
        return output
    tensors = [part for part in output if isinstance(part, Tensor)]
    first = tensors[0]
    streams = [part for part in tensors if part.dim() == first.dim() and part.shape[-1] == first.shape[-1]]
    return first if len(streams) == 1 else torch.cat([part.reshape(-1, part.shape[-1]) for part in streams])


def _renamed(found: Findings, first: str, name: str) -> Findings:
    """The findings of one block said of another of its kind."""

    def moved(module: str) -> str:
        return name + module.removeprefix(first)

    def placed(graph: Subgraph) -> Subgraph:
        source = moved(graph.source) if graph.source else ""
        return replace(graph, source=source, targets=tuple(map(moved, graph.targets)))

    refused = {moved(source): reason.replace(f"{first}.", f"{name}.") for source, reason in found.refused.items()}
    return Findings(list(map(placed, found.subgraphs)), refused, list(map(placed, found.inputs)))


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
