"""Drafting layers (multi-token prediction): decoder layers behind the last one, which the model class does not run.

They are known by the names that DeepSeek-V3 (arXiv 2412.19437) gave them and others took over. Such a layer joins the
normalised embedding of the next token and the normalised hidden state of the model in ``eh_proj``, runs a block of the
kind of the last one, and has a norm and a head of its own.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from slim_core.model.subgraphs import Subgraph
from slim_core.model.units import StreamedModel
from slim_core.rotation.matrices import Concatenated, Rotation
from slim_core.rotation.steps import Steps

__all__ = ["Draft", "find_drafts"]

_EMBEDDING, _HEAD, _HEAD_NORM = "embed_tokens", "shared_head.head", "shared_head.norm"
_JOINED, _JOINT = ("enorm", "hnorm"), "eh_proj"
_PARTS = {f"{part}.weight" for part in (_EMBEDDING, _HEAD, _HEAD_NORM, *_JOINED, _JOINT)}


@dataclass(frozen=True)
class Draft:
    """A drafting layer.

    Args:
        name: prefix of its tensors.
        block: the block of the model whose kind it is of.
        tensors: all of its tensors.
    """

    name: str
    block: str
    tensors: tuple[str, ...]

    def add_to(self, steps: Steps, rotation: Rotation) -> None:
        """Rotate the stream in what it has besides a block."""
        width = rotation.size
        steps.right(f"{self.name}.{_EMBEDDING}", rotation)
        joint = f"{self.name}.{_JOINT}"
        steps.joined_norms(tuple(f"{self.name}.{norm}" for norm in _JOINED), joint)
        steps.right(joint, Concatenated((rotation, rotation)))
        steps.left(joint, rotation)
        head = f"{self.name}.{_HEAD}"
        steps.norm(Subgraph("norm-linear", f"{self.name}.{_HEAD_NORM}", (head,), torch.arange(width)))
        steps.right(head, rotation)


def find_drafts(model: StreamedModel, names: Collection[str]) -> list[Draft]:
    """The drafting layers among tensors that the model class does not use; those that are not understood are left out.

    Args:
        names: of the tensors.
    """
    blocks = [unit for unit in model.units if unit.block is not None]
    last = blocks[-1]
    inside = f"{last.name}."
    if any(name != stored or not name.startswith(inside) for name, stored in last.parameters.items()):
        return []
    wanted = {name.removeprefix(inside) for name in last.parameters} | _PARTS
    found: list[Draft] = []
    number = len(blocks)
    while own := [name for name in names if name.startswith(f"{model.blocks_name}.{number}.")]:
        prefix = f"{model.blocks_name}.{number}"
        same = {name.removeprefix(f"{prefix}.") for name in own} == wanted
        if same and all(_alike(model, name, inside + name.removeprefix(f"{prefix}.")) for name in own):
            found.append(Draft(prefix, last.name, tuple(own)))
        number += 1
    return found


def _alike(model: StreamedModel, name: str, other: str) -> bool:
    """Whether a tensor has the shape of that of the last block, if that has one."""
    return other not in model.source or model.source.meta(name).shape == model.source.meta(other).shape
