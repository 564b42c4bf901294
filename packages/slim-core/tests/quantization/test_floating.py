"""E4M3 and E2M1 numbers, against the definitions of the formats."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slim_core.quantization.floating import (
    E4M3_MAX,
    SMALLEST_SCALE,
    e2m1_codes,
    e2m1_values,
    e4m3_scale,
    e4m3_values,
    quantize_e4m3_per_token,
    round_to_e2m1,
    round_to_e4m3,
    to_e4m3,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The formats, from their bits: the value of every magnitude by its code.
E4M3 = [m / 8 * 2.0**-6 if not e else (1 + m / 8) * 2.0 ** (e - 7) for e, m in itertools.product(range(16), range(8))]
E4M3 = E4M3[:-1]  # the last one is NaN
E2M1 = [0.5 * m if not e else (1 + m / 2) * 2.0 ** (e - 1) for e, m in itertools.product(range(4), range(2))]
float32s = st.floats(width=32, allow_nan=False, allow_infinity=False)
near_e4m3 = st.floats(-600, 600, width=32)
near_e2m1 = st.floats(-8, 8, width=32)


def nearest(x: float, grid: list[float], ties: str) -> float:
    """The nearest number of the grid, in float64; halves to the even code or away from zero; saturating."""
    magnitude = min(abs(x), grid[-1])
    code = min(range(len(grid)), key=lambda i: (abs(grid[i] - magnitude), i % 2 if ties == "even" else -i))
    return math.copysign(grid[code], x)


def neighbours(x: float) -> list[float]:
    one = torch.tensor(x)
    return [float(torch.nextafter(one, torch.tensor(to))) for to in (-math.inf, math.inf)] + [x]


def test_the_grids() -> None:
    assert E4M3[-1] == E4M3_MAX == 448
    assert E2M1 == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert e4m3_values(codes).tolist() == E4M3 == codes.float().tolist()
    assert e2m1_values(torch.arange(16, dtype=torch.uint8)).tolist() == E2M1 + [-x for x in E2M1]
    assert torch.signbit(e2m1_values(torch.tensor([0, 8], dtype=torch.uint8))).tolist() == [False, True]


@given(st.lists(st.one_of(near_e4m3, float32s), min_size=1))
def test_e4m3_is_the_nearest_and_ties_are_even(values: list[float]) -> None:
    rounded = round_to_e4m3(torch.tensor(values)).tolist()
    assert rounded == [nearest(value, E4M3, "even") for value in values]
    assert rounded == to_e4m3(torch.tensor(values)).double().tolist()


def test_e4m3_at_every_tie_and_next_to_it() -> None:
    for low, high in itertools.pairwise(E4M3):
        for value in neighbours((low + high) / 2):
            for x in (value, -value):
                assert float(round_to_e4m3(torch.tensor([x]))) == nearest(x, E4M3, "even")


@pytest.mark.parametrize("x", [448.0, 449.0, 464.0, 465.0, 480.0, 1e9, math.inf])
def test_e4m3_saturates(x: float) -> None:
    assert round_to_e4m3(torch.tensor([x, -x])).tolist() == [448, -448]


def test_nan_stays_nan_in_e4m3() -> None:
    assert bool(round_to_e4m3(torch.tensor([math.nan])).isnan().all())


@given(st.lists(st.one_of(near_e2m1, float32s), min_size=1))
def test_e2m1_is_the_nearest(values: list[float]) -> None:
    x = torch.tensor(values)
    away = [nearest(value, E2M1, "away") for value in values]
    assert round_to_e2m1(x).tolist() == e2m1_values(e2m1_codes(x)).tolist() == away
    assert round_to_e2m1(x, ties_to_even=True).tolist() == [nearest(value, E2M1, "even") for value in values]


@pytest.mark.parametrize(
    ("tie", "away", "even"),
    [(0.25, 1, 0), (0.75, 2, 2), (1.25, 3, 2), (1.75, 4, 4), (2.5, 5, 4), (3.5, 6, 6), (5.0, 7, 6)],
)
def test_e2m1_ties(tie: float, away: int, even: int) -> None:
    """The table of ties, and what lies one float32 beside each of them."""
    below, above, _ = neighbours(tie)
    x = torch.tensor([below, tie, above])
    lower, upper = away - 1, away
    assert e2m1_codes(x).tolist() == [lower, away, upper]
    assert e2m1_codes(-x).tolist() == [8 + lower, 8 + away, 8 + upper]
    assert round_to_e2m1(x, ties_to_even=True).tolist() == [E2M1[lower], E2M1[even], E2M1[upper]]
    assert round_to_e2m1(-x, ties_to_even=True).tolist() == [-E2M1[lower], -E2M1[even], -E2M1[upper]]


def test_worked_codes() -> None:
    codes = e2m1_codes(torch.tensor([0.5, -1.5, 6, -0.0, 3, -4]))
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [1, 11, 7, 8, 5, 14]


def test_signs_of_zero() -> None:
    assert e2m1_codes(torch.tensor([0.0, -0.0, 0.1, -0.1, 1e-45, -1e-45])).tolist() == [0, 8, 0, 8, 0, 8]


def test_e2m1_saturates() -> None:
    assert e2m1_codes(torch.tensor([6.0, 7.0, 1e30, math.inf, -7.0, -math.inf])).tolist() == [7, 7, 7, 7, 15, 15]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_its_float32_upcast(dtype: torch.dtype) -> None:
    """Every bit pattern that is a number."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    x = every[every.isfinite()]
    assert torch.equal(e2m1_codes(x), e2m1_codes(x.float()))
    assert torch.equal(round_to_e2m1(x, ties_to_even=True), round_to_e2m1(x.float(), ties_to_even=True))
    assert torch.equal(round_to_e4m3(x), round_to_e4m3(x.float()))


