"""What lies before and after the blocks of a model and has to do with its residual stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slim_core.errors import UnsupportedError
from slim_core.model.passage import Passage, values_of
from slim_core.model.residual import norm_defect
from slim_core.model.streamed import StreamedModel
from slim_core.model.subgraphs import Subgraph, is_norm
from slim_core.rotation.matrices import Rotation
from slim_core.rotation.steps import Steps

__all__ = ["Ends", "find_ends"]

_SAME = 1e-5


@dataclass(frozen=True)
class Ends:
    """The embeddings that make the residual stream, and the norms and linears that read it in the end.

    Args:
        heads: linears that read it without a norm.
        towers: linears ahead of the blocks whose outputs become part of it, such as those of images.
    """

    embeddings: tuple[str, ...]
    norms: tuple[Subgraph, ...]
    heads: tuple[str, ...] = ()
    towers: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears that read the stream after the last block."""
        return (*self.heads, *(reader for norm in self.norms for reader in norm.targets))

    def add_to(self, steps: Steps, rotation: Rotation) -> None:
        """Rotate the stream here too."""
        for embedding in self.embeddings:
            steps.right(embedding, rotation)
        for writer in self.towers:
            steps.left(writer, rotation)
        for norm in self.norms:
            steps.norm(norm)
        for linear in self.linears:
            steps.right(linear, rotation)


def find_ends(model: StreamedModel, passage: Passage) -> Ends:
    """The ends of a model, from one passage through it.

    Raises:
        UnsupportedError: no embedding or no head was found, or the last norm is not of the kind that can be rotated.
    """
    width = passage.first.shape[-1]
    last = passage.last.reshape(-1, width)
    inputs, outputs = passage.seen.inputs, passage.seen.outputs
    module = model.module
    embeddings = tuple(
        n for n in outputs if isinstance(module.get_submodule(n), nn.Embedding) and _wide(outputs, n, width)
    )
    at_end = [name for name, x in inputs.items() if _equal(x, last)]
    norms = [_final_norm(model, passage, name) for name in at_end if is_norm(module.get_submodule(name))]
    heads = tuple(name for name in at_end if isinstance(module.get_submodule(name), nn.Linear))
    ends = Ends(embeddings, tuple(norms), heads)
    for what, found in (("embedding makes", embeddings), ("head reads", ends.linears)):
        if not found:
            raise UnsupportedError(f"no {what} the hidden states directly", where=type(module).__name__)
    return ends


def _wide(outputs: dict[str, Tensor], name: str, width: int) -> bool:
    return outputs[name].shape[-1] == width


def _final_norm(model: StreamedModel, passage: Passage, name: str) -> Subgraph:
    inputs, outputs = passage.seen.inputs, passage.seen.outputs
    parameters = next(unit.parameters for unit in model.units if f"{name}.weight" in unit.parameters)
    parts = {part: parameters[f"{name}.{part}"] for part in ("weight", "bias") if f"{name}.{part}" in parameters}
    values = values_of(model, parts)
    defects = {one: norm_defect(values, inputs[name], outputs[name], plus_one=one) for one in (False, True)}
    if None not in defects.values():
        raise UnsupportedError(defects[False] or "", where=name)
    width = outputs[name].shape[-1]
    readers = [
        other
        for other, x in inputs.items()
        if isinstance(model.module.get_submodule(other), nn.Linear) and _equal(x, outputs[name])
    ]
    if not readers:
        raise UnsupportedError("no linear was found that is given its output as it is", where=name)
    return Subgraph("norm-linear", name, tuple(readers), torch.arange(width), plus_one=defects[False] is not None)


def _equal(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and float((x - y).abs().max()) <= _SAME * float(y.abs().max())
