"""``quarot``: rotate the residual stream, the value heads and the low ranks of a model, without data.

QuaRot (arXiv 2404.00456): an orthogonal matrix of even entries takes the outlier channels out of the hidden states. It
is multiplied into all weights that read and write them, so nothing else changes.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from slim_core.processors.rotating import BlockSize, PowerOfTwo, Rotating, RotatingConfig

__all__ = ["Quarot", "QuarotConfig"]


class QuarotConfig(RotatingConfig):
    """Rotate the model by randomised Hadamard matrices."""

    type: Literal["quarot"] = "quarot"
    online: bool = Field(
        default=False, description="Also rotate attention heads, and layers of down_proj_online_layers, at run time"
    )
    block_size: BlockSize = Field(
        default=-1, description="Size of the blocks of all rotations, a power of two; -1: one block each"
    )
    max_tp_size: PowerOfTwo = Field(
        default=4, description="online: block size of rotations that tensor-parallel ranks share. A power of two"
    )
    down_proj_online_layers: tuple[int, ...] = Field(
        default=(), description="online: decoder layers in which the input of down_proj is rotated too"
    )
    export_extra_info: bool = Field(
        default=True, description="Write the rotation of the hidden states to optional/quarot.safetensors"
    )


class Quarot(Rotating):
    """Random signs and Hadamard matrices; always the same ones."""

    Config = QuarotConfig
    config: QuarotConfig

    @property
    def exports(self) -> bool:
        return self.config.export_extra_info
