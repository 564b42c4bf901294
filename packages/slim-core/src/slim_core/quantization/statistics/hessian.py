"""The second moment of a linear's inputs, which is the Hessian of its squared output error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slim_core.errors import InvalidModelError

__all__ = ["Hessian"]


@dataclass
class Hessian:
    """``total = sum over tokens of x x^T``, float32 ``(channels, channels)``; None before anything was seen."""

    total: Tensor | None = None
    tokens: int = 0

    def update(self, x: Tensor) -> None:
        """Take in activations ``(..., channels)``."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(rows):
            return
        if self.total is None:
            self.total = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        self.total.addmm_(rows.T, rows)
        self.tokens += len(rows)

    def merge(self, other: Hessian) -> None:
        """Add what another one saw."""
        if other.total is not None:
            self.total = other.total.clone() if self.total is None else self.total + other.total
            self.tokens += other.tokens

    def mean(self, name: str) -> Tensor | None:
        """``E[x x^T]`` per token, a new float32 tensor; None if nothing was seen.

        Args:
            name: the linear, for errors.

        Raises:
            InvalidModelError: NaN or infinity was observed.
        """
        if self.total is None:
            return None
        if not bool(torch.isfinite(self.total.diagonal()).all()):
            raise InvalidModelError(
                "its activations hold NaN or infinity", where=name, remedy="check the model and the calibration set"
            )
        return self.total / self.tokens
