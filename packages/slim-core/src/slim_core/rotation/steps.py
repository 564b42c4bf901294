"""What becomes of the tensors of a model when its residual stream, its value heads and its low ranks are rotated.

Everything that reads a rotated space takes the rotation from the right, everything that writes there its inverse from
the left, and the weights of the norms between them move into the readers (QuaRot, arXiv 2404.00456).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from slim_core.errors import UnsupportedError
from slim_core.model.residual import BlockRoles, Rank
from slim_core.model.subgraphs import Subgraph
from slim_core.rotation.chains import Chain, Fill, FoldNormBias, FuseNorm, RotateLeft, RotateRight, Step
from slim_core.rotation.matrices import Concatenated, Identity, Kronecker, Rotation, repeated_to

__all__ = ["Steps", "head_columns", "head_rows"]


@dataclass
class Steps:
    """Steps by parameter name.

    Args:
        stored: parameter name to the tensor that it is stored as; parameters that are not in it do not exist.
        rows: how many rows the weight of a parameter has.
    """

    stored: Mapping[str, str]
    rows: Callable[[str], int]
    taken: dict[str, list[Step]] = field(default_factory=dict[str, list[Step]])

    def _take(self, parameter: str, step: Step) -> None:
        if parameter in self.stored:
            self.taken.setdefault(parameter, []).append(step)

    def norm(self, graph: Subgraph) -> None:
        """Move the weight and bias of a norm into what reads it."""
        weight, bias = f"{graph.source}.weight", f"{graph.source}.bias"
        for reader in graph.targets:
            self._take(f"{reader}.weight", FuseNorm((self.stored[weight],), graph.plus_one))
            if bias in self.stored:
                if f"{reader}.bias" not in self.stored:
                    raise UnsupportedError(
                        f"it adds a bias, for which {reader} has no place once it is rotated", where=graph.source
                    )
                self._take(f"{reader}.bias", FoldNormBias(self.stored[f"{reader}.weight"], self.stored[bias]))
        self._take(weight, Fill(0.0 if graph.plus_one else 1.0))
        self._take(bias, Fill(0.0))

    def joined_norms(self, norms: tuple[str, ...], reader: str) -> None:
        """Move the weights of norms into a linear that reads their outputs side by side."""
        self._take(f"{reader}.weight", FuseNorm(tuple(self.stored[f"{norm}.weight"] for norm in norms)))
        for norm in norms:
            self._take(f"{norm}.weight", Fill(1.0))

    def right(self, linear: str, rotation: Rotation) -> None:
        """The input of a linear (or the output of an embedding) is rotated."""
        self._take(f"{linear}.weight", RotateRight(rotation))

    def left(self, linear: str, rotation: Rotation) -> None:
        """The output of a linear is rotated."""
        self._take(f"{linear}.weight", RotateLeft(rotation))
        self._take(f"{linear}.bias", RotateLeft(rotation))

    def stream(self, roles: BlockRoles, rotation: Rotation) -> None:
        """The residual stream that a block reads and writes is rotated."""
        for graph in roles.norms:
            self.norm(graph)
        for reader in sorted(roles.readers):
            self.right(reader, rotation)
        for writer in (writer for together in roles.writers for writer in together):
            self.left(writer, rotation)

    def value(self, graph: Subgraph, rotation: Rotation) -> None:
        """Every head of the value of an attention is rotated."""
        rows = head_rows(graph, rotation, self.rows(f"{graph.source}.weight"))
        if rows is None or not head_columns(graph):
            raise UnsupportedError("the value heads do not lie in a regular order", where=graph.source)
        self.left(graph.source, rows)
        for target in graph.targets:
            self.right(target, repeated_to(rotation, len(graph.columns)))

    def rank(self, rank: Rank, rotation: Rotation) -> None:
        """What passes a norm between two linears is rotated."""
        self.norm(rank.norm)
        after = self.rows(f"{rank.writer}.weight") - rank.first - rotation.size
        parts = (Identity(rank.first), rotation, Identity(after))
        self.left(rank.writer, _concatenated(parts))
        for reader in rank.norm.targets:
            self.right(reader, rotation)

    def chains(self, tensor_name: Callable[[str], str]) -> dict[str, Chain]:
        """The chains of all tensors. Parameters that share a tensor but differ in their steps get one each.

        Args:
            tensor_name: the name of a tensor that a parameter would have to itself.

        Raises:
            UnsupportedError: the checkpoint has no name for a tensor of its own.
        """
        owners: dict[str, list[str]] = {self.stored[parameter]: [] for parameter in self.taken}
        for parameter, stored in self.stored.items():
            if stored in owners:
                owners[stored].append(parameter)
        made: dict[str, Chain] = {}
        for stored, parameters in owners.items():
            forms = {parameter: tuple(self.taken.get(parameter, ())) for parameter in parameters}
            if len(set(forms.values())) == 1:
                made[stored] = Chain(forms[parameters[0]])
                continue
            for parameter, steps in forms.items():
                own = tensor_name(parameter)
                if own in made:
                    raise UnsupportedError(
                        f"shares its tensor {stored!r} with {', '.join(parameters)} and cannot be told apart from them",
                        where=parameter,
                    )
                made[own] = Chain(steps, stored)
        return made


def head_rows(graph: Subgraph, rotation: Rotation, out: int) -> Rotation | None:
    """The rotation of every head, in the rows of the matrix that makes the values; None if they lie irregularly.

    Args:
        graph: an ``ov`` subgraph with heads as large as the rotation.
        out: rows of the matrix.
    """
    size = rotation.size
    if graph.rows is None or len(graph.rows) % size:
        return None
    heads = graph.rows.reshape(-1, size)
    starts = heads[:, 0]
    if not torch.equal(heads, starts[:, None] + torch.arange(size)):
        return None
    period = int(starts[1] - starts[0]) if len(starts) > 1 else size
    if period < size or not torch.equal(starts, starts[0] + period * torch.arange(len(starts))):
        return None
    gap, begin = period - size, int(starts[0])
    leads = begin >= gap  # what lies between heads comes before each of them, or else after
    unit = (Identity(gap), rotation) if leads else (rotation, Identity(gap))
    before = begin - gap if leads else begin
    after = out - before - period * len(starts)
    if after < 0:
        return None
    repeated = Kronecker(Identity(len(starts)), _concatenated(unit))
    return _concatenated((Identity(before), repeated if len(starts) > 1 else repeated.inner, Identity(after)))


def head_columns(graph: Subgraph) -> bool:
    """Whether the input columns of the output projection are whole heads, one after the other."""
    if not graph.head_dim or len(graph.columns) % graph.head_dim:
        return False
    heads = graph.columns.reshape(-1, graph.head_dim)
    whole = torch.equal(heads, heads[:, :1] + torch.arange(graph.head_dim))
    return whole and not bool((heads[:, 0] % graph.head_dim).any())


def _concatenated(parts: tuple[Rotation, ...]) -> Rotation:
    present = tuple(part for part in parts if part.size)
    return present[0] if len(present) == 1 else Concatenated(present)
