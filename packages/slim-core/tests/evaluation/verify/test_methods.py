"""How far quantized weights may be from the original is a matter of the method that made them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from slim_core.evaluation.verify import verify_folder

DOWN = "model.layers.1.mlp.down_proj"
HUGE = "its relative error against the original is"


@pytest.mark.parametrize("name", ["W4A4", "W8A8S", "W4A8", "MXFP4"])
def test_rows_with_outliers_lose_much_without_being_wrong(
    kinds: ModuleType, name: str, draft: Any, tmp_path: Path
) -> None:
    kinds.put(draft, name, kinds.outliers())
    found = kinds.verified(draft, tmp_path)
    assert not found.problems, found.text()
    if name != "MXFP4":  # whose blocks are small
        assert any("rows have outliers" in text for text in found.warnings) is (name != "W8A8S")


RECIPE = "spec: {{process: [{{type: linear_quant, qconfig: {{weight: {{method: {}}}}}}}]}}"


def moved(draft: Any, share: float) -> None:
    """What a method does that lets some weights make up for the errors of others."""
    codes = draft.tensors[f"{DOWN}.weight"]
    some = torch.rand(codes.shape, generator=torch.Generator().manual_seed(1)) < share
    draft.tensors[f"{DOWN}.weight"] = (codes + some.to(torch.int8)).clamp(-8, 7)


@pytest.mark.parametrize("method", ["gptq", "ssz", "minmax", "another"])
def test_how_far_a_weight_may_move_is_a_matter_of_its_method(
    kinds: ModuleType, method: str, draft: Any, tmp_path: Path
) -> None:
    kinds.put(draft, "W4A4", kinds.matrix())
    moved(draft, 0.05)
    draft.recipe = RECIPE.format(method)
    found = kinds.verified(draft, tmp_path)
    far = f"{DOWN}.weight: row"
    assert any(text.startswith(far) for text in found.problems) is (method == "minmax"), found.text()
    assert any(text.startswith(far) for text in found.warnings) is (method == "another")


def test_the_method_is_that_of_the_rule_that_took_the_linear(kinds: ModuleType, draft: Any, tmp_path: Path) -> None:
    kinds.put(draft, "W4A4", kinds.matrix())
    moved(draft, 0.05)
    gptq = "{type: linear_quant, include: ['*.down_proj'], qconfig: {weight: {method: gptq}}}"
    minmax = "{type: linear_quant, qconfig: {weight: {method: minmax}}}"
    strategy = "{type: autoround_quant, strategies: [{include: ['*.down_proj'], qconfig: {}}]}"
    for i, (process, wrong) in enumerate(
        [
            (f"[{gptq}, {minmax}]", False),
            (f"[{minmax}, {gptq}]", True),
            (f"[{{type: group, configs: [{gptq}, {minmax}]}}]", False),
            (f"[{{type: group, configs: [{minmax}]}}, {gptq}]", True),
            (f"[{strategy}, {minmax}]", False),
            (f"[{gptq.replace('*.down', '*.{down')}, {minmax}]", False),  # a pattern that cannot be read takes all
        ]
    ):
        draft.recipe = f"spec: {{process: {process}}}"
        folder, original = draft.write(tmp_path / f"out{i}"), draft.write_original(tmp_path / f"model{i}")
        assert any("row" in text for text in verify_folder(folder, original).problems) is wrong


def test_more_than_any_method_means(kinds: ModuleType, draft: Any, tmp_path: Path) -> None:
    kinds.put(draft, "W8A8_DYNAMIC grouped", kinds.matrix())
    draft.recipe = RECIPE.format("gptq")
    draft.roll(f"{DOWN}.weight")
    found = kinds.verified(draft, tmp_path)
    assert any(HUGE in text for text in found.problems), found.text()


def test_methods_that_clip_rows_with_outliers(kinds: ModuleType, draft: Any, tmp_path: Path) -> None:
    weight = kinds.outliers()
    kinds.put(draft, "W4A4", weight)
    scale = draft.tensors[f"{DOWN}.weight_scale"] * 0.9
    draft.tensors[f"{DOWN}.weight_scale"] = scale
    draft.tensors[f"{DOWN}.weight"] = (weight.float() / scale).round().clamp(-8, 7).to(torch.int8)
    draft.recipe = RECIPE.format("ssz")
    found = kinds.verified(draft, tmp_path)
    assert not found.problems, found.text()
    assert any("it is what ssz does to rows with outliers" in text for text in found.warnings)
