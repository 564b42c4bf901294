"""The ssz weight method: never above minmax, below it in total, and the same at every scale."""

from __future__ import annotations

from pathlib import Path

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
from slim_core.quantization.building import needs_of
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.quantization.methods import quantize_weight
from slim_core.quantization.methods import ssz as module
from slim_core.quantization.methods.gptq import GptqOptions, gptq_weight
from slim_core.quantization.methods.minmax import minmax_weight
from slim_core.quantization.methods.ssz import SszOptions, ssz_weight
from slim_core.quantization.row_blocks import energy
from slim_core.quantization.statistics import InputStatistics, Need
from slim_core.quantization.weights import InMemory, QuantizedWeight
from slim_core.recipe.qconfig import LinearQConfig, WeightConfig

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(kind: str, out: int = 24, width: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(out, width, generator=generator)
    if kind == "heavy":
        x = x / torch.randn(3, out, width, generator=generator).square().mean(0).sqrt()
    return x * 0.02


def ssz(
    matrix: Tensor, bits: int = 4, group_size: int = 0, importance: Tensor | None = None, steps: int = 50
) -> QuantizedWeight:
    return ssz_weight(
        InMemory(matrix), bits=bits, group_size=group_size, steps=steps, name="w.weight", importance=importance
    )


def row_errors(matrix: Tensor, found: QuantizedWeight, importance: Tensor | None = None) -> Tensor:
    """Weighted squared error of every row and group ``(out, groups)``, in float64."""
    groups = found.scale.shape[1]
    scale = found.scale.double().repeat_interleave(matrix.shape[1] // groups, 1)
    offset = found.offset.double().repeat_interleave(matrix.shape[1] // groups, 1)
    squares = ((found.codes.double() - offset) * scale - matrix.double()) ** 2
    squares = squares if importance is None else squares * importance.double()
    return squares.reshape(len(matrix), groups, -1).sum(2)


@pytest.mark.parametrize("kind", ["gauss", "heavy"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize("weighted", [False, True])
def test_error_is_never_above_minmax_and_below_it_in_total(
    kind: str, dtype: torch.dtype, bits: int, group_size: int, weighted: bool
) -> None:
    matrix = weights(kind).to(dtype)
    importance = weights("heavy", 1, 64, seed=9).flatten().square().double() if weighted else None
    plain = minmax_weight(InMemory(matrix), bits=bits, symmetric=True, name="w", group_size=group_size)
    found = ssz(matrix, bits, group_size, importance)
    before, after = row_errors(matrix, plain, importance), row_errors(matrix, found, importance)
    assert bool((after <= before).all())
    assert float(after.sum()) < (0.9 if bits == 4 else 0.99) * float(before.sum())
    assert found.codes.dtype == torch.int8
    assert found.scale.shape == (24, 64 // group_size if group_size else 1)
    assert not bool(found.offset.any())
    half = 2 ** (bits - 1)
    assert -half <= int(found.codes.min()) <= int(found.codes.max()) < half


@given(
    st.lists(st.lists(st.floats(-1e3, 1e3, width=16), min_size=4, max_size=4), min_size=1, max_size=6),
    st.sampled_from([4, 8]),
    st.booleans(),
)
def test_never_above_minmax_whatever_the_weights(values: list[list[float]], bits: int, symmetric: bool) -> None:
    matrix = torch.tensor(values)
    plain = minmax_weight(InMemory(matrix), bits=bits, symmetric=symmetric, name="w")
    found = ssz_weight(InMemory(matrix), bits=bits, symmetric=symmetric, name="w")
    assert bool((row_errors(matrix, found) <= row_errors(matrix, plain)).all())
    assert bool((found.scale >= EPSILON).all())


def test_weighting_lowers_the_weighted_error() -> None:
    matrix = weights("heavy", 64, 128)
    importance = weights("heavy", 1, 128, seed=3).flatten().square()
    weighted, plain = ssz(matrix, importance=importance), ssz(matrix)
    ratio = row_errors(matrix, weighted, importance).sum() / row_errors(matrix, plain, importance).sum()
    assert float(ratio) < 0.9
    assert float(row_errors(matrix, plain).sum()) < float(row_errors(matrix, weighted).sum())


@pytest.mark.parametrize("seldom", [0.0, 1e-12, 1e-4])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [0, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_of_inputs_that_were_hardly_seen_are_not_given_up(
    seldom: float, bits: int, group_size: int, symmetric: bool
) -> None:
    """The largest weight of every row stands where calibration saw next to nothing; service may see more."""
    matrix = weights("gauss", 16, 256)
    importance = weights("gauss", 1, 256, seed=2).flatten().square() * 2500
    matrix[:, 5::64] *= 20
    importance[5::64] = seldom

    def made(counts: Tensor | None) -> QuantizedWeight:
        return ssz_weight(
            InMemory(matrix), bits=bits, symmetric=symmetric, group_size=group_size, name="w", importance=counts
        )

    found, plain = (
        made(importance),
        minmax_weight(InMemory(matrix), bits=bits, symmetric=symmetric, name="w", group_size=group_size),
    )
    assert bool((row_errors(matrix, found) <= 2 * row_errors(matrix, plain)).all())
    before, after = row_errors(matrix, plain, importance), row_errors(matrix, found, importance)
    assert bool((after <= before).all())
    assert float(after.sum()) < 0.97 * float(before.sum())
    assert not torch.equal(found.codes, made(None).codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group_size", [0, 16])
def test_half_precision_is_that_of_the_float32_upcast(dtype: torch.dtype, group_size: int) -> None:
    matrix = weights("heavy").to(dtype)
    before = matrix.clone()
    half, full = ssz(matrix, 4, group_size), ssz(matrix.float(), 4, group_size)
    assert torch.equal(matrix, before)
    assert torch.equal(half.codes, full.codes)
    assert torch.equal(half.scale, full.scale)


@pytest.mark.parametrize("bits", [4, 8])
@given(power=st.integers(-8, 80))
def test_powers_of_two(bits: int, power: int) -> None:
    """The reference tool stops at once on small weights, because it stops on an absolute gain."""
    matrix = weights("gauss", 6, 48)
    importance = weights("gauss", 1, 48, seed=1).flatten().square().double()
    plain, scaled = ssz(matrix, bits, 16, importance), ssz(matrix * 2.0**power, bits, 16, importance)
    assert torch.equal(scaled.codes, plain.codes)
    assert torch.equal(scaled.scale, plain.scale * 2.0**power)
    other = ssz(matrix, bits, 16, importance * 4.0**power)
    assert torch.equal(other.codes, plain.codes)


def test_negation_and_permutation() -> None:
    matrix = weights("gauss", 8, 32)
    found = ssz(matrix)
    generator = torch.Generator().manual_seed(0)
    rows, columns = (torch.randperm(size, generator=generator) for size in matrix.shape)
    moved = ssz(matrix[rows][:, columns])
    assert torch.allclose(moved.scale, found.scale[rows], rtol=1e-5)
    assert torch.equal(moved.codes, found.codes[rows][:, columns])
    negated = ssz(-matrix)
    same = (found.codes > -8) & (negated.codes > -8)
    # Only -8 has no counterpart, so rows that use it may choose another scale for their negation.
    rows_alike = same.all(1)
    assert int(rows_alike.sum()) >= 2
    assert torch.equal(negated.codes[rows_alike], -found.codes[rows_alike])


@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (37, 1), (1, 4096)])
@pytest.mark.parametrize("bits", [4, 8])
def test_single_rows_and_columns(shape: tuple[int, int], bits: int) -> None:
    matrix = weights("gauss", *shape)
    plain = minmax_weight(InMemory(matrix), bits=bits, symmetric=True, name="w")
    found = ssz(matrix, bits)
    assert found.scale.shape == (shape[0], 1)
    assert bool((row_errors(matrix, found) <= row_errors(matrix, plain)).all())


def test_rows_of_zeros() -> None:
    matrix = weights("gauss", 3, 8)
    matrix[1] = 0
    found = ssz(matrix)
    assert float(found.scale[1]) == EPSILON
    assert not bool(found.codes[1].any())
    assert ssz(torch.zeros(2, 4)).sqnr_db == float("inf")


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
def test_empty_matrices(shape: tuple[int, int]) -> None:
    found = ssz(torch.empty(shape))
    assert found.codes.shape == shape
    assert found.scale.shape == found.offset.shape == (shape[0], 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", [0, 41])
def test_nan_and_infinity_are_errors(bad: float, dtype: torch.dtype, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "rows_per_block", lambda *_: 4)
    matrix = weights("gauss", 42, 8).to(dtype)
    matrix[row, 3] = bad
    with pytest.raises(InvalidModelError, match=rf"^w\.weight: .*NaN or infinity in row {row} "):
        ssz(matrix)


def test_block_size_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = weights("heavy", 50, 32)
    whole = ssz(matrix, 8, 16)
    before = torch.get_num_threads()
    try:
        for rows in (3, 49):
            monkeypatch.setattr(module, "rows_per_block", lambda *_, rows=rows: rows)
            for threads in (1, 4):
                torch.set_num_threads(threads)
                found = ssz(matrix, 8, 16)
                assert torch.equal(found.codes, whole.codes)
                assert torch.allclose(found.scale, whole.scale, rtol=1e-6, atol=0)
    finally:
        torch.set_num_threads(before)


def test_sqnr() -> None:
    matrix = weights("gauss", 64, 32)
    found = ssz(matrix)
    noise = row_errors(matrix, found).sum()
    assert found.sqnr_db == pytest.approx(float(10 * torch.log10(matrix.double().square().sum() / noise)), abs=1e-3)


@pytest.mark.parametrize("factor", [1.0, 1e30, 1e-30])
def test_energy_at_every_scale(factor: float) -> None:
    matrix = weights("gauss", 5, 7) * factor
    assert energy(matrix) == pytest.approx(float(matrix.double().square().sum()), rel=1e-6)
    assert energy(torch.zeros(2, 3)) == 0


def form(group_size: int = 0) -> LayerForm:
    return LayerForm(LayerKind.W4A8_DYNAMIC, group_size)


def config(**ext: object) -> WeightConfig:
    return WeightConfig.model_validate({"dtype": "int4", "method": "ssz", "ext": ext})


def through_the_recipe(matrix: Tensor, seen: InputStatistics | None, **ext: object) -> QuantizedWeight:
    found = quantize_weight(InMemory(matrix), config(**ext), form(), tensor="a.weight", linear="a", seen=seen)
    assert isinstance(found, QuantizedWeight)
    return found


def test_settings_of_the_recipe() -> None:
    assert SszOptions.of(config().ext) == SszOptions(50, False)
    assert SszOptions.of(config(step=3, weighted=True).ext) == SszOptions(3, True)
    matrix = weights("heavy")
    assert torch.equal(through_the_recipe(matrix, None, step=3).codes, ssz(matrix, steps=3).codes)
    assert not torch.equal(ssz(matrix, 8, steps=1).scale, ssz(matrix, 8, steps=50).scale)


def test_weighted_asks_for_the_channels_and_uses_them(caplog: pytest.LogCaptureFixture) -> None:
    def needs(**ext: object) -> frozenset[Need]:
        return needs_of(LinearQConfig.model_validate({"weight": {"dtype": "int4", "method": "ssz", "ext": ext}}))

    assert needs() == needs(weighted=False) == frozenset()
    assert needs(weighted=True) == {Need.CHANNELS}
    matrix, seen = weights("heavy"), InputStatistics(needs(weighted=True))
    x = weights("heavy", 40, 64, seed=5)
    seen.update(x[None, :15])
    seen.update(x[None, 15:])
    found = through_the_recipe(matrix, seen, weighted=True)
    assert torch.equal(found.codes, ssz(matrix, importance=x.double().square().mean(0)).codes)
    assert not torch.equal(found.codes, ssz(matrix).codes)
    assert not caplog.records
    blind = through_the_recipe(matrix, InputStatistics(), weighted=True)
    assert "a: no calibration sample reached it" in caplog.text
    assert torch.equal(blind.codes, ssz(matrix).codes)


def test_weighted_by_inputs_with_nan() -> None:
    seen = InputStatistics(frozenset({Need.CHANNELS}))
    seen.update(torch.full((1, 2, 64), float("nan")))
    with pytest.raises(InvalidModelError, match=r"^a: its activations hold NaN or infinity"):
        through_the_recipe(weights("gauss"), seen, weighted=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 16), (1, 16), (16, 1)])
def test_a_mapped_file_is_only_read(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """The mapping is read-only: writing to a view of it would end the process."""
    matrix = weights("gauss", *shape).to(dtype)
    save_file({"w.weight": matrix}, tmp_path / "model.safetensors")
    source = Checkpoint(tmp_path)
    lazy = LazyTensor(source, source.meta("w.weight"))
    for group_size in {0, 8} if shape[1] == 16 else {0}:
        found = ssz_weight(lazy, bits=4, group_size=group_size, name="w.weight")
        assert torch.equal(found.codes, ssz(matrix, 4, group_size).codes)
        x = weights("gauss", 30, shape[1])
        seen = InputStatistics(frozenset({Need.HESSIAN}))
        seen.update(x)
        for actorder in (True, False):
            gptq_weight(
                lazy,
                seen.hessian,
                bits=4,
                symmetric=True,
                group_size=group_size,
                options=GptqOptions(actorder=actorder),
                name="w.weight",
                linear="w",
            )
    assert torch.equal(source.load("w.weight"), matrix)
