"""Quantized linears whose input is scaled first."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slim_core.quantization.affine import quantize_per_token
from slim_core.quantization.kinds import LayerKind
from slim_core.quantization.layers import DynamicInt, ScaledInput, SimulatedLinear
from slim_core.runners.simulated import layer_to

GENERATOR = torch.Generator().manual_seed(0)
CODES = torch.randint(-127, 128, (5, 16), generator=GENERATOR, dtype=torch.int8)
SCALE = torch.rand(5, 1, generator=GENERATOR) * 0.01 + 1e-3
BIAS = torch.randn(5, generator=GENERATOR)
FACTOR = (torch.rand(16, generator=GENERATOR) * 3 + 0.01).bfloat16().float()


def layer() -> ScaledInput:
    return ScaledInput(DynamicInt(CODES, SCALE, torch.zeros(5, 1), BIAS), FACTOR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_input_is_multiplied_in_its_dtype_and_then_quantized(dtype: torch.dtype) -> None:
    x = (torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(1)) * 5).to(dtype)
    rows = (x.float() * FACTOR).to(dtype).reshape(-1, 16)
    want = torch.empty(len(rows), 5, dtype=torch.float64)
    for t, row in enumerate(rows.double()):
        scale = float(rows[t].float().abs().max()) / 127
        codes = [round(float(one) / scale) for one in row]
        for o in range(5):
            total = sum(code * int(weight) for code, weight in zip(codes, CODES[o], strict=True))
            want[t, o] = total * scale * float(SCALE[o]) + float(BIAS[o])
    got = layer().simulate(x)
    assert got.dtype == dtype
    assert torch.allclose(got.double().reshape(-1, 5), want, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-4)
    codes, _ = quantize_per_token(rows, 8)
    assert int(codes.abs().max()) == 127


def test_what_it_says_of_itself_is_what_its_layer_says() -> None:
    one = layer()
    assert one.kind == LayerKind.W8A8_DYNAMIC
    assert one.weight is one.layer.weight
    assert one.bias is BIAS
    assert torch.equal(one.dequantized(), CODES.float() * SCALE * FACTOR)
    module = SimulatedLinear(one, torch.bfloat16)
    assert (module.out_features, module.in_features) == (5, 16)
    assert torch.equal(module.weight, one.dequantized().bfloat16())
    x = torch.randn(3, 16)
    assert torch.equal(module(x), one.simulate(x))


def test_all_of_it_moves_to_a_device() -> None:
    moved = layer_to(layer(), torch.device("meta"))
    assert isinstance(moved, ScaledInput)
    tensors: list[Tensor] = [moved.mul_scale, moved.weight, moved.layer.dequantized()]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert replace(moved, mul_scale=FACTOR).mul_scale is FACTOR
