"""FP8 and microscaling layers against naive float64 arithmetic."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from torch import Tensor

from slim_core.quantization.building import build_layer
from slim_core.quantization.floating import SMALLEST_SCALE
from slim_core.quantization.kinds import LayerKind, layer_form
from slim_core.quantization.layers import Fp8Dynamic, MxDynamic, QuantizedLinear, SimulatedLinear
from slim_core.quantization.methods import quantize_weight
from slim_core.quantization.microscaling import dual_scale_activations, mxfp4_activations, mxfp8_activations
from slim_core.quantization.statistics import InputStatistics
from slim_core.recipe import LinearQConfig

OUT = 5
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3, 64), (2, 3, 64), (1, 1, 2, 64), (0, 64), (2, 0, 64), (64,)]
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
E2M1 = torch.cat([E2M1, -E2M1])
QCONFIGS = {
    LayerKind.WFP8AFP8_DYNAMIC: ("fp8_e4m3 per_token", "fp8_e4m3 per_channel minmax"),
    LayerKind.W8A8_MXFP8: ("mxfp8 per_block", "mxfp8 per_block mse_round"),
    LayerKind.W4A8_MXFP: ("mxfp8 per_block", "mxfp4 per_block fouroversix"),
    LayerKind.W4A4_MXFP4: ("mxfp4 per_block", "mxfp4 per_block minmax"),
    LayerKind.W4A4_MXFP4_DUALSCALE: ("mxfp4 dual_scale dualscale", "mxfp4 dual_scale dualscale"),
}
every_kind = pytest.mark.parametrize("kind", list(QCONFIGS))


class Rows:
    """A matrix in memory."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.shape = tuple(matrix.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.matrix[start:stop]


def qconfig(kind: LayerKind) -> LinearQConfig:
    blocks = {}
    for side, text in zip(("act", "weight"), QCONFIGS[kind], strict=True):
        dtype, scope, *method = text.split()
        blocks[side] = {"dtype": dtype, "scope": scope, "method": method[0] if method else "minmax"}
    if kind is LayerKind.W4A4_MXFP4_DUALSCALE:
        blocks["weight"]["ext"] = {"dual_block_size": 32}
    return LinearQConfig.model_validate(blocks)


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer_of(kind: LayerKind, width: int = 64, bias: Tensor | None = None) -> QuantizedLinear:
    """A layer made of a Gaussian weight, the way the processors make it."""
    config = qconfig(kind)
    form = layer_form(config)
    weight = quantize_weight(
        Rows(gaussian(OUT, width, dtype=torch.bfloat16)), config.weight, form, tensor="w", linear="l"
    )
    seen = InputStatistics()
    layer = build_layer(form, weight, config.act, seen=seen, bias=bias, name="l", dtype=torch.bfloat16)
    assert layer.kind is form.kind is kind
    assert torch.equal(layer.dequantized(), weight.dequantized())
    return layer


