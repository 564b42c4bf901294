"""Blocks, shared exponents and activations of the microscaling formats."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from slim_core.quantization.floating import e2m1_values, e4m3_values
from slim_core.quantization.methods.microscaling import FOUR_OR_SIX, MXFP4_MINMAX, MXFP8_CEIL
from slim_core.quantization.microscaling import (
    LOWEST,
    MXFP4,
    MXFP4_FLOOR,
    MXFP8,
    MXFP8_FLOOR,
    ExponentRule,
    MxFormat,
    by_blocks,
    dual_scale_activations,
    dual_scales,
    exponents_of,
    from_blocks,
    from_bytes,
    magnitudes,
    mx_dequantized,
    mx_values,
    mxfp4_activations,
    mxfp8_activations,
    power_of_two,
    to_bytes,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RULES = [MXFP8_FLOOR, MXFP8_CEIL, MXFP4_FLOOR, MXFP4_MINMAX, *FOUR_OR_SIX, ExponentRule(7.25, inclusive=True)]
positive = st.floats(2.0**-149, float(torch.finfo(torch.float32).max), width=32)


def gaussian(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def exponent(m: float, rule: ExponentRule = MXFP4_MINMAX, highest: int = 127) -> int:
    return int(exponents_of(torch.tensor([m]), rule, highest))


def naive_exponent(m: float, rule: ExponentRule, highest: int) -> int:
    """The smallest exponent that fits, in exact rational arithmetic, by trying."""
    for e in range(LOWEST, highest):
        scaled = Fraction(m) / Fraction(2) ** e
        if scaled < Fraction(rule.limit) or (rule.inclusive and scaled == Fraction(rule.limit)):
            return e
    return highest


def around(m: float) -> list[float]:
    """A number and the float32 numbers beside it."""
    one = torch.tensor(m)
    return [float(torch.nextafter(one, torch.tensor(0.0))), m, float(torch.nextafter(one, torch.tensor(math.inf)))]


@given(positive, st.sampled_from(RULES), st.sampled_from([119, 125]))
def test_exponents_equal_exact_arithmetic(m: float, rule: ExponentRule, highest: int) -> None:
    assert exponent(m, rule, highest) == naive_exponent(m, rule, highest)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("base", [1.0, 1.5, 1.75, 1.8125, 3 * math.sqrt(2) / 4])
def test_exponents_at_powers_of_two_and_beside_them(rule: ExponentRule, base: float) -> None:
    for power in (-126, -100, -20, -8, -1, 0, 1, 7, 60, 125):
        for m in around(float(torch.tensor(base * 2.0**power))):
            assert exponent(m, rule) == naive_exponent(m, rule, 127)


def test_worked_scales() -> None:
    """amax 3.7: MXFP8 has -7, stored as 120; MXFP4 has 0, stored as 127, where the plain rule gives -1, 126."""
    m = torch.tensor([3.7])
    assert to_bytes(exponents_of(m, MXFP8_FLOOR, MXFP8.highest)).tolist() == [120]
    assert to_bytes(exponents_of(m, MXFP4_MINMAX, MXFP4.highest)).tolist() == [127]
    assert to_bytes(exponents_of(m, MXFP4_FLOOR, MXFP4.highest)).tolist() == [126]


def test_thresholds_of_the_rules() -> None:
    """What lies on a threshold: 1.75 / 0.875 is 2, and so on."""
    assert exponent(1.75) == math.floor(math.log2(1.75 / 0.875)) - 2 == -1
    assert exponent(1.0, MXFP8_FLOOR) == exponent(1.0, MXFP8_CEIL) == -8
    assert exponent(1.5, MXFP8_CEIL) == -7
    assert exponent(7.25, ExponentRule(7.25, inclusive=True)) == 0
    assert exponent(7.25, ExponentRule(7.25)) == 1


@given(positive)
def test_rules_are_the_formulas_of_the_protocol(m: float) -> None:
    """Away from the thresholds, where logarithms can be trusted."""
    log = math.log2(m)
    formulas = [
        (MXFP8_FLOOR, log, lambda x: math.floor(x) - 8),
        (MXFP8_CEIL, log, lambda x: math.ceil(x) - 8),
        (MXFP4_MINMAX, log - math.log2(0.875), lambda x: math.floor(x) - 2),
        (ExponentRule(7.25, inclusive=True), log - math.log2(7.25), math.ceil),
        (FOUR_OR_SIX[0], log - math.log2(6), round),
        (FOUR_OR_SIX[1], log - math.log2(4), round),
    ]
    for rule, x, formula in formulas:
        if abs(2 * x - round(2 * x)) > 1e-6:
            assert exponent(m, rule) == max(formula(x), LOWEST)


@pytest.mark.parametrize("rule", RULES)
def test_zero_has_the_lowest_exponent(rule: ExponentRule) -> None:
    assert exponent(0.0, rule) == LOWEST


@pytest.mark.parametrize("form", [MXFP8, MXFP4])
@pytest.mark.parametrize("rule", RULES)
def test_nothing_dequantizes_to_infinity(form: MxFormat, rule: ExponentRule) -> None:
    largest = torch.tensor([torch.finfo(torch.float32).max])
    scale = power_of_two(exponents_of(largest, rule, form.highest))
    assert bool(torch.isfinite(form.round(largest / scale) * scale).all())


@pytest.mark.parametrize("e", range(-127, 128))
def test_powers_of_two_and_their_bytes(e: int) -> None:
    power = power_of_two(torch.tensor([e], dtype=torch.int32))
    assert power.dtype == torch.float32
    assert float(power) == 2.0**e
    stored = to_bytes(torch.tensor([e], dtype=torch.int32))
    assert stored.dtype == torch.uint8
    assert stored.tolist() == [e + 127]
    assert float(from_bytes(stored)) == 2.0**e == float(stored.view(torch.float8_e8m0fnu).float())


def test_byte_255_is_not_a_number() -> None:
    assert bool(from_bytes(torch.tensor([255], dtype=torch.uint8)).isnan().all())


@pytest.mark.parametrize("width", [1, 31, 32, 33, 64, 80])
def test_blocks_there_and_back(width: int) -> None:
    x = gaussian(3, width)
    blocks = by_blocks(x)
    assert blocks.shape == (3, -(-width // 32), 32)
    assert torch.equal(from_blocks(blocks, width), x)
    assert float(blocks.flatten(1)[:, width:].abs().sum()) == 0
    assert torch.equal(magnitudes(blocks).amax((1, 2)), x.abs().amax(1))


def naive_activations(x: Tensor, form: str, block: int = 32) -> Tensor:
    """Block by block in float64, by the rule of the operator: floor(log2 m) less the exponent of the format."""
    grid = e4m3_values(torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)).double()
    emax = 8
    if form != "mxfp8":
        grid, emax = e2m1_values(torch.arange(8, dtype=torch.uint8)).double(), 2
    rows = x.double().reshape(-1, x.shape[-1])
    out = torch.zeros_like(rows)
    for r in range(len(rows)):
        for start in range(0, rows.shape[1], block):
            part = rows[r, start : start + block]
            m = float(part.abs().max())
            e = max(math.frexp(m)[1] - 1 - emax, -127) if m else -127
            for c, value in enumerate(part.tolist()):
                scaled = min(abs(value) / 2.0**e, float(grid[-1]))
                distance = (grid - scaled).abs()
                near = (distance == distance.min()).nonzero().flatten().tolist()
                code = near[-1] if form == "mxfp4" else next((n for n in near if n % 2 == 0), near[0])
                out[r, start + c] = math.copysign(float(grid[code]) * 2.0**e, value)
    return out.reshape(x.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 64), (1, 3, 40), (4, 7)])
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_activations_equal_the_naive_ones(dtype: torch.dtype, shape: tuple[int, ...], scale: float) -> None:
    x = gaussian(*shape, scale=scale, dtype=dtype)
    before = x.clone()
    assert torch.equal(mxfp8_activations(x).double(), naive_activations(x, "mxfp8"))
    assert torch.equal(mxfp4_activations(x).double(), naive_activations(x, "mxfp4"))
    assert torch.equal(x, before)


def test_activations_at_ties() -> None:
    """E2M1 halves away from zero, E4M3 halves to even; the block's maximum makes its exponent 0."""
    x = torch.zeros(32)
    x[:8] = torch.tensor([4.0, 0.25, -0.75, 1.25, -1.75, 2.5, -3.5, 5.0])
    assert mxfp4_activations(x)[:8].tolist() == [4, 0.5, -1, 1.5, -2, 3, -4, 6]
    y = torch.zeros(32)
    y[:5] = torch.tensor([256.0, 17.0, -19.0, 2.0**-10, 3 * 2.0**-10])
    assert mxfp8_activations(y)[:5].tolist() == [256, 16, -20, 0, 2.0**-8]


