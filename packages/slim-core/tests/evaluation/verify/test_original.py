"""Folders held against the model they were made from, where recipes leave something to compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slim_core.evaluation.verify import rows as verify_rows
from slim_core.evaluation.verify import verify_folder

Q = "model.layers.0.self_attn.q_proj"
O = "model.layers.1.self_attn.o_proj"  # noqa: E741
DOWN = "model.layers.1.mlp.down_proj"
LAYER = "model.layers.0"
NORM = f"{LAYER}.input_layernorm"
AGAINST_ORIGINAL: dict[str, tuple[Callable[[Any], Any], str]] = {
    "tensor lost": (lambda d: d.drop("model.norm.weight"), "model.norm.weight: is in the original but missing here"),
    "float changed": (lambda d: d.set("model.norm.weight", 0, 0.125), "model.norm.weight: differs from the original"),
    "float converted": (
        lambda d: d.retype("model.norm.weight", torch.float32),
        "model.norm.weight: is float32 [16], the original bfloat16 [16]",
    ),
    "one code": (lambda d: d.set(f"{DOWN}.weight", (4, 5), 99), "row 4 is off by"),
    "rows swapped": (lambda d: d.roll(f"{DOWN}.weight"), f"{DOWN}.weight: its relative error against the original is"),
    "scale doubled": (
        lambda d: d.times(f"{DOWN}.weight_scale", 2),
        f"{DOWN}.weight: its relative error against the original is 100",
    ),
    "bias changed": (
        lambda d: d.original.update({f"{Q}.bias": d.original[f"{Q}.bias"] + 1}),
        f"{Q}.bias: differs from the bias of the original",
    ),
    "bias from nowhere": (lambda d: d.original.pop(f"{Q}.bias"), f"{Q}.bias: the original linear has no bias"),
    "weight from nowhere": (
        lambda d: d.original.pop(f"{DOWN}.weight"),
        f"{DOWN}.weight: is quantized, but the original has no such weight",
    ),
    "another shape": (
        lambda d: d.original.update({f"{DOWN}.weight": d.original[f"{DOWN}.weight"].T.contiguous()}),
        f"{DOWN}.weight: has shape [16, 32], the original [32, 16]",
    ),
}


@pytest.mark.parametrize("fault", AGAINST_ORIGINAL)
def test_fault_against_the_original(fault: str, draft: Any, tmp_path: Path) -> None:
    change, message = AGAINST_ORIGINAL[fault]
    change(draft)
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert any(message in problem for problem in found.problems), found.text()


def test_a_head_that_the_original_has_for_itself_too(draft: Any, tmp_path: Path) -> None:
    """Some classes never tie, whatever the configuration says."""
    draft.tensors["lm_head.weight"] = draft.original["lm_head.weight"] = draft.tensors["lm_head.weight"] + 1
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert found.ok, found.text()
    assert any("lm_head.weight: differs from model.embed_tokens.weight" in text for text in found.warnings)


def test_experts_without_weights_of_their_own_may_lie_in_a_stack(draft: Any, tmp_path: Path) -> None:
    """LongCat stacks rows for its identity experts, of gate and up alone; nothing quantizes them."""
    for expert in range(3):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.0.mlp.experts.{expert}.{leaf}"
            if expert < 2:
                draft.add_linear(name, "W8A8_DYNAMIC", torch.randn(8, 8))
            elif leaf != "down_proj":
                draft.add_float(f"{name}.weight", torch.randn(8, 8).bfloat16())
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert found.ok, found.text()


def test_another_model(new_draft: Callable[[torch.dtype], Any], draft: Any, tmp_path: Path) -> None:
    other = new_draft(torch.bfloat16)
    other.original = {name: tensor + 1 for name, tensor in other.original.items()}
    found = verify_folder(draft.write(tmp_path / "out"), other.write_original(tmp_path / "model"))
    assert any("4 of 5 float tensors differ" in warning for warning in found.warnings)


def test_missing_tokenizer(draft: Any, tmp_path: Path) -> None:
    folder, original = draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    assert any("tokenizer.json" in problem for problem in verify_folder(folder, original).problems)


def test_without_a_recipe_an_unusual_code_is_a_warning(draft: Any, tmp_path: Path) -> None:
    draft.recipe = None
    code = int(draft.tensors[f"{DOWN}.weight"][4, 5])
    draft.set(f"{DOWN}.weight", (4, 5), code + 1 if code < 127 else 126)
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert not found.problems
    assert any("row 4 is off by" in warning for warning in found.warnings)


def recipe_with(processor: str) -> str:
    return f"spec: {{process: [{processor}, {{type: linear_quant, qconfig: {{weight: {{method: minmax}}}}}}]}}"


@pytest.mark.parametrize("processor", ["iter_smooth", "kv_smooth", "awq"])
def test_layers_of_smoothed_models_are_not_compared(draft: Any, tmp_path: Path, processor: str) -> None:
    draft.recipe = recipe_with(f"{{type: {processor}}}")
    draft.set(f"{NORM}.weight", 0, 0.125)
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert not found.problems
    assert not found.compared
    assert any(
        f"within decoder layers were not compared: the recipe changes them first ({processor})" in warning
        for warning in found.warnings
    )


def test_what_smoothing_does_not_touch_is_compared(draft: Any, tmp_path: Path) -> None:
    draft.recipe = recipe_with("{type: iter_smooth}")
    draft.set("model.norm.weight", 0, 0.125)
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert found.problems == ["model.norm.weight: differs from the original, expected the same bits"]


def test_rotated_models_are_not_compared(draft: Any, tmp_path: Path) -> None:
    draft.recipe = recipe_with("{type: quarot}, {type: iter_smooth}")
    draft.set("model.norm.weight", 0, 0.125)
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert not found.problems
    assert not found.compared
    assert any("changes float weights first (iter_smooth, quarot)" in warning for warning in found.warnings)


def test_rows_with_outliers_lose_much_without_being_wrong(draft: Any, tmp_path: Path) -> None:
    weight = torch.full((16, 512), 0.01) * torch.randn(16, 512, generator=torch.Generator().manual_seed(1))
    weight[:, 0] = 10
    draft.add_linear(DOWN, "W8A8_DYNAMIC", weight)
    small = weight.clone()
    small[:, 0] = 0.2
    draft.add_linear("model.layers.0.mlp.down_proj", "W8A8_DYNAMIC", small)
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert not found.problems
    assert any("rows have outliers" in warning for warning in found.warnings)


def test_asymmetric_weights_are_compared_and_warned_about(draft: Any, tmp_path: Path) -> None:
    weight = draft.original[f"{O}.weight"].float()
    low, high = weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    offset = (-low / scale).round() - 128
    draft.tensors[f"{O}.weight"] = (weight / scale + offset).round().clamp(-128, 127).to(torch.int8)
    draft.tensors[f"{O}.weight_scale"], draft.tensors[f"{O}.weight_offset"] = scale, offset
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert not found.problems
    assert any("quantize symmetrically" in warning for warning in found.warnings)


def test_fp8_originals_are_decoded(draft: Any, tmp_path: Path) -> None:
    codes = torch.randn(16, 32, generator=torch.Generator().manual_seed(2)).to(torch.float8_e4m3fn)
    factor = torch.tensor([[0.5]])
    exact = (codes.float() * factor).to(torch.bfloat16)
    draft.add_linear(DOWN, "W8A8_DYNAMIC", exact)
    draft.original[f"{DOWN}.weight"], draft.original[f"{DOWN}.weight_scale_inv"] = codes, factor
    out = draft.write(tmp_path / "out")
    draft.config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    found = verify_folder(out, draft.write_original(tmp_path / "model"))
    assert not found.problems
    assert not found.warnings


def test_tensors_of_many_row_blocks(draft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_rows, "_BLOCK_ELEMENTS", 48)
    monkeypatch.setattr(verify_rows, "_HELD_ELEMENTS", 96)
    original = draft.write_original(tmp_path / "model")
    clean = verify_folder(draft.write(tmp_path / "clean"), original)
    assert not clean.problems
    draft.set(f"{DOWN}.weight", (13, 5), 99)
    draft.set("model.embed_tokens.weight", (22, 3), 0.125)
    found = verify_folder(draft.write(tmp_path / "out"), original)
    for place in ("row 13 is off by", "model.embed_tokens.weight: differs from the", "lm_head.weight: differs"):
        assert any(place in problem for problem in found.problems), found.text()
