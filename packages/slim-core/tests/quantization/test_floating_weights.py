"""The weight methods of FP8 and of the microscaling formats, block by block against naive float64 arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.source import LazyTensor
from slim_core.errors import InvalidModelError
from slim_core.quantization import row_blocks
from slim_core.quantization.floating import SMALLEST_SCALE
from slim_core.quantization.kinds import LayerForm, layer_form
from slim_core.quantization.methods import quantize_weight
from slim_core.quantization.methods.floating import fp8_weight
from slim_core.quantization.methods.microscaling import (
    ceil_x_weight,
    dualscale_weight,
    fouroversix_weight,
    mse_round_weight,
    mxfp4_weight,
    mxfp8_weight,
    search_values,
)
from slim_core.quantization.weights import InMemory, MxWeight, QuantizedWeight
from slim_core.recipe import LinearQConfig

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (1, 32), (7, 31), (5, 33), (6, 96), (3, 80)]
SEARCH = search_values(6, 12, 0.25)
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
Method = Callable[..., MxWeight]
MX: dict[str, Method] = {
    "mxfp8": mxfp8_weight,
    "mse_round": mse_round_weight,
    "mxfp4": mxfp4_weight,
    "ceil_x": ceil_x_weight,
    "ceil_x search": lambda weight, **named: ceil_x_weight(weight, search=SEARCH, **named),
    "fouroversix": fouroversix_weight,
}
EVERY: dict[str, Callable[..., QuantizedWeight | MxWeight]] = {
    **MX,
    "fp8": fp8_weight,
    "dualscale": lambda weight, **named: dualscale_weight(weight, outer_block=32, **named),
}
every_method = pytest.mark.parametrize("method", list(EVERY))


def gaussian(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def codes_of(found: QuantizedWeight | MxWeight) -> tuple[Tensor, ...]:
    """Everything a method decides, as tensors that can be compared."""
    if isinstance(found, MxWeight):
        outer = () if found.outer is None else (found.outer,)
        return found.elements.view(torch.uint8), found.exponents, *outer
    return found.codes.view(torch.uint8), found.scale, found.offset


def same(one: QuantizedWeight | MxWeight, other: QuantizedWeight | MxWeight) -> bool:
    return all(torch.equal(a, b) for a, b in zip(codes_of(one), codes_of(other), strict=True))


def rounded(scaled: float, grid: Tensor) -> float:
    """The nearest number of the format, saturating: E4M3 halves to even, E2M1 halves away from zero."""
    magnitude = min(abs(scaled), float(grid[-1]))
    distance = (grid - magnitude).abs()
    near = (distance == distance.min()).nonzero().flatten().tolist()
    code = near[-1] if len(grid) == 8 else next((n for n in near if n % 2 == 0), near[0])
    return math.copysign(float(grid[code]), scaled)


def naive_block(block: list[float], exponent: int, grid: Tensor) -> tuple[list[float], float]:
    """The values that a block becomes with this exponent, and their squared error."""
    exponent = max(exponent, -127)
    values = [rounded(x / 2.0**exponent, grid) * 2.0**exponent for x in block]
    return values, sum((x - y) ** 2 for x, y in zip(block, values, strict=True))


def blocks_of(matrix: Tensor) -> Iterator[tuple[int, int, list[float]]]:
    for row in range(matrix.shape[0]):
        for start in range(0, matrix.shape[1], 32):
            yield row, start, matrix[row, start : start + 32].double().tolist()


def candidates(method: str, m: float) -> list[int]:
    """Exponents that the rules of the protocol give for a largest magnitude, in the words of their formulas."""
    if not m:
        return [-127]
    log = math.log2(m)
    down, up = math.floor(log), math.ceil(log)
    return {
        "mxfp8": [down - 8],
        "mse_round": [down - 8, up - 8],
        "mxfp4": [math.floor(math.log2(m / 0.875)) - 2],
        "ceil_x": [math.ceil(math.log2(m / 7.25))],
        "fouroversix": [round(math.log2(m / 6)), round(math.log2(m / 4))],
    }[method]


@pytest.mark.parametrize("method", ["mxfp8", "mse_round", "mxfp4", "ceil_x", "fouroversix"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_naive_float64(method: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    matrix = gaussian(*shape, dtype)
    grid = E4M3 if method in ("mxfp8", "mse_round") else E2M1
    found = MX[method](InMemory(matrix), name="w")
    back = found.dequantized().double()
    assert found.elements.dtype == (torch.float8_e4m3fn if grid is E4M3 else torch.uint8)
    assert found.elements.shape == back.shape == shape
    assert (found.exponents.dtype, found.exponents.shape) == (torch.uint8, (shape[0], -(-shape[1] // 32)))
    assert found.outer is None
    for row, start, block in blocks_of(matrix):
        exponents = candidates(method, max(map(abs, block)))
        errors = [naive_block(block, e, grid)[1] for e in exponents]
        stored = int(found.exponents[row, start // 32]) - 127
        assert stored in exponents
        values, error = naive_block(block, stored, grid)
        assert error <= min(errors) * (1 + 1e-6)
        assert back[row, start : start + 32].tolist() == values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_searches_are_never_worse_than_minmax_in_any_block(dtype: torch.dtype, seed: int) -> None:
    matrix = gaussian(24, 256, dtype, seed) * gaussian(24, 1, dtype, seed + 9).exp()

    def block_errors(method: str) -> Tensor:
        error = (MX[method](InMemory(matrix), name="w").dequantized().double() - matrix.double()).square()
        return error.reshape(24, 8, 32).sum(-1)

    for search, plain in (("mse_round", "mxfp8"), ("fouroversix", "mxfp4")):
        assert bool((block_errors(search) <= block_errors(plain) * (1 + 1e-6)).all())
        assert float(block_errors(search).sum()) < float(block_errors(plain).sum())
    assert float(block_errors("ceil_x search").sum()) <= float(block_errors("mxfp4").sum()) * (1 + 1e-6)


@pytest.mark.parametrize("value", [6, 7.25, 8, 9.1, 12])
def test_ceil_x_brings_maxima_to_its_value(value: float) -> None:
    matrix = gaussian(40, 64)
    matrix[0] = 4 * value
    stored = float(matrix[0, 0]) / 4  # 9.1 is no float32: the nearest one lies above and needs one exponent more
    found = ceil_x_weight(InMemory(matrix), name="w", value=value)
    largest = matrix.reshape(40, 2, 32).abs().amax(-1).double()
    scaled = largest / (found.exponents.double() - 127).exp2()
    assert float(scaled.max()) <= value
    assert float(scaled.min()) > value / 2
    assert scaled[0].tolist() == [stored if stored <= value else stored / 2] * 2


def total_error(matrix: Tensor, found: MxWeight) -> float:
    return float((found.dequantized().double() - matrix.double()).square().sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("values", [SEARCH, [8.0, 10.5], search_values(0.5, 40, 3.7)])
def test_search_finds_the_best_value_for_the_whole_weight(seed: int, values: list[float]) -> None:
    matrix = gaussian(16, 96, torch.bfloat16, seed).float().pow(3)
    found = ceil_x_weight(InMemory(matrix), name="w", search=values)
    every = [ceil_x_weight(InMemory(matrix), name="w", value=value) for value in values]
    every.append(mxfp4_weight(InMemory(matrix), name="w"))
    least = min(total_error(matrix, one) for one in every)
    assert total_error(matrix, found) == pytest.approx(least, rel=1e-6)
    assert any(same(found, one) for one in every)


def test_values_of_a_search() -> None:
    assert len(SEARCH) == 25
    assert (SEARCH[0], SEARCH[-1]) == (6, 12)
    assert search_values(6, 7, 0.4) == pytest.approx([6, 6.4, 6.8])
    assert search_values(6, 6.3, 0.1) == pytest.approx([6, 6.1, 6.2, 6.3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outer_block", [32, 64, 192])
def test_dualscale(dtype: torch.dtype, outer_block: int) -> None:
    matrix = gaussian(5, 192, dtype)
    matrix[2, :outer_block] = 0
    found = dualscale_weight(InMemory(matrix), outer_block=outer_block, name="w")
    blocks = matrix.float().reshape(5, -1, outer_block)
    amax = blocks.abs().amax(-1, keepdim=True)
    assert found.outer is not None
    assert (found.outer.dtype, found.outer.shape) == (torch.float32, (5, 192 // outer_block, 1))
    assert torch.equal(found.outer, (amax / 6).clamp(min=SMALLEST_SCALE))
    inner = mxfp4_weight(InMemory((blocks / found.outer).reshape(5, 192)), name="w")
    assert torch.equal(found.elements, inner.elements)
    assert torch.equal(found.exponents, inner.exponents)
    back = found.dequantized()
    assert bool(back.isfinite().all())
    assert not bool(back[2, :outer_block].any())
    exact = inner.dequantized().double().reshape(5, -1, outer_block) * found.outer.double()
    assert torch.allclose(back.double(), exact.reshape(5, 192), rtol=1e-7, atol=0)
    # The largest magnitude of an outer block is 6 outer scales: it is met but for float32 rounding.
    assert torch.allclose(back.reshape(blocks.shape).abs().amax(-1, keepdim=True), amax, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_equals_naive_float64(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    matrix = gaussian(*shape, dtype)
    found = fp8_weight(InMemory(matrix), name="w")
    w = matrix.double()
    scale = w.abs().amax(1, keepdim=True) / 448
    assert found.codes.dtype == torch.float8_e4m3fn
    assert (found.scale.dtype, found.scale.shape) == (torch.float32, (shape[0], 1))
    assert torch.allclose(found.scale.double(), scale, rtol=1e-7, atol=0)
    assert not bool(found.offset.any())
    steps = (matrix.float() / found.scale).double()
    for row in range(shape[0]):
        assert found.codes[row].double().tolist() == [rounded(x, E4M3) for x in steps[row].tolist()]
    back = found.dequantized().double()
    assert bool(((back - w).abs() <= w.abs() / 16 + scale * 2**-9).all())
    assert torch.equal(found.codes.float().abs().amax(1), torch.full(shape[:1], 448.0))


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_its_float32_upcast(method: str, dtype: torch.dtype) -> None:
    matrix = gaussian(16, 96, dtype)
    assert same(EVERY[method](InMemory(matrix), name="w"), EVERY[method](InMemory(matrix.float()), name="w"))


@given(power=st.integers(-60, 60), method=st.sampled_from(list(EVERY)))
@settings(max_examples=40)
def test_powers_of_two_shift_the_scale_and_nothing_else(power: int, method: str) -> None:
    matrix = gaussian(4, 64)
    plain, scaled = (EVERY[method](InMemory(w), name="w") for w in (matrix, matrix * 2.0**power))
    assert torch.equal(codes_of(plain)[0], codes_of(scaled)[0])
    assert torch.equal(scaled.dequantized(), plain.dequantized() * 2.0**power)
    assert scaled.sqnr_db == pytest.approx(plain.sqnr_db, abs=1e-4)


@every_method
def test_tiny_weights_keep_their_precision(method: str) -> None:
    matrix = gaussian(4, 64)
    plain, tiny = (EVERY[method](InMemory(w), name="w").dequantized().double() for w in (matrix, matrix * 1e-20))
    error, small = (plain - matrix.double()).norm(), (tiny - (matrix * 1e-20).double()).norm()
    assert float(small / 1e-20) == pytest.approx(float(error), rel=0.5)
    assert bool((tiny != 0).sum() > 200)


@every_method
def test_the_smallest_and_the_largest_weights(method: str) -> None:
    """At the lower end the formats run out of exponents: there an error may be as large as the weight, never larger."""
    for scale, share in ((2.0**-149, 1), (2.0**-128, 1), (2.0**-120, 0.2), (2.0**125, 0.2)):
        matrix = gaussian(2, 64).clamp(-3, 3) * scale
        back = EVERY[method](InMemory(matrix), name="w").dequantized()
        assert bool(back.isfinite().all())
        assert float((back.double() - matrix.double()).norm()) <= share * float(matrix.double().norm())


@every_method
def test_zeros_stay_zeros(method: str) -> None:
    matrix = gaussian(3, 96)
    matrix[1] = 0
    matrix[2, 32:64] = 0
    found = EVERY[method](InMemory(matrix), name="w")
    back = found.dequantized()
    assert bool(back.isfinite().all())
    assert not bool(back[1].any())
    assert not bool(back[2, 32:64].any())
    if isinstance(found, MxWeight):
        assert found.exponents[1].tolist() == [0, 0, 0]
    else:
        assert float(found.scale[1]) == SMALLEST_SCALE


@every_method
def test_negation_and_permutation(method: str) -> None:
    matrix = gaussian(6, 96, torch.bfloat16)
    plain = EVERY[method](InMemory(matrix), name="w").dequantized()
    assert torch.equal(EVERY[method](InMemory(-matrix), name="w").dequantized(), -plain)
    rows = torch.tensor([3, 0, 5, 1, 4, 2])
    blocks = torch.cat([torch.arange(64, 96), torch.arange(64)])
    assert torch.equal(EVERY[method](InMemory(matrix[rows][:, blocks]), name="w").dequantized(), plain[rows][:, blocks])


@every_method
def test_quantizing_twice_is_quantizing_once(method: str) -> None:
    matrix = gaussian(6, 96)
    once = EVERY[method](InMemory(matrix), name="w").dequantized()
    twice = EVERY[method](InMemory(once), name="w").dequantized()
    assert torch.allclose(twice, once, rtol=2e-7 if method in ("dualscale", "fp8") else 0, atol=0)


@every_method
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mapped_file_is_only_read(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The mapping is read-only: writing to a view of it would end the process."""
    matrix = gaussian(9, 64, dtype)
    save_file({"w.weight": matrix}, tmp_path / "model.safetensors")
    source = Checkpoint(tmp_path)
    lazy = LazyTensor(source, source.meta("w.weight"))
    assert same(EVERY[method](lazy, name="w.weight"), EVERY[method](InMemory(matrix), name="w.weight"))
    assert torch.equal(source.load("w.weight"), matrix)


