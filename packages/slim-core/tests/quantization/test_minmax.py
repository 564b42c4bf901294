"""The minmax weight method, against a naive float64 implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.source import LazyTensor
from slim_core.errors import InvalidModelError
from slim_core.quantization import row_blocks
from slim_core.quantization.affine import EPSILON
from slim_core.quantization.methods.minmax import magnitudes, minmax_weight
from slim_core.quantization.row_blocks import decibels
from slim_core.quantization.weights import InMemory, QuantizedWeight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def quantized(matrix: Tensor, *, bits: int = 8, symmetric: bool = True) -> QuantizedWeight:
    return minmax_weight(InMemory(matrix), bits=bits, symmetric=symmetric, name="w.weight")


def naive(matrix: Tensor, bits: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale, offset before rounding, and codes before rounding and without the offset, in float64."""
    w = matrix.double().numpy()
    low, high = np.minimum(w.min(1, keepdims=True), 0), np.maximum(w.max(1, keepdims=True), 0)
    if symmetric:
        scale, offset = np.maximum(np.maximum(-low, high) / (2 ** (bits - 1) - 1), EPSILON), np.zeros_like(low)
    else:
        scale = np.maximum((high - low) / (2**bits - 1), EPSILON)
        offset = -low / scale - 2 ** (bits - 1)
    return scale, offset, w / scale


def gaussian(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (33, 65)])
def test_equals_naive_float64(dtype: torch.dtype, symmetric: bool, bits: int, shape: tuple[int, int]) -> None:
    matrix = gaussian(*shape, dtype)
    found = quantized(matrix, bits=bits, symmetric=symmetric)
    scale, offset, exact = naive(matrix, bits, symmetric)
    assert np.allclose(found.scale.numpy(), scale, rtol=3e-7)
    assert np.array_equal(found.offset.numpy(), np.round(found.offset.numpy()))
    assert np.abs(found.offset.numpy() - offset).max() <= (0 if symmetric else 0.5 + 1e-4)
    codes = found.codes.numpy()
    assert np.abs(codes - (exact + found.offset.numpy())).max() <= 0.5 + 1e-4
    assert codes.min() >= -(2 ** (bits - 1))
    assert codes.max() < 2 ** (bits - 1)


@given(st.data(), st.sampled_from([torch.bfloat16, torch.float16]), st.booleans())
def test_half_precision_codes_are_those_of_the_float32_upcast(
    data: st.DataObject, dtype: torch.dtype, symmetric: bool
) -> None:
    bits = data.draw(st.lists(st.integers(0, 0xFFFF), min_size=6, max_size=6))
    raw = torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(dtype).reshape(2, 3)
    matrix = torch.where(raw.isfinite(), raw, torch.zeros_like(raw))
    half, full = quantized(matrix, symmetric=symmetric), quantized(matrix.float(), symmetric=symmetric)
    assert torch.equal(half.scale, full.scale)
    assert torch.equal(half.offset, full.offset)
    assert torch.equal(half.codes, full.codes)


