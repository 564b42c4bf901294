"""Short mantissas, against a float64 computation number by number."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slim_core.sparsity import mantissa
from slim_core.sparsity.mantissa import reduce_mantissas

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHORT = {1.0, 1.25, 1.5, 1.75}


def naive(value: float, dtype: torch.dtype) -> float:
    """One number that is not protected."""
    m, e = math.frexp(value)
    m, e = m * 2, e - 1
    if value == 0 or e < -14:
        return 0.0
    if e < -8:
        return math.copysign((2.0 if abs(m) > 1.5 else 1.0) * 2.0**e, m)
    short = round(m * 4) / 4 * 2.0**e
    top = {torch.float16: 57344.0}.get(dtype, 1.75 * 2.0**127)
    return max(-top, min(top, short))


def matrix(rows: int = 20, columns: int = 30, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_protected(dtype: torch.dtype) -> None:
    numbers = [0.0, -0.0, 1.0, 1.124, 1.125, 1.126, 1.375, 1.874, 1.876, -1.99, 65504.0, 6e4, -3e-3, 5.9e-3, 5.8e-3]
    numbers += [2.0**-8, -(2.0**-8) * 0.999, 2.0**-14, 2.0**-14 * 0.999, 1e-7, 2.0**-9 * 1.5, 2.0**-9 * 1.51, 3e-5]
    numbers += [1.2 * 2.0**127, 3e38, -3.38e38] if dtype is not torch.float16 else [1e6, -1e30]
    weight = torch.tensor([numbers])
    found = reduce_mantissas(weight, None, dtype)  # fewer than 50 numbers: none is protected
    assert found.dtype == dtype
    held = weight.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).double()[0]
    assert found.double()[0].tolist() == [naive(float(value), dtype) for value in held]


@given(st.lists(st.floats(-1e5, 1e5, width=32), min_size=1, max_size=49), st.sampled_from(DTYPES), st.booleans())
def test_tiny_matrices_protect_nothing(values: list[float], dtype: torch.dtype, weighted: bool) -> None:
    weight = torch.tensor(values).unsqueeze(0)
    importance = torch.linspace(0, 1, len(values)) if weighted else None
    found = reduce_mantissas(weight, importance, dtype)
    largest = torch.finfo(dtype).max
    held = weight.clamp(-largest, largest).to(dtype).double()[0]
    assert found.double()[0].tolist() == [naive(float(value), dtype) for value in held]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(3))
def test_at_most_two_percent_are_long(dtype: torch.dtype, seed: int) -> None:
    weight = matrix(seed=seed)
    found = reduce_mantissas(weight, None, dtype)
    m, e = torch.frexp(found.float())
    long = [i for i, value in enumerate((m * 2).abs().flatten().tolist()) if value not in SHORT | {0.0}]
    assert 0 < len(long) <= 0.02 * weight.numel()
    assert torch.equal(found.flatten()[long], weight.to(dtype).flatten()[long])
    powers = (found != 0) & (found.float().abs() < 2.0**-8)
    assert bool(powers.any())
    assert set((m * 2).abs()[powers].tolist()) == {1.0}
    assert int(e[found != 0].min()) - 1 >= -14


def test_those_that_lose_most_are_protected() -> None:
    weight, importance = matrix(), torch.linspace(0.1, 3, 30)
    found = reduce_mantissas(weight, importance, torch.float32)
    short = torch.tensor([naive(float(value), torch.float32) for value in weight.flatten()]).view_as(weight)
    loss = (weight - short).abs() * importance
    loss[weight.abs() < 2.0**-8] = 0
    want = loss.flatten().topk(12).indices  # 2 % of 600
    whole = (found != short).flatten().nonzero().flatten()
    assert sorted(whole.tolist()) == sorted(want.tolist())
    assert torch.equal(found.flatten()[want], weight.flatten()[want])


def test_numbers_below_the_bound_are_never_protected() -> None:
    weight = torch.full((10, 10), 2.0**-9 * 1.3)
    weight[0, 0] = 1.1
    found = reduce_mantissas(weight, None, torch.float32)
    assert float(found[0, 0]) == pytest.approx(1.1)
    assert set(found.flatten()[1:].tolist()) == {2.0**-9}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_twice_is_once(dtype: torch.dtype, weighted: bool) -> None:
    weight = matrix(40, 50) * torch.logspace(-4, 3, 40).unsqueeze(1)
    importance = torch.rand(50, generator=torch.Generator().manual_seed(1)) if weighted else None
    once = reduce_mantissas(weight, importance, dtype)
    assert torch.equal(reduce_mantissas(once.float(), importance, dtype), once)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_beyond_the_range_of_float16(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1e5, -3e30, 7e4, 2.0**17 * 1.9]]).to(dtype).float()
    found = reduce_mantissas(weight, None, dtype)
    assert bool(torch.isfinite(found).all())
    assert bool(((found.float() - weight).abs() <= weight.abs() / 8).all())


def test_a_float16_model_never_overflows() -> None:
    weight = torch.tensor([[65504.0, -65504.0, 1e8, -1e38]])
    assert reduce_mantissas(weight, None, torch.float16).tolist() == [[57344.0, -57344.0, 57344.0, -57344.0]]


def test_blocks_change_nothing_and_the_weight_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = matrix()
    before = weight.clone()
    whole = reduce_mantissas(weight, None, torch.bfloat16)
    monkeypatch.setattr(mantissa, "_BLOCK_ELEMENTS", 90)
    assert torch.equal(reduce_mantissas(weight, None, torch.bfloat16), whole)
    assert torch.equal(weight, before)
    assert reduce_mantissas(torch.empty(0, 4), None, torch.bfloat16).shape == (0, 4)
