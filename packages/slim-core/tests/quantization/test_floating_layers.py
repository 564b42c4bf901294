"""FP8 and microscaling layers against naive float64 arithmetic."""

from __future__ import annotations

import itertools
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
from slim_core.quantization.statistics import InputStatistics
from slim_core.quantization.weights import InMemory
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
# Activations of the MX kinds: magnitudes by code, the exponent of the largest power of two among them, and what
# becomes of a value half-way between two of them.
E4M3_MAGNITUDES = tuple(m * 2.0**-9 if not e else (8 + m) * 2.0 ** (e - 10) for e in range(16) for m in range(8))[:-1]
E2M1_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MX_RULES: dict[LayerKind, tuple[tuple[float, ...], int, str]] = {
    LayerKind.W8A8_MXFP8: (E4M3_MAGNITUDES, 8, "even"),
    LayerKind.W4A8_MXFP: (E4M3_MAGNITUDES, 8, "even"),
    LayerKind.W4A4_MXFP4: (E2M1_MAGNITUDES, 2, "away"),
    LayerKind.W4A4_MXFP4_DUALSCALE: (E2M1_MAGNITUDES, 2, "even"),
}
every_kind = pytest.mark.parametrize("kind", list(QCONFIGS))


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
        InMemory(gaussian(OUT, width, dtype=torch.bfloat16)), config.weight, form, tensor="w", linear="l"
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


def nearest(value: float, magnitudes: tuple[float, ...], ties: str) -> float:
    """The number of the format next to a float64 value; saturating."""
    size = min(abs(value), magnitudes[-1])
    above = next(code for code, one in enumerate(magnitudes) if one >= size)
    below = max(above - 1, 0)
    half = (magnitudes[below] + magnitudes[above]) / 2  # exact: both have few bits
    up = size > half or (size == half and (ties == "away" or above % 2 == 0))
    return math.copysign(magnitudes[above if up else below], value)


def naive_block(block: list[float], magnitudes: tuple[float, ...], largest_power: int, ties: str) -> list[float]:
    """Up to 32 values that share ``2^(floor(log2 m) - largest_power)``, at least 2^-127; float64 holds all of it."""
    largest = max(map(abs, block))
    if not largest:
        return [0.0] * len(block)
    power = -1074
    while 2.0 ** (power + 1) <= largest:
        power += 1
    scale = 2.0 ** max(power - largest_power, -127)
    return [nearest(value / scale, magnitudes, ties) * scale for value in block]


def naive_activations(kind: LayerKind, x: Tensor) -> Tensor:
    """The activations ``(tokens, channels)`` in float64 as the target has them."""
    rows: list[list[float]] = []
    for row in x.float():
        if kind is LayerKind.WFP8AFP8_DYNAMIC:
            scale = (row.abs().max() / 448).clamp(min=SMALLEST_SCALE)
            rows.append([nearest(one, E4M3_MAGNITUDES, "even") * float(scale) for one in (row / scale).tolist()])
            continue
        found: list[float] = []
        for part in row.split(32):
            outer = 1.0
            if kind is LayerKind.W4A4_MXFP4_DUALSCALE:  # what the outer scale leaves is in the activations' dtype
                divisor = (part.abs().max() / 6).clamp(min=SMALLEST_SCALE)
                part, outer = (part / divisor).to(x.dtype), float(divisor)
            found += [one * outer for one in naive_block(part.tolist(), *MX_RULES[kind])]
        rows.append(found)
    return torch.tensor(rows, dtype=torch.float64).reshape(x.shape)


def identity(kind: LayerKind) -> MxDynamic:
    """A layer of 32 channels whose weight is the identity: its outputs are its activations as it quantizes them."""
    four = kind.weight_bits == 4
    eye = torch.eye(32).to(torch.uint8) * 2 if four else torch.eye(32).to(torch.float8_e4m3fn)
    outer = torch.ones(32, 1, 1) if kind is LayerKind.W4A4_MXFP4_DUALSCALE else None
    return MxDynamic(kind, eye, torch.full((32, 1), 127, dtype=torch.uint8), None, outer)


