"""Quantized linears against integer arithmetic written out here, bit for bit before the output cast."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slim_core.quantization.kinds import LayerKind
from slim_core.quantization.layers import DynamicInt, SimulatedLinear, StaticInt8, WeightOnlyInt
from slim_core.savers.layer_parts import encode_deq_scale
from slim_core.savers.quantized_folder import decode_deq_scale

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(5, 24), (2, 3, 24), (1, 1, 24), (0, 24), (1, 0, 24), (0, 4, 24)]
OUT, IN = 7, 24
F32 = np.float32


def codes(seed: int = 0) -> Tensor:
    return torch.randint(-128, 128, (OUT, IN), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def positive(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 0.01 + 1e-4


def activations(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 2).to(dtype)


def bias_of(dtype: torch.dtype) -> Tensor:
    return torch.randn(OUT, generator=torch.Generator().manual_seed(3)).to(dtype)


def dynamic(bias: Tensor | None = None) -> DynamicInt:
    return DynamicInt(codes(), positive(OUT, 1), torch.zeros(OUT, 1), bias)


def as_output(y: np.ndarray, x: Tensor) -> Tensor:
    return torch.from_numpy(y.astype(F32)).to(x.dtype).reshape(*x.shape[:-1], OUT)


def flat(x: Tensor) -> np.ndarray:
    return x.reshape(-1, x.shape[-1]).float().numpy()


def naive_static(layer: StaticInt8, x: Tensor) -> Tensor:
    scale, offset = F32(float(layer.input_scale)), F32(float(layer.input_offset))
    rows = np.clip(np.round(flat(x) / scale + offset), -128, 127).astype(np.int64)
    total = np.zeros((len(rows), OUT), dtype=np.int64)
    weight = layer.weight.numpy().astype(np.int64)
    for o in range(OUT):
        for t in range(len(rows)):
            total[t, o] = sum(int(a) * int(b) for a, b in zip(rows[t], weight[o], strict=True))
    total += layer.quant_bias.numpy().astype(np.int64)
    return as_output(total.astype(F32) * layer.deq_scale.numpy(), x)


def naive_dynamic(layer: DynamicInt, x: Tensor) -> Tensor:
    rows = flat(x)
    y = np.zeros((len(rows), OUT), dtype=F32)
    weight = layer.weight.numpy().astype(np.int64)
    for t, row in enumerate(rows):
        scale = max(F32(np.abs(row).max()) / F32(127), F32(torch.finfo(torch.float32).eps))
        quantized = np.clip(np.round(row / scale), -128, 127).astype(np.int64)
        y[t] = (weight @ quantized).astype(F32) * scale * layer.weight_scale.numpy()[:, 0]
    if layer.bias is not None:
        y = y + layer.bias.float().numpy()
    return as_output(y, x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("offset", [0, -128, 127, 13])
@pytest.mark.parametrize("with_bias", [True, False])
def test_static(dtype: torch.dtype, shape: tuple[int, ...], offset: int, with_bias: bool) -> None:
    layer = StaticInt8.build(
        codes(),
        positive(OUT),
        torch.tensor([0.02]),
        torch.tensor([float(offset)]),
        bias_of(dtype) if with_bias else None,
    )
    x = activations(shape, dtype)
    before = x.clone()
    y = layer.simulate(x)
    assert y.dtype == dtype
    assert torch.equal(y, naive_static(layer, x))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_dynamic(dtype: torch.dtype, shape: tuple[int, ...], with_bias: bool) -> None:
    layer = dynamic(bias_of(dtype) if with_bias else None)
    x = activations(shape, dtype)
    y = layer.simulate(x)
    assert y.dtype == dtype
    assert torch.equal(y, naive_dynamic(layer, x))


def test_dynamic_with_a_token_of_zeros() -> None:
    layer = dynamic(bias_of(torch.float32))
    x = activations((2, IN), torch.float32)
    x[0] = 0
    assert torch.equal(layer.simulate(x)[0], bias_of(torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [True, False])
def test_weight_only(dtype: torch.dtype, shape: tuple[int, ...], with_bias: bool) -> None:
    offset = torch.arange(-3.0, 4.0).reshape(OUT, 1)
    bias = bias_of(torch.float32) if with_bias else None
    layer = WeightOnlyInt(codes(), positive(OUT, 1), offset, bias)
    x = activations(shape, dtype)
    weight = (codes().numpy().astype(F32) - offset.numpy()) * positive(OUT, 1).numpy()
    assert np.array_equal(layer.dequantized().numpy(), weight)
    want = torch.nn.functional.linear(x, torch.from_numpy(weight).to(dtype), None if bias is None else bias.to(dtype))
    y = layer.simulate(x)
    assert y.dtype == dtype
    assert torch.equal(y, want)


def test_kinds_and_dequantized_weights() -> None:
    scale = positive(OUT, 1)
    static = StaticInt8.build(codes(), scale.flatten(), torch.tensor([0.25]), torch.tensor([3.0]), None)
    layer = dynamic()
    assert (static.kind, layer.kind) == (LayerKind.W8A8, LayerKind.W8A8_DYNAMIC)
    assert WeightOnlyInt(codes(), scale, torch.zeros_like(scale)).kind is LayerKind.W8A16
    assert torch.equal(layer.dequantized(), codes().float() * scale)
    assert torch.equal(static.dequantized(), layer.dequantized())  # 0.25 is a power of two: nothing is rounded
    with pytest.raises(FrozenInstanceError):
        static.bias = None  # pyright: ignore


def test_simulated_linear_stands_in_for_the_float_one() -> None:
    layer = dynamic()
    x = activations((3, IN), torch.float32)
    assert torch.equal(SimulatedLinear(layer)(x), layer.simulate(x))


@given(
    st.integers(-128, 127),
    st.floats(2.0**-20, 10, width=32),
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=OUT, max_size=OUT),
)
def test_quant_bias_is_rounded_once(offset: int, input_scale: float, bias: list[float]) -> None:
    layer = StaticInt8.build(
        codes(), positive(OUT), torch.tensor([input_scale]), torch.tensor([float(offset)]), torch.tensor(bias)
    )
    deq = np.float32(input_scale) * positive(OUT).numpy()
    assert np.array_equal(layer.deq_scale.numpy(), deq)
    exact = np.float32(bias).astype(np.float64) / deq.astype(np.float64)
    exact -= offset * codes().numpy().astype(np.int64).sum(1)
    want = np.clip(np.round(exact), -(2**31), 2**31 - 1)
    assert np.array_equal(layer.quant_bias.numpy(), want.astype(np.int32))
    assert layer.quant_bias.dtype == torch.int32


class TestWorkedNumbers:
    """The numbers of the format's description."""

    WEIGHT = torch.tensor([[10, -20, 30], [-5, 0, 127]], dtype=torch.int8)

    def layer(self) -> StaticInt8:
        return StaticInt8.build(
            self.WEIGHT,
            torch.tensor([0.004, 0.005]),
            torch.tensor([0.02]),
            torch.tensor([-7.0]),
            torch.tensor([0.5, -0.25]),
        )

    def test_end_to_end(self) -> None:
        layer = self.layer()
        assert layer.deq_scale.tolist() == pytest.approx([8e-5, 1e-4], rel=1e-6)
        assert layer.quant_bias.tolist() == [6390, -1646]
        y = layer.simulate(torch.tensor([[0.3, -1.1, 0.72]]))
        assert y.tolist()[0] == pytest.approx([0.6864, 0.1997], rel=1e-6)
        float_weight = self.WEIGHT.float() * torch.tensor([[0.004], [0.005]])
        exact = torch.tensor([0.3, -1.1, 0.72]) @ float_weight.T + torch.tensor([0.5, -0.25])
        assert y.tolist()[0] == pytest.approx(exact.tolist(), rel=1e-5)

    def test_deq_scale_as_int64(self) -> None:
        assert encode_deq_scale(self.layer().deq_scale, torch.int64).tolist() == [950519213, 953267991]

    @pytest.mark.parametrize(("value", "stored"), [(0.0005, 973279855), (1.0, 1065353216), (2.0**-13, 956301312)])
    def test_encodings(self, value: float, stored: int) -> None:
        encoded = encode_deq_scale(torch.tensor([value]), torch.int64)
        assert encoded.dtype == torch.int64
        assert encoded.tolist() == [stored]


@given(st.lists(st.floats(2.0**-100, 2.0**100, width=32), min_size=1, max_size=5))
def test_deq_scale_survives_its_encoding(values: list[float]) -> None:
    scale = torch.tensor(values)
    assert torch.equal(decode_deq_scale(encode_deq_scale(scale, torch.int64)), scale)
    assert torch.equal(decode_deq_scale(encode_deq_scale(scale, torch.float32)), scale)
    assert int(encode_deq_scale(scale, torch.int64).min()) > 0
