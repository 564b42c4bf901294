"""The sparse weight method: most codes fit four bits, nothing is clipped."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
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
from slim_core.quantization.affine import EPSILON
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.quantization.methods import quantize_weight, sparse
from slim_core.quantization.methods.minmax import minmax_weight
from slim_core.quantization.methods.sparse import sparse_weight
from slim_core.quantization.weights import InMemory, QuantizedWeight
from slim_core.recipe import WeightConfig

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FRACTIONS = [0.0, 0.01, 0.05, 0.1, 0.5, 1.0]


def quantized(matrix: Tensor, **options: Any) -> QuantizedWeight:
    return sparse_weight(InMemory(matrix), name="w.weight", **options)


def gaussian(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Gaussian rows of different size, with a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    matrix[:, :: max(columns // 3, 1)] *= 8
    return matrix.to(dtype)


def naive(matrix: Tensor, fraction: float, sigma: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Codes before rounding, and scales, row by row in float64."""
    w = matrix.double().numpy()
    scales = np.ones((len(w), 1))
    for row, scale in zip(w, scales, strict=True):
        magnitude = np.abs(row)
        if sigma is None:
            count = min(int(np.ceil(round(fraction * len(row), 9))), len(row))
            free = np.sort(magnitude)[: len(row) - count]
        else:
            free = magnitude[np.abs(row - row.mean()) <= sigma * row.std()]
        if magnitude.any():
            scale[0] = max(free.max(initial=0) / 7, magnitude.max() / 127, EPSILON)
    return w / scales, scales


def check(matrix: Tensor, found: QuantizedWeight, fraction: float, sigma: float | None) -> None:
    steps, scales = naive(matrix, fraction, sigma)
    assert np.allclose(found.scale.numpy(), scales, rtol=1e-6)
    assert np.abs(found.codes.numpy() - steps).max() <= 0.5 + 1e-4
    assert found.codes.dtype == torch.int8
    assert not found.offset.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("width", [1, 7, 100, 333])
def test_equals_naive_float64(dtype: torch.dtype, fraction: float, width: int) -> None:
    matrix = gaussian(9, width, dtype)
    check(matrix, quantized(matrix, fraction=fraction), fraction, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sigma", [0.5, 3.0, 4.0, 100.0])
@pytest.mark.parametrize("width", [1, 7, 333])
def test_sigma_equals_naive_float64(dtype: torch.dtype, sigma: float, width: int) -> None:
    matrix = gaussian(9, width, dtype)
    check(matrix, quantized(matrix, use_sigma=True, sigma_factor=sigma), 0.0, sigma)


@given(st.integers(0, 2**31), st.integers(1, 60), st.sampled_from(FRACTIONS), st.booleans())
def test_most_codes_are_narrow_and_none_is_clipped(seed: int, width: int, fraction: float, use_sigma: bool) -> None:
    matrix = gaussian(4, width, seed=seed)
    found = quantized(matrix, fraction=fraction, use_sigma=use_sigma)
    error = (found.codes.double() * found.scale.double() - matrix.double()).abs()
    assert bool((error <= found.scale.double() * (0.5 + 1e-5)).all())
    assert int(found.codes.min()) >= -127
    if not use_sigma:
        wide = (found.codes.abs() > 7).sum(1)
        assert int(wide.max()) <= int(np.ceil(fraction * width))


def test_protecting_more_is_more_exact_and_less_sparse() -> None:
    matrix = gaussian(32, 1024)
    by_fraction = [quantized(matrix, fraction=f) for f in FRACTIONS]
    by_sigma = [quantized(matrix, use_sigma=True, sigma_factor=s) for s in (6.0, 4.0, 3.5, 3.0, 1.0)]
    for results in (by_fraction, by_sigma):
        for less, more in pairwise(results):
            assert bool((more.scale <= less.scale).all())
            assert more.sqnr_db >= less.sqnr_db
            assert int((more.codes.abs() > 7).sum()) >= int((less.codes.abs() > 7).sum())
        assert results[-1].sqnr_db > results[0].sqnr_db + 10


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"fraction": 1.0}, {"use_sigma": True, "sigma_factor": 1e-6}])
def test_with_everything_protected_it_is_minmax(dtype: torch.dtype, options: dict[str, Any]) -> None:
    matrix = gaussian(8, 96, dtype)
    plain = minmax_weight(InMemory(matrix), bits=8, symmetric=True, name="w")
    found = quantized(matrix, **options)
    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(found.scale, plain.scale)


def entropy(codes: Tensor) -> float:
    """Bits per code."""
    share = torch.bincount(codes.flatten().int() + 128, minlength=256).double() / codes.numel()
    share = share[share > 0]
    return float(-(share * share.log2()).sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options", [{}, {"fraction": 0.1}, {"use_sigma": True}, {"use_sigma": True, "sigma_factor": 4}]
)
def test_codes_have_less_entropy_than_those_of_minmax(seed: int, options: dict[str, Any]) -> None:
    matrix = torch.randn(16, 2048, generator=torch.Generator().manual_seed(seed))
    matrix[:, ::257] *= 4
    plain = minmax_weight(InMemory(matrix), bits=8, symmetric=True, name="w")
    assert entropy(quantized(matrix, **options).codes) < entropy(plain.codes) - 1.5


