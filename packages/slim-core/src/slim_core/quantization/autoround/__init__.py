"""AutoRound: rounding and range of weights, learned by sign gradient descent on the output of a whole block.

W. Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", arXiv 2309.05516.
"""

from slim_core.quantization.autoround.inputs import DynamicInput, FloatInput, InputRounding, StaticInput
from slim_core.quantization.autoround.rounding import WeightGrid
from slim_core.quantization.autoround.training import TrainingOptions, train, training_forwards
from slim_core.quantization.autoround.tuned import TunedLinear, TunedWeight

__all__ = [
    "DynamicInput",
    "FloatInput",
    "InputRounding",
    "StaticInput",
    "TrainingOptions",
    "TunedLinear",
    "TunedWeight",
    "WeightGrid",
    "train",
    "training_forwards",
]
