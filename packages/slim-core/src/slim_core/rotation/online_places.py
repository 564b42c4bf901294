"""Where a model can have rotations at run time: before the output projections of attentions, and before down
projections."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from slim_core.errors import UnsupportedError
from slim_core.model.residual import BlockRoles
from slim_core.model.streamed import StreamedModel
from slim_core.model.structure import Structure
from slim_core.model.units import Unit
from slim_core.rotation.matrices import Kronecker
from slim_core.rotation.online import down_rotation, heads_rotation, shard_refusal
from slim_core.rotation.steps import head_columns

__all__ = ["OnlineChoice", "OnlinePlaces"]


@dataclass(frozen=True)
class OnlineChoice:
    """What is wanted.

    Args:
        max_tp_size: size of the blocks that a rank of a tensor-parallel engine must hold whole.
        down_layers: blocks whose down projection is rotated too.
    """

    max_tp_size: int
    down_layers: tuple[int, ...] = ()


class OnlinePlaces:
    """The linears of a model whose inputs are rotated at run time.

    Args:
        where: what asks for it, for errors.
    """

    def __init__(self, choice: OnlineChoice, structure: Structure, model: StreamedModel, where: str) -> None:
        self._choice = choice
        self._structure = structure
        self._widths = {info.name: info.in_features for unit in model.units for info in unit.linears}
        self._where = where

    def of(self, unit: Unit, roles: BlockRoles, *, trial: bool = False) -> dict[str, Kronecker]:
        """The rotations of a block by linear.

        Args:
            trial: also rotate the down projection of a block that was not chosen, if it can be.

        Raises:
            UnsupportedError: ranks of an engine could not rotate their shares by themselves, or a block that was chosen
                has no single down projection.
        """
        found: dict[str, Kronecker] = {}
        for graph in roles.values:
            if head_columns(graph):
                heads = len(graph.columns) // graph.head_dim
                self._check("heads", heads)
                found[graph.targets[0]] = heads_rotation(heads, graph.head_dim, self._choice.max_tp_size)
        chosen = unit.block in self._choice.down_layers
        downs = self._downs(unit)
        if chosen and len(downs) != 1:
            raise UnsupportedError(
                f"it has {len(downs) or 'no'} down projections that could be rotated; one is needed",
                where=unit.name,
                remedy="leave it out of down_proj_online_layers",
            )
        if chosen:
            found |= self._down(downs[0])
        elif trial and self._choice.down_layers and len(downs) == 1:
            with suppress(UnsupportedError):
                found |= self._down(downs[0])
        return found

    def _downs(self, unit: Unit) -> list[str]:
        graphs = self._structure.findings[unit.name].subgraphs
        return [target for graph in graphs if graph.type == "up-down" for target in graph.targets]

    def _down(self, linear: str) -> dict[str, Kronecker]:
        try:
            rotation = down_rotation(self._widths[linear], self._choice.max_tp_size)
        except UnsupportedError as error:
            raise UnsupportedError(error.what, where=linear, remedy="leave out down_proj_online_layers") from error
        self._check("rows of its rotation", rotation.outer.size)
        return {linear: rotation}

    def _check(self, what: str, count: int) -> None:
        if refusal := shard_refusal(what, count, self._choice.max_tp_size):
            raise UnsupportedError(refusal[0], where=f"{self._where}.max_tp_size", remedy=refusal[1])
