"""What every quantized linear offers, and the module that stands in for the float one."""

from __future__ import annotations

from typing import Protocol

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
    """A quantized linear in the place of the float one."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.simulate(x)


def restore(y: Tensor, like: Tensor) -> Tensor:
    """Rows ``(tokens, out)`` in the dtype and with the leading dimensions of the activations they come from."""
    return y.to(like.dtype).view(*like.shape[:-1], y.shape[-1])
