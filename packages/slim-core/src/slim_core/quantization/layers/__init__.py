"""Quantized linears as data with a meaning.

Each class is the immutable result of quantizing one linear. It computes what the target's arithmetic computes
(``simulate``), which serves calibration, evaluation and tests alike, and a saver can write its fields.
"""

from slim_core.quantization.layers.base import QuantizedLinear, SimulatedLinear
from slim_core.quantization.layers.integer import DynamicInt, MixedInt8, StaticInt8, WeightOnlyInt

__all__ = [
    "DynamicInt",
    "MixedInt8",
    "QuantizedLinear",
    "SimulatedLinear",
    "StaticInt8",
    "WeightOnlyInt",
]
