"""The second moment of a linear's inputs, which is the Hessian of its squared output error."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slim_core.quantization.statistics.problems import not_finite

__all__ = ["Hessian"]

_BLOCK_ELEMENTS = 1 << 20


@dataclass
class Hessian:
    """``total = sum over tokens of x x^T``, float32 ``(channels, channels)``; None before anything was seen.

    Args:
        shared: whether several linears use it, so that what is derived from it is worth keeping.
        derived: what methods keep for the next of these linears; dropped when more is seen.
    """

    total: Tensor | None = None
    tokens: int = 0
    shared: bool = False
    derived: dict[Any, Any] = field(default_factory=dict[Any, Any], repr=False, compare=False)

    def update(self, x: Tensor) -> None:
        """Take in activations ``(..., channels)``."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(rows):
            return
        if self.total is None:
            self.total = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        self.total.addmm_(rows.T, rows)
        self.tokens += len(rows)
        self.derived.clear()

    def merge(self, other: Hessian) -> None:
        """Add what another one saw."""
        if other.total is not None:
            self.total = other.total.clone() if self.total is None else self.total + other.total
            self.tokens += other.tokens
            self.derived.clear()

    def rescaled(self, scale: Tensor, shift: Tensor | None = None, total: Tensor | None = None) -> Hessian:
        """The Hessian of ``(x - shift) / scale``: ``S^-1 (H - m z^T - z m^T + n z z^T) S^-1``.

        Args:
            scale, shift: ``(channels,)``.
            total: the sum ``m`` of all tokens, needed with a shift.
        """
        if self.total is None:
            return Hessian()
        device, width = self.total.device, len(self.total)
        inverse = 1 / scale.to(device, torch.float64)
        z = m = torch.zeros(0)
        if shift is not None:
            assert total is not None
            z, m = shift.to(device, torch.float64), total.to(device, torch.float64)
        result = torch.empty_like(self.total)
        step = max(1, _BLOCK_ELEMENTS // width)
        for rows in (slice(start, start + step) for start in range(0, width, step)):
            part = self.total[rows].double()
            if shift is not None:
                part = part - torch.outer(m[rows], z) - torch.outer(z[rows], m) + self.tokens * torch.outer(z[rows], z)
            result[rows] = inverse[rows, None] * part * inverse
        return Hessian(result, self.tokens, self.shared)

    def checked(self, name: str) -> Tensor | None:
        """``total``, not to be changed; None if nothing was seen.

        Args:
            name: the linear, for errors.

        Raises:
            InvalidModelError: NaN or infinity was observed.
        """
        if self.total is None:
            return None
        if not bool(torch.isfinite(self.total.diagonal()).all()):
            raise not_finite(name)
        return self.total

    def mean(self, name: str) -> Tensor | None:
        """``E[x x^T]`` per token, a new float32 tensor; else as :meth:`checked`."""
        total = self.checked(name)
        return None if total is None else total / self.tokens