def adversarial(kind: LayerKind) -> Tensor:
    """Blocks of 32: every tie and the float32 numbers beside it at several scales, powers of two and the numbers beside
    them, mantissas that saturate, tiny values, subnormal ones, and zeros."""
    magnitudes = MX_RULES[kind][0]
    ties = [(one + other) / 2 for one, other in itertools.pairwise(magnitudes)]
    points = torch.tensor(sorted({*ties, *magnitudes[:-1], magnitudes[-1]}))
    beside = torch.cat([points, *(torch.nextafter(points, torch.tensor(to)) for to in (0.0, math.inf))])
    beside = torch.cat([beside, -beside])
    # The largest value of a block decides its exponent: here it is the format's own largest, which makes it 0.
    filler = torch.zeros(-len(beside) % 31)
    blocks = torch.cat([beside, filler]).reshape(-1, 31)
    lead = torch.full((len(blocks), 1), magnitudes[-1])
    whole = torch.cat([lead, blocks], 1)
    scaled = [whole * 2.0**power for power in (0, 1, -9, 40, -66)]
    powers = 2.0 ** torch.arange(-60.0, 61.0, 5.0)
    edges = torch.cat([powers, *(torch.nextafter(powers, torch.tensor(to)) for to in (0.0, math.inf))])
    edges = torch.cat([edges, edges * 1.75, edges * (2 - 2.0**-20), edges * 1.5])  # these saturate, these are halves
    random = gaussian(len(edges), 31, seed=4)
    led = torch.cat([edges[:, None], random.clamp(-1, 1) * edges[:, None]], 1)
    tiny = torch.stack([gaussian(32, seed=5) * 1e-20, gaussian(32, seed=6) * 1e-30, gaussian(32, seed=7) * 1e-38])
    tiny = torch.cat([tiny, torch.full((1, 32), 2.0**-149), -torch.zeros(1, 32), torch.zeros(1, 32)])
    return torch.cat([*scaled, led, tiny, gaussian(64, 32, seed=8), gaussian(16, 32, seed=9) * 1e20])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", MX_RULES)
def test_activations_of_layers_at_ties_edges_and_extremes(kind: LayerKind, dtype: torch.dtype) -> None:
    """Through the layer and value by value: with the identity as the weight, no product and no sum rounds."""
    x = adversarial(kind).to(dtype)
    x = x[x.isfinite().all(1)]
    assert len(x) > 100
    layer = identity(kind)
    assert torch.equal(layer.dequantized(), torch.eye(32))
    exact = naive_activations(kind, x)
    y = layer.simulate(x.float() if kind is not LayerKind.W4A4_MXFP4_DUALSCALE else x)
    if kind is LayerKind.W4A4_MXFP4_DUALSCALE:  # the outer scale is no power of two, so its product is rounded
        assert torch.equal(y, exact.float().to(dtype))
    else:
        assert torch.equal(y.double(), exact)
    assert torch.equal(layer.simulate(x), y.to(dtype))


@pytest.mark.parametrize(
    ("ties", "magnitudes", "values"),
    [
        ("away", E2M1_MAGNITUDES, {0.25: 0.5, 0.75: 1, 1.25: 1.5, 1.75: 2, 2.5: 3, 3.5: 4, 5.0: 6, -2.5: -3, 9.0: 6}),
        ("even", E2M1_MAGNITUDES, {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5.0: 4, -2.5: -2, 9.0: 6}),
        ("even", E4M3_MAGNITUDES, {17.0: 16, 19.0: 20, 464.0: 448, 2.0**-10: 0, 3 * 2.0**-10: 2.0**-8, -1e9: -448}),
    ],
)
def test_the_reference_itself(ties: str, magnitudes: tuple[float, ...], values: dict[float, float]) -> None:
    assert {value: nearest(value, magnitudes, ties) for value in values} == values
    assert (len(E4M3_MAGNITUDES), E4M3_MAGNITUDES[-1], E4M3_MAGNITUDES[1]) == (127, 448, 2.0**-9)


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