@given(st.lists(near_e4m3, min_size=1))
def test_rounding_twice_is_rounding_once(values: list[float]) -> None:
    x = torch.tensor(values)
    for rounded in (round_to_e4m3, round_to_e2m1, lambda y: round_to_e2m1(y, ties_to_even=True)):
        once: Tensor = rounded(x)
        assert torch.equal(rounded(once), once)
        assert torch.equal(rounded(-x), -once)


def test_shapes_and_inputs_are_kept() -> None:
    x = torch.randn(2, 3, 4)
    before = x.clone()
    for view in (x, x.transpose(0, 2), x[:, :0]):
        assert e2m1_codes(view).shape == round_to_e2m1(view).shape == to_e4m3(view).shape == view.shape
        assert torch.equal(e2m1_values(e2m1_codes(view)), round_to_e2m1(view))
        assert torch.equal(e4m3_values(to_e4m3(view)), round_to_e4m3(view))
    assert torch.equal(x, before)


def test_scale_of_nothing_is_a_normal_number() -> None:
    scale = e4m3_scale(torch.tensor([0.0, 1e-45, 448.0, 3.0]))
    assert scale.tolist()[:3] == [SMALLEST_SCALE, SMALLEST_SCALE, 1.0]
    assert float(scale[3]) == float(torch.tensor(3.0) / 448)
    assert SMALLEST_SCALE == 2.0**-126


@pytest.mark.parametrize("dtype", DTYPES)
def test_per_token(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1)).mul(3).to(dtype)
    x[1, 2] = 0
    codes, scale = quantize_e4m3_per_token(x)
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (
        torch.float8_e4m3fn,
        x.shape,
        torch.float32,
        (3, 5, 1),
    )
    exact = x.double()
    amax = exact.abs().amax(-1, keepdim=True)
    assert torch.allclose(scale.double(), (amax / 448).clamp(min=SMALLEST_SCALE), rtol=1e-7)
    assert torch.equal(codes.float().abs().amax(-1) == 448, x.abs().amax(-1) > 0)
    back = codes.double() * scale.double()
    assert bool(((back - exact).abs() <= exact.abs() / 16 + amax / 448 * 2**-9).all())
    other = x.clone()
    other[0, 0] *= 7
    again, scales = quantize_e4m3_per_token(other)
    same = torch.ones(3, 5, dtype=torch.bool)
    same[0, 0] = False
    assert torch.equal(again.float()[same], codes.float()[same])
    assert torch.equal(scales[same], scale[same])