@every_method
def test_block_size_and_threads_change_nothing(
    method: str, counted_rows: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = gaussian(50, 64, torch.bfloat16)
    whole = EVERY[method](InMemory(matrix), name="w")
    before = torch.get_num_threads()
    try:
        for rows in (1, 3, 49):
            monkeypatch.setattr(row_blocks, "_CACHE_BYTES", rows * 64 * 4)
            for threads in (1, 4):
                torch.set_num_threads(threads)
                source = counted_rows(matrix)
                assert same(EVERY[method](source, name="w"), whole)
                assert source.reads == [2 if "search" in method else 1] * 50
    finally:
        torch.set_num_threads(before)


@every_method
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 41])
def test_nan_and_infinity_are_errors(method: str, bad: float, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_blocks, "_CACHE_BYTES", 4 * 64 * 4)
    for dtype in DTYPES:
        matrix = gaussian(42, 64, dtype)
        matrix[row, 3] = bad
        with pytest.raises(InvalidModelError, match=rf"^w\.weight: .*NaN or infinity in row {row} "):
            EVERY[method](InMemory(matrix), name="w.weight")


@every_method
@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (0, 0)])
def test_empty_matrices(method: str, shape: tuple[int, int]) -> None:
    found = EVERY[method](InMemory(torch.empty(shape)), name="w")
    assert codes_of(found)[0].shape == shape
    assert found.dequantized().shape == shape
    assert found.sqnr_db == math.inf


