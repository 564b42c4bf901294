"""Activations as the quantized layer will see them, with gradients that pass straight through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from slim_core.quantization.affine import dequantize, quantize, quantize_per_token

__all__ = ["DynamicInput", "FloatInput", "InputRounding", "StaticInput"]


class InputRounding(Protocol):
    """What happens to the activations of a linear."""

    def __call__(self, x: Tensor) -> Tensor:
        """The float32 values that the codes of activations ``(..., channels)`` stand for."""
        ...


@dataclass(frozen=True)
class FloatInput:
    """Activations stay as they are."""

    def __call__(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class DynamicInput:
    """A scale per token, taken at run time; nothing is clipped, so gradients pass unchanged."""

    bits: int

    def __call__(self, x: Tensor) -> Tensor:
        exact = x.float()
        codes, scale = quantize_per_token(exact.detach(), self.bits)
        return codes.float().mul_(scale) + _nothing(exact)


@dataclass(frozen=True, eq=False)
class StaticInput:
    """int8 with one scale and offset ``(1,)``; no gradient passes where an activation is clipped."""

    scale: Tensor
    offset: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        exact = x.float()
        steps = (exact.detach() / self.scale + self.offset).round_()
        inside = (steps >= -128) & (steps <= 127)
        codes = quantize(exact.detach(), self.scale, self.offset, bits=8)
        return dequantize(codes, self.scale, self.offset) + _nothing(exact) * inside


def _nothing(x: Tensor) -> Tensor:
    """Zeros with the gradient of x."""
    return x - x.detach()
