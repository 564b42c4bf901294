"""The practice library: which recipe fits a model type and a quantization type."""

from slim_core.practices.library import Practice, PracticeLibrary, Selection, practice_folders
from slim_core.practices.quant_types import DEFAULT_QUANT_TYPE, QUANT_TYPES, QuantType, parse_quant_type

__all__ = [
    "DEFAULT_QUANT_TYPE",
    "QUANT_TYPES",
    "Practice",
    "PracticeLibrary",
    "QuantType",
    "Selection",
    "parse_quant_type",
    "practice_folders",
]
