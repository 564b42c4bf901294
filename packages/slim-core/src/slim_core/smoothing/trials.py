"""The quantizers of a recipe, as a search for scales tries them: what they leave of inputs and weights."""

from __future__ import annotations

import torch
from torch import Tensor

from slim_core.errors import UnexpectedError
from slim_core.quantization.affine import stored_parameters
from slim_core.quantization.floating import e4m3_values, quantize_e4m3_per_token
from slim_core.quantization.kinds import LayerForm
from slim_core.quantization.methods import quantize_weight
from slim_core.quantization.methods.ssz import SszOptions
from slim_core.quantization.microscaling import dual_scale_activations, mxfp4_activations, mxfp8_activations
from slim_core.quantization.statistics import ChannelStatistics, InputStatistics
from slim_core.quantization.weights import InMemory
from slim_core.recipe.qconfig import ActConfig, WeightConfig
from slim_core.smoothing.search import Quantizer, exact, symmetric_rows

__all__ = ["act_quantizer", "weight_quantizer"]


def act_quantizer(
    config: ActConfig | None, form: LayerForm, channels: ChannelStatistics, dtype: torch.dtype | None
) -> Quantizer:
    """What an activation becomes.

    A static one has the range that the extremes of its channels leave it, whatever its method: histograms and means of
    extremes cannot be carried over to another scale. ``pd_mix`` counts as what reads a prompt: a scale per token.

    Args:
        config: None for activations that stay in floating point.
        channels: what was seen of the unscaled inputs.
        dtype: the engine's dtype.
    """
    if config is None:
        return exact
    match config.dtype, config.scope:
        case "int8", "per_tensor":
            return _static(channels, config.symmetric, dtype)
        case "int8", "pd_mix":
            return symmetric_rows(8)
        case (("int8" | "int4"), "per_token"):
            return symmetric_rows(4 if config.dtype == "int4" else 8)
        case "fp8_e4m3", "per_token":
            return _fp8
        case "mxfp8", "per_block":
            return lambda rows, _columns: mxfp8_activations(rows)
        case "mxfp4", "per_block":
            return lambda rows, _columns: mxfp4_activations(rows)
        case "mxfp4", "dual_scale":
            return lambda rows, _columns: _dual_scale(rows, form.outer_block)
        case _:
            raise UnexpectedError(f"no search tries activations {config.dtype} {config.scope}")


def _static(channels: ChannelStatistics, symmetric: bool, dtype: torch.dtype | None) -> Quantizer:
    assert channels.minimum is not None
    assert channels.maximum is not None
    minimum, maximum = channels.minimum, channels.maximum

    def quantizer(rows: Tensor, columns: Tensor) -> Tensor:
        low, high = minimum.to(columns) / columns, maximum.to(columns) / columns
        bounds = (low.amin(1).view(-1, 1, 1), high.amax(1).view(-1, 1, 1))
        scale, offset = stored_parameters(*bounds, 8, symmetric, dtype)
        return (rows / scale).add_(offset).round_().clamp_(-128, 127).sub_(offset).mul_(scale)

    return quantizer


def _fp8(rows: Tensor, columns: Tensor) -> Tensor:
    codes, scale = quantize_e4m3_per_token(rows)
    return e4m3_values(codes) * scale


def _dual_scale(rows: Tensor, outer_block: int) -> Tensor:
    values, outer = dual_scale_activations(rows, outer_block)
    blocks = values.view(*outer.shape, outer_block)
    return (blocks * outer.unsqueeze(-1)).view(rows.shape)


def weight_quantizer(
    config: WeightConfig, form: LayerForm, channels: ChannelStatistics, name: str, device: torch.device
) -> Quantizer:
    """What the weight method of a recipe leaves of weights; one that needs no Hessian.

    Methods work row by row, so the rows of all candidates are quantized as one matrix, unless the method looks at the
    inputs, which are others for every candidate.

    Args:
        form: the layer that the weight is for.
        channels: what was seen of the unscaled inputs.
        name: for errors.
    """
    if config.method == "minmax" and config.symmetric and config.scope == "per_channel" and "int" in config.dtype:
        return symmetric_rows(form.kind.weight_bits)

    def quantized(matrix: Tensor, seen: InputStatistics | None) -> Tensor:
        weight = quantize_weight(InMemory(matrix), config, form, tensor=name, linear=name, device=device, seen=seen)
        return weight.dequantized().to(device)

    if config.method == "ssz" and SszOptions.of(config.ext).weighted:

        def each(rows: Tensor, columns: Tensor) -> Tensor:
            seen = [InputStatistics(channels=channels.rescaled(scale.cpu())) for scale in columns]
            return torch.stack([quantized(*pair) for pair in zip(rows, seen, strict=True)])

        return each
    return lambda rows, _columns: quantized(rows.flatten(0, 1), None).view(rows.shape)
