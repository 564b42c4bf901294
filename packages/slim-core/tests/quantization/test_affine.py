"""Scale and offset maths: the invariants of the integer formats."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from slim_core.quantization.affine import EPSILON, affine_parameters, dequantize, quantize, quantize_per_token

FINITE = st.floats(-1e6, 1e6, width=32)
VALUES = st.lists(FINITE, min_size=1, max_size=24)
BITS = st.sampled_from([4, 8])
SYMMETRIC = st.booleans()
# Mantissas whose power-of-two multiples are exact and stay clear of the floor of the scale.
WHOLE = st.lists(st.integers(-1000, 1000), min_size=1, max_size=24).filter(any)


def parameters(x: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    return affine_parameters(x.min(), x.max(), bits, symmetric)


def fake_quantize(x: Tensor, scale: Tensor, offset: Tensor, bits: int) -> Tensor:
    return dequantize(quantize(x, scale, offset, bits), scale, offset)


@given(VALUES, BITS, SYMMETRIC)
def test_values_in_the_range_are_off_by_half_a_step_at_most(values: list[float], bits: int, symmetric: bool) -> None:
    x = torch.tensor(values)
    scale, offset = parameters(x, bits, symmetric)
    codes = quantize(x, scale, offset, bits)
    step = float(scale)
    assert math.isfinite(step)
    assert step >= EPSILON
    assert codes.dtype == torch.int8
    assert int(codes.min()) >= -(2 ** (bits - 1))
    assert int(codes.max()) < 2 ** (bits - 1)
    worst = float((dequantize(codes, scale, offset).double() - x.double()).abs().max())
    assert worst <= step * (0.5 + 2**bits * 2**-22)


@given(VALUES, BITS, SYMMETRIC)
def test_zero_is_represented_exactly(values: list[float], bits: int, symmetric: bool) -> None:
    scale, offset = parameters(torch.tensor(values), bits, symmetric)
    zero = quantize(torch.zeros(1), scale, offset, bits)
    assert float(zero) == float(offset)
    assert float(dequantize(zero, scale, offset)) == 0.0


@given(VALUES, BITS)
def test_offset_is_integral_and_a_code(values: list[float], bits: int) -> None:
    _, offset = parameters(torch.tensor(values), bits, symmetric=False)
    assert float(offset) == int(offset)
    assert -(2 ** (bits - 1)) <= int(offset) < 2 ** (bits - 1)


@given(VALUES, BITS)
def test_asymmetric_endpoints_take_the_end_codes(values: list[float], bits: int) -> None:
    x = torch.tensor([*values, 0.0])
    assume(float(x.max() - x.min()) > 1.0)
    scale, offset = parameters(x, bits, symmetric=False)
    codes = quantize(torch.stack([x.min(), x.max()]), scale, offset, bits)
    assert abs(int(codes[0]) + 2 ** (bits - 1)) <= 1
    assert abs(int(codes[1]) - (2 ** (bits - 1) - 1)) <= 1


@given(VALUES)
def test_symmetric_never_reaches_the_lowest_code(values: list[float]) -> None:
    x = torch.tensor(values)
    scale, offset = parameters(x, 8, symmetric=True)
    assert int(quantize(x, scale, offset, 8).min()) >= -127
    assert float(offset) == 0.0


@pytest.mark.parametrize(
    ("low", "high", "offset"),
    [(0.0, 3.0, -128), (0.5, 3.0, -128), (-3.0, 0.0, 127), (-3.0, -0.5, 127), (0.0, 0.0, -128), (1e-30, 2e-30, -128)],
)
def test_one_sided_ranges_put_zero_at_an_end(low: float, high: float, offset: int) -> None:
    scale, found = affine_parameters(torch.tensor([low]), torch.tensor([high]), 8, symmetric=False)
    assert int(found) == offset
    assert float(scale) == pytest.approx(max((max(high, 0) - min(low, 0)) / 255, EPSILON))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_of_nothing_but_zero_has_the_smallest_scale(symmetric: bool) -> None:
    x = torch.zeros(5)
    scale, offset = parameters(x, 8, symmetric)
    assert float(scale) == EPSILON
    assert torch.equal(fake_quantize(x, scale, offset, 8), x)


@pytest.mark.parametrize("value", [3.0, -3.0, 1e-3, -7e4])
@pytest.mark.parametrize("size", [1, 6])
@pytest.mark.parametrize("symmetric", [True, False])
def test_constant_tensors_come_back(value: float, size: int, symmetric: bool) -> None:
    x = torch.full((size,), value)
    scale, offset = parameters(x, 8, symmetric)
    assert torch.allclose(fake_quantize(x, scale, offset, 8), x, rtol=1e-6)


@given(WHOLE, st.integers(-12, 40), BITS, SYMMETRIC)
def test_powers_of_two_scale_the_step_and_leave_the_codes(
    values: list[int], power: int, bits: int, symmetric: bool
) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    scale, offset = parameters(x, bits, symmetric)
    scaled, moved = parameters(x * 2.0**power, bits, symmetric)
    assume(float(scale) * 2.0**power > EPSILON)
    assert float(scaled) == float(scale) * 2.0**power
    assert torch.equal(moved, offset)
    assert torch.equal(quantize(x * 2.0**power, scaled, moved, bits), quantize(x, scale, offset, bits))


@given(VALUES, BITS)
def test_negation_negates_symmetric_codes_and_mirrors_the_range(values: list[float], bits: int) -> None:
    x = torch.tensor(values)
    scale, zero = parameters(x, bits, symmetric=True)
    mirrored, _ = parameters(-x, bits, symmetric=True)
    assert torch.equal(scale, mirrored)
    assert torch.equal(quantize(-x, scale, zero, bits), -quantize(x, scale, zero, bits))
    scale, offset = parameters(x, bits, symmetric=False)
    mirrored, other = parameters(-x, bits, symmetric=False)
    assert torch.equal(scale, mirrored)
    assume(float(scale) > EPSILON)
    assert abs(int(offset) + int(other) + 1) <= 1  # z' = -1 - z, but for the rounding of z


@given(VALUES, BITS, SYMMETRIC)
def test_fake_quantization_is_idempotent(values: list[float], bits: int, symmetric: bool) -> None:
    x = torch.tensor(values)
    scale, offset = parameters(x, bits, symmetric)
    once = fake_quantize(x, scale, offset, bits)
    assert torch.equal(fake_quantize(once, scale, offset, bits), once)


@given(VALUES, SYMMETRIC)
def test_inputs_are_left_alone(values: list[float], symmetric: bool) -> None:
    x = torch.tensor(values)
    before = x.clone()
    low, high = x.min().reshape(1), x.max().reshape(1)
    scale, offset = affine_parameters(low, high, 8, symmetric)
    kept = scale.clone(), offset.clone()
    codes = quantize(x, scale, offset, 8)
    dequantize(codes, scale, offset)
    quantize_per_token(x.reshape(1, -1), 8)
    assert torch.equal(x, before)
    assert torch.equal(low[0], x.min())
    assert torch.equal(high[0], x.max())
    assert torch.equal(scale, kept[0])
    assert torch.equal(offset, kept[1])


@given(VALUES, st.sampled_from([torch.bfloat16, torch.float16]), SYMMETRIC)
def test_half_precision_is_worked_on_in_float32(values: list[float], dtype: torch.dtype, symmetric: bool) -> None:
    x = torch.tensor(values).clamp(-6e4, 6e4).to(dtype)
    half, full = parameters(x, 8, symmetric), parameters(x.float(), 8, symmetric)
    assert half[0].dtype == torch.float32
    assert torch.equal(half[0], full[0])
    assert torch.equal(half[1], full[1])
    assert torch.equal(quantize(x, *half, 8), quantize(x.float(), *full, 8))


@pytest.mark.parametrize(
    ("x", "code"), [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (-2.5, -2), (126.5, 126), (127.5, 127)]
)
def test_ties_go_to_the_even_code(x: float, code: int) -> None:
    assert int(quantize(torch.tensor([x]), torch.ones(1), torch.zeros(1), 8)) == code


def test_the_offset_is_added_before_rounding() -> None:
    assert int(quantize(torch.tensor([0.5]), torch.ones(1), torch.tensor([-3.0]), 8)) == -2


def test_worked_asymmetric_range() -> None:
    scale, offset = affine_parameters(torch.tensor([-1.2]), torch.tensor([3.0]), 8, symmetric=False)
    assert float(scale) == pytest.approx(4.2 / 255, rel=1e-6)
    assert int(offset) == -55


@given(st.lists(st.lists(FINITE, min_size=3, max_size=3), min_size=1, max_size=6), BITS, st.data())
def test_tokens_are_quantized_independently(rows: list[list[float]], bits: int, data: st.DataObject) -> None:
    x = torch.tensor(rows)
    codes, scale = quantize_per_token(x, bits)
    assert codes.shape == x.shape
    assert scale.shape == (len(rows), 1)
    order = data.draw(st.permutations(range(len(rows))))
    permuted, permuted_scale = quantize_per_token(x[order], bits)
    assert torch.equal(permuted, codes[order])
    assert torch.equal(permuted_scale, scale[order])
    changed = x.clone()
    changed[0] *= 3
    assert torch.equal(quantize_per_token(changed, bits)[0][1:], codes[1:])


def reference(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    largest = np.abs(x).max(-1, keepdims=True)
    scale = np.maximum(largest / np.float32(2 ** (bits - 1) - 1), np.float32(EPSILON)).astype(np.float32)
    return np.round(x / scale).astype(np.int8), scale


@given(st.lists(st.lists(FINITE, min_size=4, max_size=4), min_size=1, max_size=5))
def test_per_token_equals_a_naive_float32_computation(rows: list[list[float]]) -> None:
    x = np.array(rows, dtype=np.float32)
    codes, scale = quantize_per_token(torch.from_numpy(x), 8)
    want_codes, want_scale = reference(x, 8)
    assert np.array_equal(scale.numpy(), want_scale)
    assert np.array_equal(codes.numpy(), want_codes)


def test_no_tokens_at_all() -> None:
    codes, scale = quantize_per_token(torch.empty(0, 8), 8)
    assert codes.shape == (0, 8)
    assert scale.shape == (0, 1)
