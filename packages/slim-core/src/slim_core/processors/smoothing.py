"""What the smoothing processors share: which subgraphs are theirs, and how a scale is carried out and made known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator

from slim_core.errors import UnsupportedError
from slim_core.logging import get_logger
from slim_core.model.inputs import mul_scale_of
from slim_core.model.streamed import StreamedModel
from slim_core.model.structure import Structure
from slim_core.model.subgraphs import NON_FUSION, SUBGRAPH_TYPES, Subgraph
from slim_core.model.units import Addition, LinearInfo
from slim_core.processors.base import Assignment, AttentionState, Processor, UnitWork
from slim_core.quantization.statistics import InputStatistics, Need
from slim_core.recipe import Exclude, Include, NameFilter, Phase, ProcessorConfig
from slim_core.smoothing.scales import Smoothing, SmoothingNote, edits_of, note_of

__all__ = ["Smoother", "SmootherConfig", "SubgraphConfig", "is_routed", "some_reasons"]

_logger = get_logger(__name__)
SubgraphType = Literal["norm-linear", "linear-linear", "ov", "up-down"]


class SmootherConfig(ProcessorConfig):
    """Which subgraphs are smoothed.

    Patterns name their *source*: the norm, ``v_proj``, ``up_proj``; where there is none, the first of the linears that
    read the input.
    """

    phase = Phase.SMOOTHING
    kinds: ClassVar[tuple[str, ...]] = SUBGRAPH_TYPES
    """The types of subgraphs that can be smoothed. A model without any of them is refused."""

    include: Include = Field(default=(), description="Patterns of sources to smooth; empty means all")
    exclude: Exclude = Field(default=(), description="Patterns of sources to leave alone; wins over include")

    @property
    def types(self) -> tuple[str, ...]:
        """The types of subgraphs that are smoothed."""
        return self.kinds

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return () if value is None else value


class SubgraphConfig(SmootherConfig):
    """A smoother that knows all types of subgraphs."""

    enable_subgraph_type: tuple[SubgraphType, ...] = Field(
        default=SUBGRAPH_TYPES, description="Types of subgraphs to smooth. Default: all"
    )

    @property
    def types(self) -> tuple[str, ...]:
        return self.enable_subgraph_type


class Smoother(Processor, ABC):
    """Base of the smoothing processors: a subclass chooses the scale of a subgraph."""

    config: Any
    needs: ClassVar[frozenset[Need]] = frozenset({Need.CHANNELS})
    """What must be known of the inputs of the targets."""

    def __init__(self, config: Any, position: str) -> None:
        super().__init__(config, position)
        self._graphs: dict[str, list[Subgraph]] = {}
        self._notes: list[str] = []
        self._shifted: set[str] = set()
        self._latent: set[str] = set()
        self._model_dtype: torch.dtype | None = None
        self._folds_floats = True

    @property
    def shifts(self) -> bool:
        """Whether it also centres the inputs of linears behind a norm."""
        return False

    @property
    def reshapes(self) -> bool:
        return True

    @property
    def changes_floats(self) -> bool:
        return self._folds_floats and any(graph.source for graphs in self._graphs.values() for graph in graphs)

    @property
    def uses_structure(self) -> bool:
        return True

    def adopt(self, structure: Structure, model: StreamedModel) -> None:
        chosen = NameFilter(self.config.include, self.config.exclude)
        kinds, types = self.config.kinds, self.config.types

        def names(source: str) -> tuple[str, ...]:
            if (info := self._linears.get(source)) is not None:
                return source, info.prefix, *info.also_called
            other = () if model.other_name is None else (model.other_name(source),)
            return source, model.tensor_name(f"{source}.weight").removesuffix(".weight"), *other

        self._linears = {info.name: info for unit in model.units for info in unit.linears}
        self._model_dtype = model.dtype
        self._folds_floats = structure.folds_floats
        self._parameters = {name for unit in model.units for name in unit.parameters}
        self._latent = {info.name for unit in model.units for info in unit.attentions if info.latent}
        # Nothing is observed of what only routers and the like read.
        known = {
            unit: [g for g in found.every if not self._linears.keys().isdisjoint(g.targets)]
            for unit, found in structure.findings.items()
        }
        self._graphs = {
            unit: [g for g in graphs if g.type in types and chosen.matches(*names(g.name))]
            for unit, graphs in known.items()
        }
        every = [graph for graphs in known.values() for graph in graphs]
        self._note(structure, chosen, names, [graph.name for graph in every if graph.type in types])
        if not any(graph.type in kinds for graph in every):
            only = "" if kinds == SUBGRAPH_TYPES else f" of type {', '.join(kinds)}"
            refused = structure.refused()
            raise UnsupportedError(
                f"no subgraph{only} of this model can be smoothed"
                + (f": {some_reasons(refused)}" if refused else ", because none was found"),
                where=f"spec.{self.position}",
                remedy="leave this processor out",
            )
        self._widths = {g.source: len(g.columns) for graphs in self._graphs.values() for g in graphs}
        stored = {name: tensor for unit in model.units for name, tensor in unit.parameters.items()}
        self._scaled = [
            Addition(mul_scale_of(target), model.source.meta(stored[f"{target}.weight"]).dtype, (len(graph.columns),))
            for graphs in self._graphs.values()
            for graph in graphs
            for target in (() if graph.source else graph.targets)
        ]
        if self.shifts:
            self._choose_shifts(model)

    def _note(
        self,
        structure: Structure,
        chosen: NameFilter,
        names: Callable[[str], tuple[str, ...]],
        sources: Sequence[str],
    ) -> None:
        # A pattern that names what cannot be smoothed is no mistake.
        known = [name for source in (*sources, *structure.refused()) for name in names(source)]
        for side, pattern in chosen.unmatched(known):
            self._notes.append(
                f"spec.{self.position}.{side}: pattern {pattern!r} matches no source of a subgraph; sources are norms, "
                "v_proj and up_proj" + (", e.g. " if sources else "") + ", ".join(sources[:3])
            )
        refused = {s: reason for s, reason in structure.refused().items() if chosen.matches(*names(s))}
        if refused:
            self._notes.append(f"spec.{self.position} cannot smooth {len(refused)} places: {some_reasons(refused)}")
        if not any(self._graphs.values()):
            self._notes.append(f"spec.{self.position} smooths nothing")

    def _choose_shifts(self, model: StreamedModel) -> None:
        """The norms that are shifted: those whose readers are given their output as it is, and can all take a bias.

        Routers cannot; nor can the expansion of a latent, which engines take apart without it. A norm that gives
        nothing but zeros has nothing to shift; that is found here, since biases are laid out before anything is run.
        """
        left: dict[str, str] = {}
        changed: list[str] = []
        if scaled := [graph.name for graphs in self._graphs.values() for graph in graphs if not graph.source]:
            self._notes.append(
                f"spec.{self.position}: {len(scaled)} inputs are scaled but not shifted, because there is no norm "
                f"whose bias could take the shift, e.g. that of {scaled[0]}"
            )
        stored = {name: tensor for unit in model.units for name, tensor in unit.parameters.items()}
        norms = [g for graphs in self._graphs.values() for g in graphs if g.type == "norm-linear" and g.source]
        for graph in norms:
            odd = next((one for one in graph.targets if one not in self._linears or self._latent_of(one)), None)
            if _is_silent(graph, model, stored):
                continue
            if odd is not None:
                left[graph.source] = odd
            elif not graph.direct:
                changed.append(graph.source)
            else:
                self._shifted.add(graph.source)
        if left:
            source, reader = next(iter(left.items()))
            self._notes.append(
                f"spec.{self.position}: {len(left)} norms are not shifted, because something that reads them has no "
                f"place for a bias, e.g. {reader} behind {source}"
            )
        if changed:
            self._notes.append(
                f"spec.{self.position}: {len(changed)} norms are not shifted, because their output is gated before "
                f"anything reads it, e.g. {changed[0]}"
            )

    def _latent_of(self, linear: str) -> str | None:
        """The attention that caches the input of this linear as its keys and values."""
        attention, _, leaf = linear.rpartition(".")
        return attention if leaf == "kv_b_proj" and attention in self._latent else None

    def summary(self) -> str:
        counts = Counter(graph.label for graphs in self._graphs.values() for graph in graphs)
        parts = [f"{counts[name]} {name}" for name in (*SUBGRAPH_TYPES, NON_FUSION) if counts[name]]
        shifted = f", {len(self._shifted)} norms shifted" if self._shifted else ""
        return f"{self.config.type}: {', '.join(parts)} smoothed{shifted}" if parts else ""

    def notes(self) -> list[str]:
        return [*self._notes, *(f"{self.position}: {text}" for text in self.config.warnings())]

    def requests(
        self, linears: Sequence[LinearInfo], assignments: Mapping[str, Assignment]
    ) -> Mapping[str, frozenset[Need]]:
        return {name: self.needs for name in self.rescales() if name in self._linears}

    def rescales(self) -> Collection[str]:
        return {target for graphs in self._graphs.values() for graph in graphs for target in graph.targets}

    def changes_states(self) -> Collection[AttentionState]:
        every = [graph for graphs in self._graphs.values() for graph in graphs]
        owners = {graph.source.rpartition(".")[0] for graph in every if graph.type == "ov"} - self._latent
        changes = {AttentionState(attention, "value") for attention in owners}
        folded = [target for graph in every if graph.source for target in graph.targets]
        for attention in {self._latent_of(target) for target in folded} - {None}:
            assert attention is not None
            changes |= {AttentionState(attention, state) for state in ("query", "key", "value")}
        return changes

    def additions(self) -> list[Addition]:
        wanted = [
            Addition(f"{source}.bias", torch.float32, (self._widths[source],)) for source in sorted(self._shifted)
        ]
        for graphs in self._graphs.values():
            for graph in graphs:
                if graph.source in self._shifted:
                    wanted += [
                        Addition(f"{target}.bias", torch.float32, (self._linears[target].out_features,))
                        for target in graph.targets
                    ]
        return [addition for addition in (*wanted, *self._scaled) if addition.parameter not in self._parameters]

    def working_bytes(self, linears: Sequence[LinearInfo], assignments: Mapping[str, Assignment]) -> int:
        return self.copied_bytes(linears)

    def copied_bytes(self, linears: Sequence[LinearInfo]) -> int:
        graphs = [graph for graphs in self._graphs.values() for graph in graphs]
        changed = {name for graph in graphs for name in (graph.source, *graph.targets)}
        itemsize = (self._model_dtype or torch.float32).itemsize
        return itemsize * sum(info.in_features * info.out_features for info in linears if info.name in changed)

    @property
    def takes_long(self) -> bool:
        """Whether choosing scales is worth dividing over ranks."""
        return False

    def process(self, work: UnitWork) -> None:
        skipped: dict[str, list[str]] = {}
        graphs = self._graphs.get(work.name, ())
        notes: dict[int, SmoothingNote] = {}
        for wave in _waves(graphs) if self.takes_long else [[i] for i in range(len(graphs))]:
            seen = {i: seen_by(graphs[i], work) for i in wave}
            for i in wave:
                graph = graphs[i]
                if (reason := _nothing_in(seen[i])) is not None:
                    skipped.setdefault(reason, []).append(graph.name)
                    notes[i] = SmoothingNote(self.position, graph.label, graph.name, graph.targets, 0, skipped=reason)
            left = [i for i in wave if i not in notes]
            for i, smoothing in zip(left, self._chosen([graphs[i] for i in left], seen, left, work), strict=True):
                done = carry_out(smoothing, work) if smoothing.changes else smoothing
                notes[i] = note_of(done, seen[i].channels, self.position)
        for i in sorted(notes):
            work.note(notes[i])
        for reason, sources in skipped.items():
            _logger.warning("%s: these are not smoothed, because %s: %s", work.name, reason, ", ".join(sources))

    def _chosen(
        self, graphs: Sequence[Subgraph], seen: Mapping[int, InputStatistics], places: Sequence[int], work: UnitWork
    ) -> list[Smoothing]:
        """The scales of subgraphs that have nothing in common."""
        if not self.takes_long:
            return [self.choose(graph, seen[i], work) for i, graph in zip(places, graphs, strict=True)]
        jobs = [partial(self.choose, graph, seen[i], work) for i, graph in zip(places, graphs, strict=True)]
        sizes = [sum(work.weights[f"{t}.weight"].meta.numel for t in graph.targets) for graph in graphs if work.weights]
        # What comes from another rank speaks of its own copy of the subgraph.
        return [replace(s, graph=graph) for s, graph in zip(work.divided(sizes, jobs), graphs, strict=True)]

    @abstractmethod
    def choose(self, graph: Subgraph, seen: InputStatistics, work: UnitWork) -> Smoothing:
        """The scale (and shift) of a subgraph.

        Args:
            seen: statistics of the input of its targets.
        """

    def is_shifted(self, graph: Subgraph) -> bool:
        """Whether the inputs of this subgraph are centred."""
        return graph.source in self._shifted


def _waves(graphs: Sequence[Subgraph]) -> list[list[int]]:
    """Subgraphs in an order that leaves every two with a module in common as they are; those of a wave have none."""
    waves: list[list[int]] = []
    last: dict[str, int] = {}  # by module, the last wave that changes it
    for i, graph in enumerate(graphs):
        modules = [name for name in (graph.source, *graph.targets) if name]
        wave = 1 + max((last.get(name, -1) for name in modules), default=-1)
        if wave == len(waves):
            waves.append([])
        waves[wave].append(i)
        last.update(dict.fromkeys(modules, wave))
    return waves


def _is_silent(norm: Subgraph, model: StreamedModel, stored: Mapping[str, str]) -> bool:
    """Whether a norm multiplies all channels by zero and adds nothing.

    Args:
        stored: the tensors of parameters.
    """
    gain = model.source.load(stored[f"{norm.source}.weight"]).float() + float(norm.plus_one)
    bias = stored.get(f"{norm.source}.bias")
    return not bool(gain.any()) and (bias is None or not bool(model.source.load(bias).any()))


def is_routed(module: str, unit: str) -> bool:
    """Whether a module of a unit is one of several alike, as experts are, and may see only some of the tokens."""
    return any(part.isdigit() for part in module.removeprefix(f"{unit}.").split("."))


def seen_by(graph: Subgraph, work: UnitWork) -> InputStatistics:
    """What was observed of the input of a subgraph's targets.

    Where only experts read it, each has seen the tokens that were routed to it; together they have seen all.
    """
    whole = [work.seen(target) for target in graph.targets if not is_routed(target, work.name)]
    whole = sorted((seen for seen in whole if seen.tokens), key=lambda seen: (seen.tokens, seen.kept.seen))
    if whole:
        return whole[-1]
    parts = {id(seen): seen for target in graph.targets if (seen := work.seen(target)).tokens}
    if len(parts) == 1:
        return next(iter(parts.values()))
    pooled = InputStatistics()
    for part in parts.values():
        pooled.range.merge(part.range)
        pooled.channels.merge(part.channels)
        pooled.kept.merge(part.kept)
    return pooled


def _nothing_in(seen: InputStatistics) -> str | None:
    """Why there is nothing to be learnt from what was observed."""
    if not seen.tokens:
        return "no token reached their readers"
    largest = seen.channels.absmax()
    return "only zeros reached their readers" if largest is not None and not bool(largest.any()) else None


def carry_out(smoothing: Smoothing, work: UnitWork) -> Smoothing:
    """Change the weights of a subgraph, all of them or none, and what is known of the inputs behind it.

    Returns:
        The smoothing as it came out.
    """
    assert work.weights is not None
    done, edits = edits_of(smoothing, work.weights)
    work.weights.apply(edits)
    work.rescale(done.graph.targets, done.columns, done.shift)
    if done.graph.type == "ov":
        work.rescale_states(done.graph.source.rpartition(".")[0], "value", 1 / done.scale)
    return done


def some_reasons(reasons: Mapping[str, str]) -> str:
    """The first few of what is refused, by name, with the reasons."""
    listed = [f"{name}: {reason}" for name, reason in list(reasons.items())[:3]]
    return "; ".join(listed) + ("; ..." if len(reasons) > len(listed) else "")
