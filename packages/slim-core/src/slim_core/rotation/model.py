"""A model whose residual stream is rotated, together with the value heads and low ranks of its attentions.

What reads and writes where is found in the model itself, and nothing is believed: one block of every kind is run in
float32, with its weights as they are and as they would be, on hidden states and on the same rotated; so is what comes
before and after the blocks. A model that does not compute the same is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from slim_core.checkpoint.added import AddedTensors
from slim_core.checkpoint.source import LazyTensor, TensorSource
from slim_core.errors import UnsupportedError
from slim_core.model.passage import Passage, pass_through
from slim_core.model.residual import BlockRoles, BlockTrial, find_roles
from slim_core.model.streamed import StreamedModel
from slim_core.model.structure import Structure
from slim_core.model.units import Unit
from slim_core.rotation.drafts import known_drafts
from slim_core.rotation.ends import Ends, find_ends
from slim_core.rotation.inputs import InputRotation, InputRotations, install
from slim_core.rotation.matrices import Kronecker, Rotation, create_rotation
from slim_core.rotation.online_places import OnlineChoice, OnlinePlaces
from slim_core.rotation.proof import TOLERANCE, BlockWitness, relative_error
from slim_core.rotation.source import TransformedSource
from slim_core.rotation.steps import Steps
from slim_core.rotation.towers import find_tower_writers

__all__ = ["RotatedModel", "rotate_model"]

_ADVICE = "leave the rotation out of the recipe"


@dataclass(frozen=True, eq=False)
class RotatedModel:
    """The outcome of :func:`rotate_model`.

    Args:
        model: the rotated view of the model. Where inputs are rotated at run time, its modules do so.
        stream: the rotation of the residual stream.
        readers: the linears that are given the residual stream, and for each the first that is given the same.
        online: the rotations that are left to run time, by module name.
        prefixes: the names that the checkpoint has for those modules.
        summary: what is rotated, for people.
        notes: what was not rotated, and why.
        drafts: drafting layers, which were rotated too.
        last_gain: gives what the norm after the last block multiplied with before it was moved into the head.
        source_with: the tensors of the model for another rotation of the stream.
    """

    model: StreamedModel
    stream: Rotation
    readers: Mapping[str, str]
    online: InputRotations
    prefixes: Mapping[str, str]
    summary: str
    notes: tuple[str, ...]
    drafts: tuple[str, ...]
    last_gain: Callable[[], Tensor]
    source_with: Callable[[Rotation], TensorSource]


def rotate_model(
    model: StreamedModel,
    structure: Structure,
    example: Mapping[str, Any],
    *,
    block_size: int = -1,
    online: OnlineChoice | None = None,
    where: str = "quarot",
) -> RotatedModel:
    """Rotate a model by randomised Hadamard matrices, once it is proved that it computes the same.

    Args:
        structure: the proved subgraphs of its blocks.
        example: keyword arguments of the model for one short sample.
        block_size: of the blocks on the diagonals of the rotations; -1 for a single one.
        online: the rotations that are left to run time; None for none.
        where: what asks for it, for errors.

    Raises:
        UnsupportedError: the model cannot be rotated; says what stands in the way.
        InvalidModelError: it does not run its blocks once each, in order.
    """
    try:
        return _Rotator(model, structure, block_size, online, where).run(example)
    except UnsupportedError as error:
        if error.remedy:
            raise
        raise UnsupportedError(error.what, where=error.where, remedy=_ADVICE) from error


class _Rotator:
    def __init__(
        self, model: StreamedModel, structure: Structure, block_size: int, online: OnlineChoice | None, where: str
    ) -> None:
        self._model = model
        self._structure = structure
        self._block_size = block_size
        self._where = where
        self._places = None if online is None else OnlinePlaces(online, structure, model, where)
        self._drafts = known_drafts(model)
        self._stored = {name: stored for unit in model.units for name, stored in unit.parameters.items()}
        self._stored |= {name: name for draft in self._drafts for name in draft.tensors}
        self._proved: dict[str, BlockRoles] = {}
        self._notes: list[str] = []

    def run(self, example: Mapping[str, Any]) -> RotatedModel:
        model = self._model
        passage = pass_through(model, example, visit=self._visit)
        width = passage.first.shape[-1]
        ends = find_ends(model, passage)
        ends = replace(ends, towers=find_tower_writers(model, passage, ends.linears))
        self._refuse_strangers(width)
        stream = self._rotation(width, "the hidden states")
        blocks = [unit for unit in model.units if unit.block is not None]
        firsts = {unit.name: passage.kinds[unit.name] for unit in blocks}
        roles = {name: self._proved[first].of(first, name) for name, first in firsts.items()}
        places = self._places
        online = {unit.name: {} if places is None else places.of(unit, roles[unit.name]) for unit in blocks}
        turned = {name: InputRotation.of(one) for found in online.values() for name, one in found.items()}
        prefixes = {name: model.tensor_name(f"{name}.weight").removesuffix(".weight") for name in turned}
        beside = {key: tensor for name, one in turned.items() for key, tensor in one.tensors(prefixes[name]).items()}

        def source_with(rotation: Rotation) -> TensorSource:
            steps = self._steps()
            for unit in blocks:
                self._take(steps, roles[unit.name], rotation, online[unit.name])
            ends.add_to(steps, rotation)
            for draft in self._drafts:
                own = self._proved[passage.kinds[draft.block]].of(passage.kinds[draft.block], draft.name)
                draft.add_to(steps, rotation)
                self._take(steps, own, rotation, {})
            source = TransformedSource(model.source, steps.chains(model.tensor_name))
            return AddedTensors(source, beside) if beside else source

        rotated = replace(model, source=source_with(stream), config=_untied(model, ends))
        _prove_ends(rotated, example, passage, stream)
        install(model.module, turned)
        readers = {reader: leader for one in roles.values() for reader, leader in one.leaders().items()}
        summary = _summary(width, list(roles.values()), len(turned))
        drafts = tuple(draft.name for draft in self._drafts)
        self._notes += [f"{name}, a drafting layer, is rotated by its names; it cannot be run" for name in drafts]

        def last_gain() -> Tensor:
            if not ends.norms:
                return torch.ones(width)
            (norm, *_) = ends.norms
            return model.source.load(self._stored[f"{norm.source}.weight"]).float() + norm.plus_one

        return RotatedModel(
            *(rotated, stream, readers, turned, prefixes, summary),
            *(tuple(self._notes), drafts, last_gain, source_with),
        )

    def _rotation(self, size: int, what: str) -> Rotation:
        if self._block_size > 0 and size % self._block_size:
            raise UnsupportedError(
                f"block_size {self._block_size} does not divide the {size} channels of {what}",
                where=self._where,
                remedy="use -1, or a power of two that divides them",
            )
        try:
            return create_rotation(size, self._block_size)
        except UnsupportedError as error:
            raise UnsupportedError(f"{what}: {error.what}", where=self._where, remedy=error.remedy) from error

    def _visit(self, unit: Unit, trial: BlockTrial) -> None:
        """Find and prove what is rotated in a block, and that it computes the same afterwards."""
        found = find_roles(trial, self._structure.findings[unit.name])
        witness = BlockWitness(trial, found)
        stream = self._rotation(trial.width, "the hidden states")
        roles = self._without_doubtful(unit, found, witness)
        wanted: list[dict[str, Kronecker]] = [{}]
        if self._places is not None:
            wanted.append(self._places.of(unit, roles, trial=True))
        for online in wanted:
            steps = self._steps()
            self._take(steps, roles, stream, online)
            turned = {name: InputRotation.of(one) for name, one in online.items()}
            objection = witness.objection(self._values(unit, steps), stream, turned)
            if objection is not None:
                raise UnsupportedError(
                    f"with rotated weights the block would compute something else: {objection}",
                    where=unit.name,
                    remedy=_ADVICE,
                )
        self._proved[unit.name] = roles

    def _without_doubtful(self, unit: Unit, roles: BlockRoles, witness: BlockWitness) -> BlockRoles:
        """The roles less the value paths and low ranks that do not allow a rotation; each is tried by itself."""

        def holds(source: str, size: int, take: Callable[[Steps, Rotation], None]) -> bool:
            if self._block_size > 0:
                self._rotation(size, f"a head of {source}")
            try:
                steps = self._steps()
                take(steps, self._rotation(size, source))
                objection = witness.objection(self._values(unit, steps))
            except UnsupportedError as error:
                objection = error.what
            if objection is not None:
                self._notes.append(f"{source} and what reads it are not rotated against each other: {objection}")
            return objection is None

        values = [g for g in roles.values if holds(g.source, g.head_dim, lambda steps, r, g=g: steps.value(g, r))]
        ranks = [k for k in roles.ranks if holds(k.norm.source, k.norm.scales, lambda steps, r, k=k: steps.rank(k, r))]
        return replace(roles, values=tuple(values), ranks=tuple(ranks))

    def _steps(self) -> Steps:
        return Steps(self._stored, lambda parameter: self._model.source.meta(self._stored[parameter]).shape[0])

    def _take(self, steps: Steps, roles: BlockRoles, stream: Rotation, online: Mapping[str, Kronecker]) -> None:
        """The steps of one block."""
        steps.stream(roles, stream)
        for graph in roles.values:
            steps.value(graph, self._rotation(graph.head_dim, graph.source))
        for rank in roles.ranks:
            steps.rank(rank, self._rotation(rank.norm.scales, rank.norm.source))
        for linear, rotation in online.items():
            steps.right(linear, rotation)

    def _values(self, unit: Unit, steps: Steps) -> dict[str, LazyTensor]:
        """The parameters of a block once these steps are taken."""
        model = self._model
        chains = steps.chains(model.tensor_name)
        source = TransformedSource(model.source, chains)
        own = {name: model.tensor_name(name) for name in unit.parameters}
        seen = {name: own[name] if own[name] in chains else stored for name, stored in unit.parameters.items()}
        return {name: LazyTensor(source, source.meta(tensor)) for name, tensor in seen.items()}

    def _refuse_strangers(self, width: int) -> None:
        """Tensors that the model class leaves unused may read or write the stream somewhere else."""
        known = {name for draft in self._drafts for name in draft.tensors}
        unused = [unit for unit in self._model.units if unit.name == "extra" or unit.mirrors]
        for name in (name for unit in unused for name in unit.tensors):
            shape = self._model.source.meta(name).shape
            if name not in known and len(shape) > 1 and width in shape:
                raise UnsupportedError(
                    f"the model class does not use this tensor of shape {list(shape)}, so it is not known how to "
                    "rotate it",
                    where=name,
                    remedy=_ADVICE,
                )


def _summary(width: int, roles: list[BlockRoles], online: int) -> str:
    parts = [f"hidden states of {width} channels rotated"]
    for count, what in (
        (sum(len(one.values) for one in roles), "value paths"),
        (sum(len(one.ranks) for one in roles), "low ranks"),
        (online, "inputs at run time"),
    ):
        parts += [f"{count} {what}"] if count else []
    return ", ".join(parts)


def _prove_ends(rotated: StreamedModel, example: Mapping[str, Any], passage: Passage, stream: Rotation) -> None:
    """What comes before the blocks must give them rotated hidden states; what follows must make the same of them."""
    again = pass_through(rotated, example, known=passage, last=stream.right)
    where = type(rotated.module).__name__
    if not (error := relative_error(again.first, stream.right(passage.first))) <= TOLERANCE:
        raise UnsupportedError(
            "what it does between the embedding and the first block does not go with a rotation: hidden states are off "
            f"by {error:.1e} of their size",
            where=where,
            remedy=_ADVICE,
        )
    if not (error := relative_error(again.logits, passage.logits)) <= TOLERANCE:
        raise UnsupportedError(
            "what it does after the last block does not go with a rotation: logits are off by "
            f"{error:.1e} of their size",
            where=where,
            remedy=_ADVICE,
        )


def _untied(model: StreamedModel, ends: Ends) -> dict[str, Any]:
    """The configuration, which no longer says that head and embedding are the same."""
    config = deepcopy(model.config)
    parameters = [model.module.get_parameter(f"{name}.weight") for name in (*ends.embeddings, *ends.linears)]
    if len({id(parameter) for parameter in parameters}) < len(parameters):
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False
    return config
