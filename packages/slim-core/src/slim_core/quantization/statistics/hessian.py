"""The second moment of a linear's inputs, which is the Hessian of its squared output error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from slim_core.memory import give_back_freed_memory
from slim_core.quantization.statistics.problems import not_finite
from slim_core.quantization.statistics.sums import accumulator

__all__ = ["Hessian", "hessian_bytes"]

_BLOCK_ELEMENTS = 1 << 20
_ROWS = 64  # of a strip of the lower triangle
_TRIMMED_BYTES = 8 << 20


def hessian_bytes(width: int) -> int:
    """Memory of a Hessian of so many channels while it is gathered."""
    return sum(8 * (stop - start) * stop for start, stop in _strips(width))


def _strips(width: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + _ROWS, width)) for start in range(0, width, _ROWS))


class Hessian:
    """``total = sum over tokens of x x^T``, float32 ``(channels, channels)``; None before anything was seen.

    What every forward adds is a float32 product; it is added in float64, so that the sum does not depend on the order
    of forwards nor on who gathered them (:mod:`.sums`). Of a symmetric matrix one half suffices, so that in float64 it
    takes no more than all of it in float32; ``total`` puts it together when it is first asked for.

    Args:
        total: the sum so far, and of how many tokens.
        shared: whether several linears use it, so that what is derived from it is worth keeping.

    ``derived`` is what methods keep for the next of these linears; dropped when more is seen.
    """

    def __init__(self, total: Tensor | None = None, tokens: int = 0, shared: bool = False) -> None:
        self._total = total
        self._parts: list[Tensor] = []  # strips of rows of the lower triangle, up to the diagonal
        self.tokens = tokens
        self.shared = shared
        self.derived: dict[Any, Any] = {}

    @property
    def total(self) -> Tensor | None:
        if self._parts:
            width = self._parts[-1].shape[1]
            total = torch.empty(width, width, device=self._parts[0].device)
            for start, stop in reversed(list(_strips(width))):
                strip = self._parts.pop().float()
                total[start:stop, :stop] = strip
                total[:start, start:stop] = strip[:, :start].T
            self._total = total
            if total.nbytes >= _TRIMMED_BYTES and total.device.type == "cpu":
                give_back_freed_memory()  # the strips
        return self._total

    def parts(self, width: int, device: torch.device) -> list[Tensor]:
        """What it is gathered in, to be added to: strips ``(rows, up to the diagonal)`` of the lower triangle."""
        if not self._parts:
            total, self._total = self._total, None
            dtype = accumulator(device)
            for start, stop in _strips(width):
                zeros = torch.zeros(stop - start, stop, dtype=dtype, device=device)
                self._parts.append(zeros if total is None else total[start:stop, :stop].to(dtype))
            self.derived.clear()
        return self._parts

    def update(self, x: Tensor) -> None:
        """Take in activations ``(..., channels)``."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if not len(rows):
            return
        for strip, (start, stop) in zip(self.parts(rows.shape[1], rows.device), _strips(rows.shape[1]), strict=True):
            strip += rows[:, start:stop].T @ rows[:, :stop]
        self.tokens += len(rows)
        self.derived.clear()

    def merge(self, other: Hessian) -> None:
        """Add what another one saw."""
        if not other.tokens and other.total is None:
            return
        if other._parts:
            width, device = other._parts[-1].shape[1], other._parts[0].device
            for strip, more in zip(self.parts(width, device), other._parts, strict=True):
                strip += more
        elif other.total is not None:
            width = len(other.total)
            strips = zip(self.parts(width, other.total.device), _strips(width), strict=True)
            for strip, (start, stop) in strips:
                strip += other.total[start:stop, :stop]
        self.tokens += other.tokens
        self.derived.clear()

    def rescaled(self, scale: Tensor, shift: Tensor | None = None, total: Tensor | None = None) -> Hessian:
        """The Hessian of ``(x - shift) / scale``: ``S^-1 (H - m z^T - z m^T + n z z^T) S^-1``.

        Args:
            scale, shift: ``(channels,)``.
            total: the sum ``m`` of all tokens, needed with a shift.
        """
        before = self.total
        if before is None:
            return Hessian()
        device, width = before.device, len(before)
        inverse = 1 / scale.to(device, torch.float64)
        z = m = torch.zeros(0)
        if shift is not None:
            assert total is not None
            z, m = shift.to(device, torch.float64), total.to(device, torch.float64)
        result = torch.empty_like(before)
        step = max(1, _BLOCK_ELEMENTS // width)
        for rows in (slice(start, start + step) for start in range(0, width, step)):
            part = before[rows].double()
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
        total = self.total
        if total is None:
            return None
        if not bool(torch.isfinite(total.diagonal()).all()):
            raise not_finite(name)
        return total

    def mean(self, name: str) -> Tensor | None:
        """``E[x x^T]`` per token, a new float32 tensor; else as :meth:`checked`."""
        total = self.checked(name)
        return None if total is None else total / self.tokens
