"""Inputs of a forward that are of use only until its towers have run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["TowerInputs"]


class TowerInputs(dict[str, Any]):
    """Keyword arguments of a model. What towers make of pixels is much smaller than the pixels, but a suspended forward
    holds on to its arguments until it ends.

    Args:
        given: the arguments.
        for_towers: names of those that nothing reads once the towers have run; floating-point tensors.
    """

    def __init__(self, given: Mapping[str, Any], for_towers: Collection[str]) -> None:
        super().__init__(given)
        self._for_towers = for_towers

    def for_towers(self) -> list[Tensor]:
        """The tensors that only towers read."""
        values = [self.get(name) for name in self._for_towers]
        return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]

    def let_go(self) -> None:
        """Give the memory of these tensors back, whoever still holds them.

        They keep their shape; who reads them all the same reads NaN, which cannot go unnoticed.
        """
        for value in self.for_towers():
            value.data = torch.full((1,), float("nan"), dtype=value.dtype).expand(value.shape)
