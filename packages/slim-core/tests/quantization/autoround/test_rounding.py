"""Rounding with learned parameters, against float64 and against automatic differentiation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slim_core.quantization.affine import by_groups, dequantize_groups
from slim_core.quantization.autoround.rounding import (
    WeightGrid,
    WeightRange,
    fake_quantized,
    gradients,
    round_weight,
    scale_and_offset,
)
from slim_core.quantization.methods.minmax import minmax_weight
from slim_core.quantization.weights import InMemory

GRIDS = [WeightGrid(bits, symmetric) for bits in (4, 8) for symmetric in (True, False)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, low: float, high: float, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * (high - low) + low


def extremes(weight: Tensor, alpha: Tensor | None = None, beta: Tensor | None = None) -> WeightRange:
    low = weight.amin(-1, keepdim=True).float().clamp(max=0.0)
    high = weight.amax(-1, keepdim=True).float().clamp(min=0.0)
    return WeightRange(low, high, *(torch.ones_like(low) if f is None else f for f in (alpha, beta)))


def naive(weight: Tensor, span: WeightRange, shift: Tensor, grid: WeightGrid) -> tuple[np.ndarray, ...]:
    """Fake-quantized weight, scale and offset, from the formulas in float64."""
    w, v = weight.double().numpy(), shift.double().numpy()
    low, high = (t.double().numpy() for t in (span.low * span.alpha, span.high * span.beta))
    half = 2 ** (grid.bits - 1)
    if grid.symmetric:
        s = np.maximum(np.maximum(-low, high) / (half - 1), 2.0**-23)
        z = np.zeros_like(s)
    else:
        s = np.maximum((high - low) / (2 * half - 1), 2.0**-23)
        z = np.round(-low / s) - half
    return (np.clip(np.round(w / s + z + v), -half, half - 1) - z) * s, s, z


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 9), (3, 4, 8)])
def test_equals_naive_float64(grid: WeightGrid, shape: tuple[int, int, int]) -> None:
    weight = random(*shape)
    alpha, beta = (uniform(*shape[:2], 1, low=0.3, high=1.0, seed=seed) for seed in (1, 2))
    shift = uniform(*shape, low=-0.5, high=0.5, seed=3)
    span = extremes(weight, alpha, beta)
    want, s, z = naive(weight, span, shift, grid)
    scale, offset = scale_and_offset(span, grid)
    assert np.allclose(scale.numpy(), s, rtol=1e-6)
    assert np.array_equal(offset.numpy(), z)
    assert np.abs(fake_quantized(weight, span, shift, grid).numpy() - want).max() < 1e-5


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=12, max_size=12),
    st.sampled_from(GRIDS),
    st.sampled_from([0, 2, 3]),
)
def test_untouched_it_is_minmax(values: list[float], grid: WeightGrid, group_size: int) -> None:
    matrix = torch.tensor(values).reshape(2, 6)
    found = minmax_weight(InMemory(matrix), bits=grid.bits, symmetric=grid.symmetric, name="w", group_size=group_size)
    weight = by_groups(matrix, 6 // group_size if group_size else 1)
    span = extremes(weight)
    scale, offset = scale_and_offset(span, grid)
    assert torch.equal(scale.squeeze(2), found.scale)
    assert torch.equal(offset.squeeze(2), found.offset)
    assert torch.equal(round_weight(weight, scale, offset, None, grid).flatten(1).to(torch.int8), found.codes)
    assert torch.equal(fake_quantized(weight, span, torch.zeros(weight.shape), grid).flatten(1), found.dequantized())


@given(
    st.data(), st.sampled_from([4, 8]), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
)
def test_what_is_written_fits(data: st.DataObject, bits: int, symmetric: bool, scale_dtype: torch.dtype) -> None:
    """Codes and offsets fit their container, scales are positive numbers of their dtype, zero stays zero."""
    numbers = st.floats(-1e3, 1e3, width=32)
    weight = torch.tensor(data.draw(st.lists(numbers, min_size=8, max_size=8))).reshape(2, 1, 4)
    weight[0, 0, 0] = 0.0
    factors = st.floats(0, 1, width=32)
    alpha, beta = (torch.tensor(data.draw(st.lists(factors, min_size=2, max_size=2))).reshape(2, 1, 1) for _ in "ab")
    grid = WeightGrid(bits, symmetric, scale_dtype)
    span = extremes(weight, alpha, beta)
    scale, offset = scale_and_offset(span, grid)
    half = 2 ** (bits - 1)
    assert bool((scale > 0).all())
    assert torch.equal(scale.to(scale_dtype).float(), scale)
    assert torch.equal(offset.round().clamp(-half, half - 1), offset)
    assert not (symmetric and bool(offset.any()))
    codes = round_weight(weight, scale, offset, None, grid)
    assert torch.equal(codes.round().clamp(-half, half - 1), codes)
    assert float(((codes - offset) * scale)[0, 0, 0]) == 0.0


def straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def differentiable(weight: Tensor, low: Tensor, high: Tensor, parameters: Any, grid: WeightGrid) -> Tensor:
    """The formulas of the module's docstring, for autograd."""
    shift, alpha, beta = parameters
    half = 2 ** (grid.bits - 1)
    if grid.symmetric:
        s, z = torch.maximum(-low * alpha, high * beta) / (half - 1), torch.zeros_like(low)
    else:
        s = (high * beta - low * alpha) / (2 * half - 1)
        z = straight_through(-low * alpha / s) - half
    return (straight_through(weight / s + z + shift).clamp(-half, half - 1) - z) * s


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("factors", [(0.2, 0.6), (0.8, 1.0)])
def test_gradients_are_those_of_autograd(grid: WeightGrid, seed: int, factors: tuple[float, float]) -> None:
    """Small factors clip many weights, which is where the gradients differ from the plain ones."""
    shape = (4, 3, 16)
    weight, upstream = random(*shape, seed=seed), random(*shape, seed=seed + 50)
    alpha, beta = (uniform(4, 3, 1, low=factors[0], high=factors[1], seed=seed + k) for k in (10, 20))
    shift = uniform(*shape, low=-0.5, high=0.5, seed=seed + 30)
    span = extremes(weight, alpha, beta)
    parameters = [part.double().requires_grad_() for part in (shift, alpha, beta)]
    value = differentiable(weight.double(), span.low.double(), span.high.double(), parameters, grid)
    want = torch.autograd.grad(value, parameters, upstream.double())
    found = gradients(weight, span, shift, grid, upstream)
    for have, should in zip((found.shift, found.alpha, found.beta), want, strict=True):
        assert torch.allclose(have.double(), should, rtol=1e-4, atol=1e-4)


