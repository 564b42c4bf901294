"""What every quantized linear offers, and the module that stands in for the float one."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from slim_core.quantization.kinds import LayerKind

__all__ = ["QuantizedLinear", "SimulatedLinear", "restore"]


class QuantizedLinear(Protocol):
    """The immutable result of quantizing one linear. ``weight`` holds its codes, ``bias`` is ``(out,)`` or None."""

    @property
    def kind(self) -> LayerKind: ...

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...

    def simulate(self, x: Tensor) -> Tensor:
        """The output for activations ``(..., in)``, in their dtype, as the target computes it."""
        ...

    def dequantized(self) -> Tensor:
        """The weight that the codes stand for, float32 ``(out, in)``."""
        ...


class SimulatedLinear(nn.Module):
    """A quantized linear in the place of the float one.

    Args:
        dtype: that of the float weight. Some models ask a linear for it before they call it, and some multiply by its
            ``weight`` themselves; those meet the weight that the codes stand for, and no quantized activations.
    """

    def __init__(self, layer: QuantizedLinear, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layer = layer
        self.out_features, self.in_features = layer.weight.shape
        self._dtype = dtype

    @property
    def weight(self) -> Tensor:
        """``(out, in)``; made anew every time, so that nothing is held."""
        return self.layer.dequantized().to(self._dtype)

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.simulate(x)


def restore(y: Tensor, like: Tensor) -> Tensor:
    """Rows ``(tokens, out)`` in the dtype and with the leading dimensions of the activations they come from."""
    return y.to(like.dtype).view(*like.shape[:-1], y.shape[-1])