def naive_weight(layer: QuantizedLinear) -> Tensor:
    """The weight in float64, from the fields of the layer."""
    if isinstance(layer, Fp8Dynamic):
        return E4M3[layer.weight.view(torch.uint8).int()] * layer.weight_scale.double()
    assert isinstance(layer, MxDynamic)
    table = E2M1 if layer.weight.dtype == torch.uint8 else E4M3
    out = table[layer.weight.view(torch.uint8).int()]
    for row in range(out.shape[0]):
        for column in range(out.shape[1]):
            out[row, column] *= 2.0 ** (int(layer.exponents[row, column // 32]) - 127)
            if layer.outer is not None:
                out[row, column] *= float(layer.outer[row, column * layer.outer.shape[1] // out.shape[1], 0])
    return out


def naive_activations(kind: LayerKind, x: Tensor) -> Tensor:
    """The activations in float64 as the target has them. Their rounding is tested on its own."""
    if kind is LayerKind.WFP8AFP8_DYNAMIC:
        rows = []
        for row in x.float():
            scale = (row.abs().max() / 448).clamp(min=SMALLEST_SCALE)
            rows.append((row / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale.double())
        return torch.stack(rows) if rows else x.double()
    if kind is LayerKind.W4A4_MXFP4_DUALSCALE:
        values, outer = dual_scale_activations(x, 32)
        return values.double() * outer.double().repeat_interleave(32, 1)
    return (mxfp4_activations if kind is LayerKind.W4A4_MXFP4 else mxfp8_activations)(x).double()


@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_simulation(kind: LayerKind, dtype: torch.dtype, shape: tuple[int, ...], with_bias: bool) -> None:
    bias = gaussian(OUT, dtype=dtype, seed=5) if with_bias else None
    layer = layer_of(kind, bias=bias)
    x = gaussian(*shape, dtype=dtype, seed=7) * 3
    before = x.clone()
    y = layer.simulate(x)
    assert (y.dtype, y.shape) == (dtype, (*shape[:-1], OUT))
    assert torch.equal(x, before)
    assert torch.equal(SimulatedLinear(layer)(x), y)
    rows = naive_activations(kind, x.reshape(-1, 64))
    weight = naive_weight(layer)
    exact = rows @ weight.T + (bias.double() if bias is not None else 0)
    room = (rows.abs() @ weight.abs().T) * 64 * 2**-24 + exact.abs() * (torch.finfo(dtype).eps / 2 + 2**-22) + 1e-7
    assert bool(((y.reshape(-1, OUT).double() - exact).abs() <= room).all())


@every_kind
def test_the_weight_is_that_of_its_fields(kind: LayerKind) -> None:
    layer = layer_of(kind)
    assert torch.allclose(layer.dequantized().double(), naive_weight(layer), rtol=1e-7, atol=0)
    with pytest.raises(FrozenInstanceError):
        layer.bias = None  # pyright: ignore


@every_kind
def test_the_simulation_is_near_the_float_layer(kind: LayerKind) -> None:
    """The noise of the formats, known to a few decibels: what it would be with a defect is far away."""
    layer = layer_of(kind)
    x = gaussian(200, 64, dtype=torch.bfloat16, seed=3)
    exact = x.double() @ gaussian(OUT, 64, dtype=torch.bfloat16).double().T
    noise = (layer.simulate(x.float()).double() - exact).norm() / exact.norm()
    low, high = {8: (0.02, 0.06), 4: (0.1, 0.2)}[kind.weight_bits]
    assert low < float(noise) < high


@pytest.mark.parametrize("kind", [LayerKind.W8A8_MXFP8, LayerKind.W4A8_MXFP, LayerKind.W4A4_MXFP4])
def test_widths_that_are_no_multiple_of_a_block(kind: LayerKind) -> None:
    layer = layer_of(kind, width=40)
    x = gaussian(4, 40, seed=2)
    exact = naive_activations(kind, x) @ naive_weight(layer).T
    assert torch.allclose(layer.simulate(x).double(), exact, rtol=1e-5, atol=1e-5)


@every_kind
def test_tokens_do_not_touch_each_other(kind: LayerKind) -> None:
    layer = layer_of(kind, bias=gaussian(OUT))
    x = gaussian(4, 64)
    x[2] = 0
    y = layer.simulate(x)
    assert torch.equal(y[2], gaussian(OUT))
    other = x.clone()
    other[0] *= 50
    assert torch.equal(layer.simulate(other)[1:], y[1:])


@every_kind
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(kind: LayerKind, bad: float) -> None:
    x = gaussian(2, 64)
    x[0, 3] = bad
    y = layer_of(kind).simulate(x)
    assert bool(y[0].isnan().all())
    assert bool(y[1].isfinite().all())


@every_kind
def test_fields_are_tensors_that_can_be_moved(kind: LayerKind) -> None:
    layer = layer_of(kind, bias=gaussian(OUT))
    values = [getattr(layer, field.name) for field in fields(layer)]  # pyright: ignore
    assert all(isinstance(value, Tensor | LayerKind | None) for value in values)
    assert layer.weight.shape == (OUT, 64)
    assert layer.weight.dtype == (torch.uint8 if kind.weight_bits == 4 else torch.float8_e4m3fn)
