"""The block at work, for processors that run it themselves, and what of its output counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from slim_core.model.streamed import StreamedModel
from slim_core.runners.calibration import BlockForwards

__all__ = ["KeptBlock", "hidden_states"]


class KeptBlock:
    """The block at work for processors that run it themselves: a :class:`~slim_core.model.block_run.BlockRun`.

    Args:
        targets: outputs of the float block, on the host.
    """

    def __init__(self, model: StreamedModel, forwards: BlockForwards, targets: Sequence[Any], device: torch.device):
        self._forwards = forwards
        self._targets = targets
        self._device = device
        self._present = forwards.present(-1)  # exact ones may have been handed on already
        self.module = model.module
        self.samples = len(self._present)

    def run(self, sample: int) -> Tensor:
        return _what_counts(self._forwards.compute(self._present[sample]))

    def target(self, sample: int) -> Tensor:
        return _what_counts(self._targets[self._present[sample]]).to(self._device)


def hidden_states(output: Any) -> Tensor:
    """The hidden states of a block's output: a tensor, or the first of a tuple.

    Where a block carries several streams, as those of a diffusion transformer do with picture and text, they are of
    one width, and their tokens come one after the other, ``(tokens, width)``. What else a block may return, such as
    weights of attentions, has other dimensions.
    """
    if isinstance(output, Tensor):
        return output
    tensors = [part for part in output if isinstance(part, Tensor) and part.is_floating_point()]
    first = tensors[0]
    form = first.dim(), first.shape[0], first.shape[-1]
    streams = [tensor for tensor in tensors if (tensor.dim(), tensor.shape[0], tensor.shape[-1]) == form]
    return first if len(streams) == 1 else torch.cat([stream.flatten(0, -2) for stream in streams])


def _what_counts(output: Any) -> Tensor:
    """The hidden states of a block; of a tower that gives several things, all of them, one after the other."""
    if not isinstance(output, Mapping):
        return hidden_states(output)
    tensors = [part for part in tree_leaves(output) if isinstance(part, Tensor) and part.is_floating_point()]
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