def test_worked_row() -> None:
    row = torch.tensor([[0.1, -0.7, 0.35, 8.0]])
    found = quantized(row, fraction=0.25)
    assert found.scale.tolist() == [[pytest.approx(0.1)]]
    assert found.codes.tolist() == [[1, -7, 3 if float(row[0, 2] / found.scale) < 3.5 else 4, 80]]
    wide = quantized(torch.tensor([[0.1, -0.7, 0.35, 25.4]]), fraction=0.25)
    assert wide.scale.tolist() == [[pytest.approx(0.2)]]  # else 25.4 would be clipped
    assert wide.codes.tolist()[0][3] == 127


@pytest.mark.parametrize("use_sigma", [False, True])
def test_rows_of_zeros_and_of_one_value(use_sigma: bool) -> None:
    matrix = torch.zeros(4, 10)
    matrix[1], matrix[2], matrix[3] = 0.7, -0.7, 1e-30
    found = quantized(matrix, use_sigma=use_sigma)
    assert found.scale.flatten().tolist() == [1.0, pytest.approx(0.1), pytest.approx(0.1), EPSILON]
    assert found.codes.tolist() == [[0] * 10, [7] * 10, [-7] * 10, [0] * 10]


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty_matrices(shape: tuple[int, int]) -> None:
    found = quantized(torch.empty(shape))
    assert found.codes.shape == shape
    assert found.scale.shape == found.offset.shape == (shape[0], 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("use_sigma", [False, True])
@pytest.mark.parametrize("row", [0, 41])
def test_nan_and_infinity_are_errors(
    bad: float, dtype: torch.dtype, use_sigma: bool, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "rows_per_block", lambda _width, _device: 4)
    matrix = gaussian(42, 8, dtype)
    matrix[row, 3] = bad
    with pytest.raises(InvalidModelError, match=rf"^w\.weight: .*NaN or infinity in row {row} "):
        quantized(matrix, use_sigma=use_sigma)


@pytest.mark.parametrize("use_sigma", [False, True])
def test_rows_are_read_once_and_blocks_change_nothing(
    use_sigma: bool, counted_rows: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = gaussian(50, 16, torch.bfloat16)
    whole = quantized(matrix, use_sigma=use_sigma)
    for rows in (1, 3, 49):
        monkeypatch.setattr(sparse, "rows_per_block", lambda _width, _device, rows=rows: rows)
        source = counted_rows(matrix)
        found = sparse_weight(source, use_sigma=use_sigma, name="w")
        assert torch.equal(found.codes, whole.codes)
        assert torch.equal(found.scale, whole.scale)
        assert found.sqnr_db == pytest.approx(whole.sqnr_db)
        assert source.reads == [1] * 50


def test_half_precision_is_as_its_float32_copy() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        half = gaussian(9, 64, dtype)
        one, two = quantized(half), quantized(half.float())
        assert torch.equal(one.codes, two.codes)
        assert torch.equal(one.scale, two.scale)


@given(st.integers(-15, 90), st.booleans())
def test_powers_of_two(power: int, use_sigma: bool) -> None:
    matrix = gaussian(4, 40)
    plain, scaled = quantized(matrix, use_sigma=use_sigma), quantized(matrix * 2.0**power, use_sigma=use_sigma)
    assert torch.equal(scaled.codes, plain.codes)
    assert torch.equal(scaled.scale, plain.scale * 2.0**power)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mapped_file_is_only_read(tmp_path: Path, dtype: torch.dtype) -> None:
    """The mapping is read-only: writing to a view of it would end the process."""
    matrix = gaussian(9, 11, dtype)
    save_file({"w.weight": matrix}, tmp_path / "model.safetensors")
    source = Checkpoint(tmp_path)
    lazy = LazyTensor(source, source.meta("w.weight"))
    for use_sigma in (False, True):
        found = sparse_weight(lazy, name="w.weight", use_sigma=use_sigma)
        assert torch.equal(found.codes, quantized(matrix, use_sigma=use_sigma).codes)


@pytest.mark.parametrize("ext", [{}, {"fraction": 0.2}, {"use_sigma": True}, {"use_sigma": True, "sigma_factor": 1.5}])
def test_a_recipe_reaches_it(ext: dict[str, Any]) -> None:
    matrix = gaussian(6, 200)
    config = WeightConfig.model_validate({"method": "sparse", "ext": ext})
    found = quantize_weight(InMemory(matrix), config, LayerForm(LayerKind.W8A8S), tensor="w.weight", linear="w")
    assert torch.equal(found.codes, quantized(matrix, **ext).codes)
    assert torch.equal(found.scale, quantized(matrix, **ext).scale)


def test_sqnr() -> None:
    matrix = gaussian(8, 300)
    found = quantized(matrix)
    noise = (matrix.double() - found.dequantized().double()).square().sum()
    assert found.sqnr_db == pytest.approx(float(10 * torch.log10(matrix.double().square().sum() / noise)), abs=1e-3)
