"""Quantized linears as data with a meaning.

Each class is the immutable result of quantizing one linear. It computes what the target's arithmetic computes
(``simulate``), which serves calibration, evaluation and tests alike, and a saver can write its fields.
"""

from slim_core.quantization.layers.base import QuantizedLinear, SimulatedLinear
from slim_core.quantization.layers.floating import Fp8Dynamic, MxDynamic
from slim_core.quantization.layers.integer import DynamicInt, MixedInt8, StaticInt8, WeightOnlyInt
from slim_core.quantization.layers.scaled import ScaledInput
from slim_core.quantization.layers.sparse import SparseFloat

__all__ = [
    "DynamicInt",
    "Fp8Dynamic",
    "MixedInt8",
    "MxDynamic",
    "QuantizedLinear",
    "ScaledInput",
    "SimulatedLinear",
    "SparseFloat",
    "StaticInt8",
    "WeightOnlyInt",
]
