"""What is known of the inputs of a linear: requested by processors, gathered in the one forward of a unit.

Statistics can be merged in any order and are finalised once.
"""

from slim_core.quantization.statistics.channels import ChannelStatistics
from slim_core.quantization.statistics.hessian import Hessian, hessian_bytes
from slim_core.quantization.statistics.histogram import Histogram
from slim_core.quantization.statistics.inputs import InputObserver, InputStatistics, Need
from slim_core.quantization.statistics.ranges import TensorRange, observe_range
from slim_core.quantization.statistics.tokens import TokenSample

__all__ = [
    "ChannelStatistics",
    "Hessian",
    "Histogram",
    "InputObserver",
    "InputStatistics",
    "Need",
    "TensorRange",
    "TokenSample",
    "hessian_bytes",
    "observe_range",
]