@given(st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=8), st.sampled_from([torch.bfloat16, torch.float16]))
def test_magnitudes_of_every_bit_pattern(bits: list[int], dtype: torch.dtype) -> None:
    row = torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, -1)
    want = row.float().abs().amax(1, keepdim=True)
    assert torch.equal(magnitudes(row), want) or bool(want.isnan() & magnitudes(row).isnan())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_source_is_not_modified(dtype: torch.dtype, symmetric: bool) -> None:
    matrix = gaussian(9, 11, dtype)
    before = matrix.clone()
    quantized(matrix, symmetric=symmetric)
    assert torch.equal(matrix, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_mapped_file_is_only_read(tmp_path: Path, dtype: torch.dtype, symmetric: bool) -> None:
    """The mapping is read-only: writing to a view of it would end the process."""
    matrix = gaussian(9, 11, dtype)
    save_file({"w.weight": matrix}, tmp_path / "model.safetensors")
    source = Checkpoint(tmp_path)
    lazy = LazyTensor(source, source.meta("w.weight"))
    found = minmax_weight(lazy, bits=8, symmetric=symmetric, name="w.weight")
    assert torch.equal(found.codes, quantized(matrix, symmetric=symmetric).codes)
    assert torch.equal(source.load("w.weight"), matrix)


@pytest.mark.parametrize("symmetric", [True, False])
def test_permuting_rows_and_columns_permutes_the_result(symmetric: bool) -> None:
    matrix = gaussian(8, 12, torch.bfloat16)
    rows, columns = torch.randperm(8), torch.randperm(12)
    plain, moved = quantized(matrix, symmetric=symmetric), quantized(matrix[rows][:, columns], symmetric=symmetric)
    assert torch.equal(moved.scale, plain.scale[rows])
    assert torch.equal(moved.offset, plain.offset[rows])
    assert torch.equal(moved.codes, plain.codes[rows][:, columns])


def test_negation_negates_codes() -> None:
    matrix = gaussian(8, 12, torch.float32)
    assert torch.equal(quantized(-matrix).codes, -quantized(matrix).codes)


@given(st.integers(-15, 90), st.booleans())
def test_powers_of_two(power: int, symmetric: bool) -> None:
    matrix = gaussian(4, 6, torch.float32)
    plain, scaled = quantized(matrix, symmetric=symmetric), quantized(matrix * 2.0**power, symmetric=symmetric)
    assert torch.equal(scaled.scale, plain.scale * 2.0**power)
    assert torch.equal(scaled.codes, plain.codes)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_zeros(symmetric: bool) -> None:
    matrix = gaussian(3, 5, torch.bfloat16)
    matrix[1] = 0
    found = quantized(matrix, symmetric=symmetric)
    assert float(found.scale[1]) == EPSILON
    assert torch.equal((found.codes[1].float() - found.offset[1]) * found.scale[1], torch.zeros(5))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty_matrices(shape: tuple[int, int]) -> None:
    found = quantized(torch.empty(shape))
    assert found.codes.shape == shape
    assert found.scale.shape == found.offset.shape == (shape[0], 1)
    assert found.sqnr_db == float("inf")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("row", [0, 41])
def test_nan_and_infinity_are_errors(
    bad: float, dtype: torch.dtype, symmetric: bool, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_blocks, "_CACHE_BYTES", 4 * 8 * 4)
    matrix = gaussian(42, 8, dtype)
    matrix[row, 3] = bad
    with pytest.raises(InvalidModelError, match=rf"^w\.weight: .*NaN or infinity in row {row} "):
        quantized(matrix, symmetric=symmetric)


@pytest.mark.parametrize("symmetric", [True, False])
def test_block_size_and_threads_change_nothing(
    symmetric: bool, counted_rows: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = gaussian(50, 16, torch.bfloat16)
    whole = quantized(matrix, symmetric=symmetric)
    before = torch.get_num_threads()
    try:
        for rows in (1, 3, 49, 1000):
            monkeypatch.setattr(row_blocks, "_CACHE_BYTES", rows * 16 * 4)
            for threads in (1, 4):
                torch.set_num_threads(threads)
                source = counted_rows(matrix)
                found = minmax_weight(source, bits=8, symmetric=symmetric, name="w")
                assert torch.get_num_threads() == threads
                assert torch.equal(found.codes, whole.codes)
                assert torch.equal(found.scale, whole.scale)
                assert torch.equal(found.offset, whole.offset)
                assert source.reads == [1] * 50
    finally:
        torch.set_num_threads(before)


def exact_sqnr(matrix: Tensor, found: QuantizedWeight) -> float:
    w = matrix.double()
    back = (found.codes.double() - found.offset.double()) * found.scale.double()
    return float(10 * torch.log10(w.square().sum() / (w - back).square().sum()))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sqnr(symmetric: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = gaussian(256, 64, dtype)
    few = quantized(matrix[:100], symmetric=symmetric)
    assert few.sqnr_db == pytest.approx(exact_sqnr(matrix[:100], few), abs=1e-2)
    one_block = quantized(matrix, symmetric=symmetric)
    assert one_block.sqnr_db == pytest.approx(sqnr_of_rows(matrix, one_block, range(0, 256, 4)), abs=1e-2)
    monkeypatch.setattr(row_blocks, "_CACHE_BYTES", 2 * 64 * 4)
    many_blocks = quantized(matrix, symmetric=symmetric)
    rows = [row for row in range(256) if row // 2 % 8 == 0]
    assert many_blocks.sqnr_db == pytest.approx(sqnr_of_rows(matrix, many_blocks, rows), abs=1e-2)
    for found in (one_block, many_blocks):
        assert found.sqnr_db == pytest.approx(exact_sqnr(matrix, found), abs=0.5)


def sqnr_of_rows(matrix: Tensor, found: QuantizedWeight, rows: Iterable[int]) -> float:
    chosen = list(rows)
    part = QuantizedWeight(found.codes[chosen], found.scale[chosen], found.offset[chosen], 0.0)
    return exact_sqnr(matrix[chosen], part)


def test_sqnr_of_huge_weights_is_finite() -> None:
    matrix = gaussian(8, 16, torch.float32)
    assert quantized(matrix * 2.0**110).sqnr_db == pytest.approx(quantized(matrix).sqnr_db, abs=1e-6)


def test_sqnr_without_noise_is_infinite() -> None:
    assert quantized(torch.tensor([[127.0, -3.0, 0.0]])).sqnr_db == float("inf")
    assert decibels([(4.0, 0.04), (6.0, 0.06)]) == pytest.approx(20.0)
