"""A quantized linear whose input is multiplied by a scale first, because there was nothing to fold the scale into."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slim_core.model.inputs import scaled
from slim_core.quantization.kinds import LayerKind
from slim_core.quantization.layers.base import QuantizedLinear

__all__ = ["ScaledInput"]


@dataclass(frozen=True, eq=False)
class ScaledInput:
    """``y = layer(x * mul_scale)``; the product is rounded to the dtype of the activations, as engines round it.

    Args:
        layer: quantized from the weight divided by ``mul_scale``.
        mul_scale: ``(in,)``, in the dtype of the float weight.
    """

    layer: QuantizedLinear
    mul_scale: Tensor

    @property
    def kind(self) -> LayerKind:
        return self.layer.kind

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def simulate(self, x: Tensor) -> Tensor:
        return self.layer.simulate(scaled(x, self.mul_scale))

    def dequantized(self) -> Tensor:
        """The weight that the codes and the scale stand for together, float32 ``(out, in)``."""
        return self.layer.dequantized() * self.mul_scale.float()
