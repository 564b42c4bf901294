"""Which outputs of earlier blocks a suspended forward still needs, found on a short sample that runs along.

What a block gave is put under the eyes of autograd: as long as the suspended forward holds anything that was made of
it, the graph holds the tensor. Nothing is ever differentiated, and the samples themselves run without gradients.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["Witness"]


class Witness:
    """Knows of every stop (block or tower) whether its output is still in use."""

    def __init__(self) -> None:
        self._origins: dict[int, list[weakref.ref[Tensor]]] = {}

    def marked(self, stop: int, output: Any) -> Any:
        """The output of a stop, to be handed on in its place while gradients are enabled.

        What is made of a floating-point tensor keeps its origin alive. Of others it is only known how long they live
        themselves.
        """
        leaves, form = tree_flatten(output)
        self._origins[stop] = []
        for at, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                continue
            origin = leaves[at] = leaf.detach().clone()
            if origin.is_floating_point():
                with torch.enable_grad():
                    leaves[at] = origin.requires_grad_().clone()  # the model may write to it, but not to its origin
            self._origins[stop].append(weakref.ref(origin))
        return tree_unflatten(leaves, form)

    def needed(self, stop: int) -> list[int]:
        """The stops ahead of this one whose outputs are in use; the output of the one right before always counts."""
        alive = {at for at, origins in self._origins.items() if any(origin() is not None for origin in origins)}
        return sorted(at for at in alive | {stop - 1} if 0 <= at < stop)
