"""How drafting layers are rotated (multi-token prediction): blocks that the model class does not run.

What they have besides a block is known by the names of DeepSeek-V3 (arXiv 2412.19437). Such a layer joins the
normalised embedding of the next token and the normalised hidden state of the model in ``eh_proj``, runs a block of the
kind of the last one, and has a norm and a head of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slim_core.model.streamed import StreamedModel
from slim_core.model.subgraphs import Subgraph
from slim_core.rotation.matrices import Concatenated, Rotation
from slim_core.rotation.steps import Steps

__all__ = ["Draft", "known_drafts"]

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


def known_drafts(model: StreamedModel) -> list[Draft]:
    """The drafting layers of a model whose every tensor is understood."""
    parameters = {unit.name: unit.parameters for unit in model.units}
    found: list[Draft] = []
    for unit in (unit for unit in model.units if unit.mirrors):
        block = parameters[unit.mirrors]
        inside = f"{unit.mirrors}."
        if any(name != stored or not name.startswith(inside) for name, stored in block.items()):
            continue
        places = {f"{unit.name}.{name.removeprefix(inside)}": stored for name, stored in block.items()}
        if set(unit.tensors) == places.keys() | {f"{unit.name}.{part}" for part in _PARTS} and all(
            model.source.meta(name).shape == model.source.meta(stored).shape for name, stored in places.items()
        ):
            found.append(Draft(unit.name, unit.mirrors, tuple(unit.tensors)))
    return found