@every_method
def test_sqnr(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = gaussian(256, 64, torch.bfloat16)

    def exact(found: QuantizedWeight | MxWeight, rows: slice | list[int]) -> float:
        w = matrix.double()
        error = (w - found.dequantized().double())[rows]
        return float(10 * torch.log10(w[rows].square().sum() / error.square().sum()))

    found = EVERY[method](InMemory(matrix), name="w")
    assert found.sqnr_db == pytest.approx(exact(found, slice(None)), abs=1e-2)
    monkeypatch.setattr(row_blocks, "_CACHE_BYTES", 2 * 64 * 4)
    sampled = EVERY[method](InMemory(matrix), name="w")
    rows = [row for row in range(256) if row // 2 % 8 == 0]
    assert sampled.sqnr_db == pytest.approx(exact(sampled, rows), abs=1e-2)
    assert sampled.sqnr_db == pytest.approx(found.sqnr_db, abs=1)
    # What the formats are known to reach on Gaussian weights.
    low, high = (29, 33) if "8" in method or method == "mse_round" else (17, 22)
    assert low < found.sqnr_db < high


def qconfig(dtype: str, scope: str, act: str | None = None, **weight: Any) -> LinearQConfig:
    method = weight.get("method", "minmax") if scope == "dual_scale" else "minmax"
    act_scope = "per_token" if dtype == "fp8_e4m3" else scope
    return LinearQConfig.model_validate(
        {
            "act": {"dtype": act or dtype, "scope": act_scope, "method": method},
            "weight": {"dtype": dtype, "scope": scope, **weight},
        }
    )


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (qconfig("fp8_e4m3", "per_channel"), "fp8"),
        (qconfig("mxfp8", "per_block"), "mxfp8"),
        (qconfig("mxfp8", "per_block", method="mse_round"), "mse_round"),
        (qconfig("mxfp4", "per_block"), "mxfp4"),
        (qconfig("mxfp4", "per_block", act="mxfp8"), "mxfp4"),
        (qconfig("mxfp4", "per_block", method="ceil_x"), "ceil_x"),
        (qconfig("mxfp4", "per_block", method="ceil_x", ext={"ceil_x_value": 7.25}), "ceil_x"),
        (qconfig("mxfp4", "per_block", method="ceil_x", ext={"enable_search": True}), "ceil_x search"),
        (qconfig("mxfp4", "per_block", method="fouroversix"), "fouroversix"),
        (qconfig("mxfp4", "dual_scale", method="dualscale", ext={"dual_block_size": 32}), "dualscale"),
    ],
)
def test_recipes_reach_their_methods(config: LinearQConfig, method: str) -> None:
    matrix = gaussian(8, 64, torch.bfloat16).float().pow(3)
    form = layer_form(config)
    found = quantize_weight(InMemory(matrix), config.weight, form, tensor="w", linear="l")
    assert same(found, EVERY[method](InMemory(matrix), name="w"))


def test_settings_of_ceil_x_reach_it() -> None:
    matrix = gaussian(8, 64)
    config = qconfig("mxfp4", "per_block", method="ceil_x", ext={"ceil_x_value": 11})
    found = quantize_weight(InMemory(matrix), config.weight, layer_form(config), tensor="w", linear="l")
    assert same(found, ceil_x_weight(InMemory(matrix), name="w", value=11))
    ext = {"enable_search": True, "search_min": 9, "search_max": 11, "search_step": 1}
    config = qconfig("mxfp4", "per_block", method="ceil_x", ext=ext)
    found = quantize_weight(InMemory(matrix), config.weight, LayerForm(layer_form(config).kind), tensor="w", linear="l")
    assert same(found, ceil_x_weight(InMemory(matrix), name="w", search=[9, 10, 11]))