def test_largest_activations_saturate() -> None:
    x = torch.zeros(2, 32)
    x[:, 0] = torch.tensor([7.9, 500.0])
    assert float(mxfp4_activations(x)[0, 0]) == 6
    assert float(mxfp8_activations(x)[1, 0]) == 448


@pytest.mark.parametrize("quantized", [mxfp8_activations, mxfp4_activations])
def test_of_any_activations(quantized: Callable[[Tensor], Tensor]) -> None:
    x = gaussian(5, 96, scale=3.0)
    x[1, 32:64] = 0
    x[2] *= 1e-20
    once = quantized(x)
    assert once.dtype == torch.float32
    assert torch.equal(quantized(once), once)
    assert torch.equal(quantized(-x), -once)
    assert torch.equal(quantized(x * 2.0**10), once * 2.0**10)
    assert not bool(once[1, 32:64].any())
    error = (once - x).abs().amax() / x.abs().amax()
    tiny = (once[2] - x[2]).abs().amax() / x[2].abs().amax()
    assert 0 < tiny < 0.3
    assert error < 0.3
    assert torch.equal(quantized(x[1:2]), once[1:2])
    assert quantized(x[:0]).shape == (0, 96)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "quantized", [mxfp8_activations, mxfp4_activations, lambda x: dual_scale_activations(x, 64)[0]]
)
def test_what_is_not_finite_does_not_become_a_number(bad: float, quantized: Callable[[Tensor], Tensor]) -> None:
    x = gaussian(2, 64)
    x[0, 5] = bad
    y = quantized(x)
    assert bool(y[0, :32].isnan().all())
    assert bool(y[1].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_dual_scale_activations(dtype: torch.dtype) -> None:
    x = gaussian(3, 128, dtype=dtype)
    x[0, :64] = 0
    values, outer = dual_scale_activations(x, 64)
    assert (values.shape, outer.shape, outer.dtype) == ((3, 128), (3, 2), torch.float32)
    amax = x.double().reshape(3, 2, 64).abs().amax(-1)
    assert torch.equal(outer, (amax.float() / 6).clamp(min=2.0**-126))
    inner = (x.float().reshape(3, 2, 64) / outer[..., None]).to(dtype).reshape(3, 128)
    assert torch.equal(values.double(), naive_activations(inner, "mxfp4 with ties to even"))
    assert not bool(values[0, :64].any())
    assert float(values.abs().max()) == 6


def test_dual_scale_activations_at_ties() -> None:
    """Halves to the even code, where the outer scale is 1."""
    x = torch.zeros(32)
    x[:8] = torch.tensor([6.0, 0.25, -0.75, 1.25, -1.75, 2.5, -3.5, 5.0])
    values, outer = dual_scale_activations(x, 32)
    assert outer.tolist() == [1]
    assert values[:8].tolist() == [6, 0, -1, 1, -2, 2, -4, 4]


def test_dual_scale_activations_are_brought_back_to_their_dtype_in_between() -> None:
    """0.582 / (2 / 6) is 1.746, which bfloat16 makes 1.75, a tie that goes up; float32 does not."""
    x = torch.zeros(32)
    x[:2] = torch.tensor([2.0, 0.58203125])
    assert dual_scale_activations(x.bfloat16(), 32)[0][:2].tolist() == [6, 2]
    assert dual_scale_activations(x, 32)[0][:2].tolist() == [6, 1.5]


def test_dual_scales_of_a_ragged_width() -> None:
    x = gaussian(2, 80)
    assert torch.equal(dual_scales(x, 64)[:, 1, 0], x[:, 64:].abs().amax(1) / 6)


@pytest.mark.parametrize("width", [32, 40, 96])
def test_dequantized_values(width: int) -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (4, width), dtype=torch.uint8, generator=generator)
    stored = torch.randint(0, 255, (4, -(-width // 32)), dtype=torch.uint8, generator=generator)
    spread = stored.double().sub(127).exp2().repeat_interleave(32, 1)[:, :width]
    assert torch.equal(mx_values(codes, stored).double(), e2m1_values(codes).double() * spread)
    numbers = torch.randint(0, 127, (4, width), dtype=torch.uint8, generator=generator).view(torch.float8_e4m3fn)
    stored = stored.clamp(max=119 + 127)
    spread = stored.double().sub(127).exp2().repeat_interleave(32, 1)[:, :width]
    assert torch.equal(mx_values(numbers, stored).double(), numbers.double() * spread)
    outer = gaussian(4, 1, 1).abs()
    assert torch.equal(mx_dequantized(numbers, stored, outer), mx_values(numbers, stored) * outer[:, 0])
