"""``slim quant``."""

from __future__ import annotations

from slim_core.service import QuantRequest

__all__ = ["quant"]


def quant(request: QuantRequest) -> None:
    """Quantize a model.

    By a recipe (--config_path), or by the practice that fits the model and --quant_type.
    """
    from slim_core.commands import quantize

    quantize(request)
