"""FP8 sources: decoding equals a naive loop, and the view looks like an ordinary bf16 checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from slim_core.checkpoint.fp8_blocks import Fp8BlockSource, decode_fp8_blocks, fp8_block_shape
from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.source import TensorMeta
from slim_core.errors import InvalidModelError

FP8 = torch.float8_e4m3fn


def naive(weight: Tensor, scale_inv: Tensor, block: tuple[int, int]) -> Tensor:
    """Product in float64, rounded to float32 and from there to bf16, as float32 arithmetic does."""
    rows, columns = weight.shape
    values = torch.empty(rows, columns, dtype=torch.float64)
    for r in range(rows):
        for c in range(columns):
            factor = scale_inv[r // block[0], c // block[1]].double()
            values[r, c] = weight.float()[r, c].double() * factor
    return values.float().bfloat16()


def any_weight(
    rows: int, columns: int, block: tuple[int, int], seed: int, dtype: torch.dtype = FP8
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).mul_(50).to(dtype)
    factors = torch.rand(-(-rows // block[0]), -(-columns // block[1]), generator=generator)
    return weight, factors * 10 ** (seed % 5 - 3)


sides = st.integers(1, 9)


@settings(max_examples=80, deadline=None)
@given(sides, sides, sides, sides, st.integers(0, 99), st.sampled_from([FP8, torch.float8_e5m2]), st.data())
def test_decoding_equals_the_naive_loop(
    rows: int, columns: int, high: int, wide: int, seed: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    block = (high, wide)
    weight, factors = any_weight(rows, columns, block, seed, dtype)
    want = naive(weight, factors, block)
    decoded = decode_fp8_blocks(weight, factors, block)
    assert decoded.dtype == torch.bfloat16
    assert torch.equal(decoded, want)
    start = data.draw(st.integers(0, rows))
    stop = data.draw(st.integers(start, rows))
    assert torch.equal(decode_fp8_blocks(weight[start:stop], factors, block, start), want[start:stop])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e8m0fnu])
def test_factors_may_be_of_lower_precision(dtype: torch.dtype) -> None:
    weight, factors = any_weight(5, 5, (2, 2), 7)
    assert torch.equal(
        decode_fp8_blocks(weight, factors.to(dtype), (2, 2)), naive(weight, factors.to(dtype).float(), (2, 2))
    )


BLOCK = (4, 3)
WEIGHT, FACTORS = any_weight(10, 7, BLOCK, 3)
TENSORS = {
    "w.weight": WEIGHT,
    "w.weight_scale_inv": FACTORS,
    "norm.weight": torch.ones(7, dtype=torch.bfloat16),
    "plain.weight": torch.randn(3, 3).bfloat16(),
    "plain.weight_scale_inv": torch.ones(1, 1),
    "kv_scale": torch.ones(2).to(FP8),
}


def source(folder: Path, block: tuple[int, int] = BLOCK, **changes: Tensor | None) -> Fp8BlockSource:
    tensors = {**TENSORS, **{key.replace("__", "."): value for key, value in changes.items()}}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")
    return Fp8BlockSource(Checkpoint(folder), block)


def test_the_view_hides_the_factors(tmp_path: Path) -> None:
    view = source(tmp_path)
    assert set(view) == set(TENSORS) - {"w.weight_scale_inv"}
    assert all(name in view for name in view)
    assert "w.weight_scale_inv" not in view
    assert "plain.weight_scale_inv" in view  # stands beside a weight that is not encoded: an ordinary tensor
    assert "absent" not in view
    assert 3 not in view
    assert view.meta("w.weight") == TensorMeta("w.weight", torch.bfloat16, (10, 7))
    assert view.meta("norm.weight").dtype == torch.bfloat16
    assert view.stored("w.weight") is None
    assert view.stored("norm.weight") is not None
    for use in (view.meta, view.load, view.stored, lambda name: view.rows(name, 0, 1)):
        with pytest.raises(InvalidModelError, match=r"no tensor 'w\.weight_scale_inv': it is part"):
            use("w.weight_scale_inv")
        with pytest.raises(InvalidModelError, match="no tensor 'absent'"):
            use("absent")


def test_tensors_that_are_not_encoded_pass(tmp_path: Path) -> None:
    view = source(tmp_path)
    for name in ("norm.weight", "plain.weight"):
        assert torch.equal(view.load(name), TENSORS[name])
        assert torch.equal(view.rows(name, 1, 3), TENSORS[name][1:3])
    assert view.load("kv_scale").dtype == FP8


def test_rows_with_any_bounds(tmp_path: Path) -> None:
    view = source(tmp_path)
    want = naive(WEIGHT, FACTORS, BLOCK)
    assert torch.equal(view.load("w.weight"), want)
    for start in range(-12, 12):
        for stop in range(-12, 12):
            assert torch.equal(view.rows("w.weight", start, stop), want[start:stop]), (start, stop)


def test_reading_ahead_and_releasing_take_the_factors_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = source(tmp_path)
    seen: list[list[str]] = []
    for method in ("prefetch", "release"):
        monkeypatch.setattr(view._inner, method, lambda names: seen.append(list(names)))
    view.prefetch(name for name in ("w.weight", "norm.weight"))
    view.release(["plain.weight"])
    assert seen == [["w.weight", "norm.weight", "w.weight_scale_inv"], ["plain.weight"]]
    monkeypatch.undo()
    view.load("w.weight")
    view.release(view)
    view.prefetch(view)
    assert torch.equal(view.load("w.weight"), naive(WEIGHT, FACTORS, BLOCK))


DEFECTS: list[tuple[dict[str, Tensor | None], str]] = [
    ({"w__weight_scale_inv": None}, r"w\.weight: float8 tensor has no 'w.weight_scale_inv'"),
    (
        {"w__weight_scale_inv": torch.ones(3, 2)},
        r"w\.weight_scale_inv: has shape \[3, 2\], expected \[3, 3\] for blocks",
    ),
    ({"w__weight_scale_inv": torch.ones(3, 3, 1)}, r"has shape \[3, 3, 1\]"),
    ({"w__weight_scale_inv": torch.ones(())}, r"has shape \[\]"),
    ({"w__weight_scale_inv": torch.ones(3, 3, dtype=torch.int32)}, "holds torch.int32, expected a floating"),
    ({"w__weight": torch.ones(2, 10, 7).to(FP8)}, r"w\.weight: block-quantized tensor is no matrix.*\[2, 10, 7\]"),
    ({"w__weight": torch.ones(10).to(FP8)}, r"is no matrix, its shape is \[10\]"),
    ({"experts": torch.ones(2, 3, 4).to(FP8)}, "experts: float8 tensor has no 'experts_scale_inv'"),
    ({"experts": torch.ones(3, 4).to(torch.float8_e5m2)}, "experts: float8 tensor has no"),
]


@pytest.mark.parametrize(("changes", "message"), DEFECTS)
def test_what_does_not_fit_together(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidModelError, match=message):
        source(tmp_path, **changes)


def test_the_block_shape_counts(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match=r"expected \[1, 1\] for blocks of \(128, 128\)"):
        source(tmp_path, (128, 128))


CONFIGS: list[tuple[Any, tuple[int, int] | None]] = [
    ({}, None),
    ({"quantization_config": None}, None),
    ({"quantization_config": "fp8"}, None),
    ({"quantization_config": {"quant_method": "awq"}}, None),
    ({"quantization_config": {"quant_method": "fp8"}}, (128, 128)),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}, (128, 128)),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 32]}}, (64, 32)),
]


@pytest.mark.parametrize(("config", "shape"), CONFIGS)
def test_the_block_shape_of_a_configuration(config: dict[str, Any], shape: tuple[int, int] | None) -> None:
    assert fp8_block_shape(config) == shape


@pytest.mark.parametrize("block", [[128], [128, 128, 1], [0, 128], [128, -1], [1.5, 2], "128", 128, {"a": 1}, []])
def test_a_block_shape_that_is_none(block: Any) -> None:
    with pytest.raises(InvalidModelError, match="weight_block_size: must be two positive numbers"):
        fp8_block_shape({"quantization_config": {"quant_method": "fp8", "weight_block_size": block}})
