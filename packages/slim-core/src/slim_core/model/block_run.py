"""A block that is run again and again: by who learns its weights, or searches for them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

__all__ = ["BlockRun"]


class BlockRun(Protocol):
    """A block, loaded on the device, with its inputs and what it should make of them."""

    @property
    def module(self) -> nn.Module:
        """A module in which the block's linears are found by name, and may be replaced for a while."""
        ...

    @property
    def samples(self) -> int: ...

    def run(self, sample: int) -> Tensor:
        """The hidden states ``(..., hidden)`` that the block makes of a sample as it is now, on the device.

        Gradients flow if they are enabled.
        """
        ...

    def target(self, sample: int) -> Tensor:
        """The hidden states that the float block should make of this sample, on the device."""
        ...
