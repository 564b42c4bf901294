"""The weight methods, and the choice of the one that a recipe names."""

from __future__ import annotations

import torch

from slim_core.quantization.kinds import LayerForm
from slim_core.quantization.methods.minmax import minmax_weight
from slim_core.quantization.statistics import InputStatistics
from slim_core.quantization.weights import QuantizedWeight, RowSource
from slim_core.recipe.qconfig import WeightConfig

__all__ = ["quantize_weight"]


def quantize_weight(
    weight: RowSource,
    config: WeightConfig,
    form: LayerForm,
    *,
    tensor: str,
    linear: str,
    device: torch.device | None = None,
    seen: InputStatistics | None = None,
) -> QuantizedWeight:
    """Quantize a weight by the method that its configuration names.

    Args:
        weight: float matrix ``(out, in)``.
        form: the layer it is for.
        tensor, linear: names of the tensor and of the module, for errors.
        device: where to compute.
        seen: what is known of the inputs, for methods that use it.

    Raises:
        InvalidModelError: the weight or its inputs hold NaN or infinity.
    """
    bits = form.kind.weight_bits
    match config.method:
        case _:
            return minmax_weight(
                weight, bits=bits, symmetric=form.symmetric, name=tensor, group_size=form.group_size, device=device
            )
