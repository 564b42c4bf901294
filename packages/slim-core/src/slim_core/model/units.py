"""The parts of a model that are in memory as a whole: what comes before the blocks, towers, blocks, what comes after.

A tower is a part that runs as a whole ahead of the decoder blocks: a vision encoder, or the projector behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from slim_core.checkpoint.source import TensorMeta
from slim_core.model.attention import AttentionInfo

__all__ = ["Addition", "LinearInfo", "Unit"]


@dataclass(frozen=True)
class LinearInfo:
    """A linear of the model: module name, the checkpoint name its tensors go by, and its parts.

    Args:
        in_block: whether it is inside a decoder block or a tower, so that recipes can name it.
        in_decoder: whether it is inside a decoder block.
        runs: whether the model runs it; of a drafting layer's nothing can be observed.
        also_called: further names that recipes may use for it.
    """

    name: str
    prefix: str
    in_features: int
    out_features: int
    has_bias: bool
    in_block: bool
    runs: bool = True
    in_decoder: bool = True
    also_called: tuple[str, ...] = ()


@dataclass(frozen=True)
class Addition:
    """A parameter that the model has beyond those of its checkpoint, e.g. the bias that a shift leaves behind."""

    parameter: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Unit:
    """A part of the model that is in memory as a whole.

    Args:
        name: dotted module name of a block or a tower, or ``prologue``, ``epilogue``, ``extra``; of a drafting layer
            its prefix.
        block: index of the block, None outside the blocks.
        stop: at which of the model's stops it runs, None if it is neither block nor tower.
        parameters: parameter (or buffer) name to checkpoint tensor, for all that this unit owns; of a drafting layer
            those of its linears, by the names that they would have.
        tensors: what the unit writes, output name to the checkpoint tensor it comes from; differs for tied weights.
        linears: the linears among its modules.
        attentions: the attentions among its modules, as far as whoever opened the model knows them.
        added: parameters that are in no checkpoint, and the tensors that they will be written as.
        mirrors: of a drafting layer, which the model does not run: a block of its kind; empty for all others.
    """

    name: str
    block: int | None
    parameters: dict[str, str]
    tensors: dict[str, str]
    linears: tuple[LinearInfo, ...] = ()
    attentions: tuple[AttentionInfo, ...] = ()
    added: Mapping[str, TensorMeta] = field(default_factory=dict[str, TensorMeta])
    mirrors: str = ""
    stop: int | None = None
