"""The weight methods, and the choice of the one that a recipe names."""

from __future__ import annotations

import torch
from torch import Tensor

from slim_core.logging import get_logger
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.quantization.methods import microscaling
from slim_core.quantization.methods.floating import fp8_weight
from slim_core.quantization.methods.gptq import GptqOptions, gptq_weight
from slim_core.quantization.methods.minmax import minmax_weight
from slim_core.quantization.methods.sparse import FRACTION, SIGMA_FACTOR, sparse_weight
from slim_core.quantization.methods.ssz import SszOptions, ssz_weight
from slim_core.quantization.statistics import InputStatistics
from slim_core.quantization.weights import MxWeight, QuantizedWeight, RowSource
from slim_core.recipe.qconfig import WeightConfig

__all__ = ["quantize_weight"]

_logger = get_logger(__name__)


def quantize_weight(
    weight: RowSource,
    config: WeightConfig,
    form: LayerForm,
    *,
    tensor: str,
    linear: str,
    device: torch.device | None = None,
    seen: InputStatistics | None = None,
) -> QuantizedWeight | MxWeight:
    """Quantize a weight by the method that its configuration names.

    Args:
        weight: float matrix ``(out, in)``.
        form: the layer it is for.
        tensor, linear: names of the tensor and of the module, for errors.
        device: where to compute.
        seen: what is known of the inputs, for methods that use it; of a starved expert they use nothing.

    Raises:
        InvalidModelError: the weight or its inputs hold NaN or infinity.
    """
    if form.kind.is_microscaling:
        return _mx_weight(weight, config, form, tensor, device)
    if form.kind is LayerKind.WFP8AFP8_DYNAMIC:
        return fp8_weight(weight, name=tensor, device=device)
    bits = form.kind.weight_bits
    starved = seen is not None and seen.is_starved
    match config.method:
        case "ssz":
            options = SszOptions.of(config.ext)
            return ssz_weight(
                weight,
                bits=bits,
                group_size=form.group_size,
                steps=options.steps,
                name=tensor,
                device=device,
                importance=_mean_square(seen, linear) if options.weighted and not starved else None,
            )
        case "gptq" if starved:
            return ssz_weight(
                weight, bits=bits, symmetric=form.symmetric, group_size=form.group_size, name=tensor, device=device
            )
        case "gptq":
            return gptq_weight(
                weight,
                seen.hessian if seen is not None else None,
                bits=bits,
                symmetric=form.symmetric,
                group_size=form.group_size,
                options=GptqOptions.of(config.ext),
                name=tensor,
                linear=linear,
                device=device,
            )
        case "sparse":
            return sparse_weight(
                weight,
                fraction=config.ext.get("fraction", FRACTION),
                use_sigma=config.ext.get("use_sigma", False),
                sigma_factor=config.ext.get("sigma_factor", SIGMA_FACTOR),
                name=tensor,
                device=device,
            )
        case _:
            return minmax_weight(
                weight, bits=bits, symmetric=form.symmetric, name=tensor, group_size=form.group_size, device=device
            )


def _mean_square(seen: InputStatistics | None, linear: str) -> Tensor | None:
    """The mean square of every input; None, with a warning, if none was observed."""
    found = seen.channels.mean_square(linear) if seen is not None else None
    if found is None:
        _logger.warning(
            "%s: no calibration sample reached it, so its inputs do not weigh the error of its weight", linear
        )
    return found


def _mx_weight(
    weight: RowSource, config: WeightConfig, form: LayerForm, tensor: str, device: torch.device | None
) -> MxWeight:
    ext = config.ext
    match config.method:
        case "mse_round":
            return microscaling.mse_round_weight(weight, name=tensor, device=device)
        case "fouroversix":
            return microscaling.fouroversix_weight(weight, name=tensor, device=device)
        case "ceil_x":
            values = microscaling.search_values(
                ext.get("search_min", 6.0), ext.get("search_max", 12.0), ext.get("search_step", 0.25)
            )
            return microscaling.ceil_x_weight(
                weight,
                name=tensor,
                value=ext.get("ceil_x_value", 7.25),
                search=values if ext.get("enable_search", False) else (),
                device=device,
            )
        case "dualscale":
            return microscaling.dualscale_weight(weight, outer_block=form.outer_block, name=tensor, device=device)
        case _:
            minmax = microscaling.mxfp8_weight if config.dtype == "mxfp8" else microscaling.mxfp4_weight
            return minmax(weight, name=tensor, device=device)
