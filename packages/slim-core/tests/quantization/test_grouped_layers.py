"""Integer layers with groups, offsets, two levels of scales and four-bit activations against integer arithmetic in
Python's own integers; and the two phases of a mixed layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from slim_core.quantization.kinds import LayerKind
from slim_core.quantization.layers import DynamicInt, MixedInt8, StaticInt8, WeightOnlyInt

OUT, IN = 5, 24
F32 = np.float32
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes(bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    return torch.randint(-half, half, (OUT, IN), generator=generator(0), dtype=torch.int8)


def scales(groups: int) -> Tensor:
    return torch.rand(OUT, groups, generator=generator(1)) * 0.01 + 1e-4


def offsets(groups: int, bits: int, symmetric: bool) -> Tensor:
    half = 2 ** (bits - 1)
    drawn = torch.randint(-half, half, (OUT, groups), generator=generator(2)).float()
    return drawn * (not symmetric)


def naive_dynamic(layer: DynamicInt, x: Tensor) -> Tensor:
    """Group after group, every product and sum in Python's integers."""
    top = 2 ** (layer.act_bits - 1) - 1
    scale = layer.weight_scale.numpy()
    if layer.second_scale is not None:
        scale = scale * layer.second_scale.numpy()
    width, result = IN // scale.shape[1], np.zeros((len(x), OUT), F32)
    for t, row in enumerate(x.float().numpy()):
        token = max(F32(np.abs(row).max()) / F32(top), F32(torch.finfo(torch.float32).eps))
        quantized = [int(value) for value in np.clip(np.round(row / token), -top - 1, top)]
        for o in range(OUT):
            y = F32(0)
            for group in range(scale.shape[1]):
                columns = range(group * width, (group + 1) * width)
                offset = int(layer.weight_offset[o, group])
                total = sum(quantized[i] * (int(layer.weight[o, i]) - offset) for i in columns)
                part = F32(F32(F32(total) * token) * scale[o, group])
                y = part if not group else F32(y + part)
            result[t, o] = y
    if layer.bias is not None:
        result = result + layer.bias.float().numpy()
    return torch.from_numpy(result).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("weight_bits", "act_bits"), [(8, 8), (4, 8), (4, 4)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_dynamic(
    dtype: torch.dtype, groups: int, symmetric: bool, weight_bits: int, act_bits: int, with_bias: bool
) -> None:
    bias = torch.randn(OUT, generator=generator(3)).to(dtype) if with_bias else None
    layer = DynamicInt(
        codes(weight_bits),
        scales(groups),
        offsets(groups, weight_bits, symmetric),
        bias,
        weight_bits=weight_bits,
        act_bits=act_bits,
    )
    assert layer.kind == f"W{weight_bits}A{act_bits}_DYNAMIC"
    x = (torch.randn(4, IN, generator=generator(4)) * 2).to(dtype)
    assert torch.equal(layer.simulate(x), naive_dynamic(layer, x))
    weight = np.repeat(layer.weight_scale.numpy(), IN // groups, 1)
    weight = (layer.weight.numpy() - np.repeat(layer.weight_offset.numpy(), IN // groups, 1)) * weight
    assert np.array_equal(layer.dequantized().numpy(), weight.astype(F32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_levels_of_scales(dtype: torch.dtype) -> None:
    layer = DynamicInt.two_level(codes(4), scales(3), None)
    assert layer.kind is LayerKind.W4A8_DYNAMIC
    assert layer.second_scale is not None
    x = (torch.randn(4, IN, generator=generator(4)) * 2).to(dtype)
    assert torch.equal(layer.simulate(x), naive_dynamic(layer, x))
    assert torch.allclose(layer.scale, scales(3), rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("groups", [1, 3, 12])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weight_only(dtype: torch.dtype, bits: int, groups: int, symmetric: bool) -> None:
    scale, offset = scales(groups), offsets(groups, bits, symmetric)
    layer = WeightOnlyInt(codes(bits), scale, offset, None, bits)
    assert layer.kind == f"W{bits}A16"
    weight = np.zeros((OUT, IN), F32)
    for o in range(OUT):
        for i in range(IN):
            group = i * groups // IN
            weight[o, i] = F32(int(layer.weight[o, i]) - int(offset[o, group])) * scale[o, group].numpy()
    x = torch.randn(4, IN, generator=generator(4)).to(dtype)
    assert torch.equal(layer.simulate(x), torch.nn.functional.linear(x, torch.from_numpy(weight).to(dtype)))
    assert np.array_equal(layer.dequantized().numpy(), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_mixed_layer_is_dynamic_in_prefill_and_static_in_decode(dtype: torch.dtype, with_bias: bool) -> None:
    bias = torch.randn(OUT, generator=generator(3)).to(dtype) if with_bias else None
    scale = scales(1)
    static = StaticInt8.build(codes(8), scale.flatten(), torch.tensor([0.02]), torch.tensor([-7.0]), bias)
    layer = MixedInt8(static, scale)
    assert layer.kind is LayerKind.W8A8_MIX
    x = (torch.randn(4, IN, generator=generator(4)) * 2).to(dtype)
    prefill = DynamicInt(codes(8), scale, torch.zeros_like(scale), bias)
    assert torch.equal(layer.simulate(x), naive_dynamic(prefill, x))
    decode = replace(layer, phase="decode").simulate(x)
    assert torch.equal(decode, static.simulate(x))
    assert not torch.equal(decode, layer.simulate(x))