@settings(max_examples=25)
@given(st.sampled_from([torch.bfloat16, torch.float16]), st.sampled_from(GRIDS), st.integers(0, 1000))
def test_half_precision_weights_are_their_upcast(dtype: torch.dtype, grid: WeightGrid, seed: int) -> None:
    weight = random(3, 2, 8, seed=seed).to(dtype)
    span, upstream, shift = extremes(weight), random(3, 2, 8, seed=seed + 1), uniform(3, 2, 8, low=-0.5, high=0.5)
    assert torch.equal(extremes(weight.float()).low, span.low)
    assert torch.equal(fake_quantized(weight, span, shift, grid), fake_quantized(weight.float(), span, shift, grid))
    half, full = (gradients(w, span, shift, grid, upstream) for w in (weight, weight.float()))
    for name in ("shift", "alpha", "beta"):
        assert torch.equal(getattr(half, name), getattr(full, name))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_nothing_is_modified(grid: WeightGrid) -> None:
    parts = [random(3, 2, 8), random(3, 2, 8, seed=1), uniform(3, 2, 8, low=-0.5, high=0.5)]
    before = [part.clone() for part in parts]
    weight, upstream, shift = parts
    span = extremes(weight)
    fake_quantized(weight, span, shift, grid)
    gradients(weight, span, shift, grid, upstream)
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))
    assert torch.equal(span.alpha, torch.ones(3, 2, 1))


def test_worked_asymmetric_range() -> None:
    """-1..3 in four bits: a step of 4/15, the zero at code 4 - 8."""
    weight = torch.tensor([[[-1.0, 0.0, 0.3, 3.0]]])
    grid, span = WeightGrid(4, symmetric=False), extremes(weight)
    scale, offset = scale_and_offset(span, grid)
    assert float(scale) == pytest.approx(4 / 15)
    assert float(offset) == -4
    assert round_weight(weight, scale, offset, None, grid).tolist() == [[[-8.0, -4.0, -3.0, 7.0]]]
    halved = extremes(weight, beta=torch.full((1, 1, 1), 0.5))
    assert float(scale_and_offset(halved, grid)[0]) == pytest.approx(2.5 / 15)
    assert dequantize_groups(torch.tensor([[-8]], dtype=torch.int8), scale[0], offset[0]) == pytest.approx(-16 / 15)
