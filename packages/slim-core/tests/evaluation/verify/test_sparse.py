"""Pruned weights and sparse codes: what is said about them, and what they may change."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from slim_core.evaluation.verify import verify_folder

DOWN = "model.layers.1.mlp.down_proj"


def test_pruned_models_are_compared_too(kinds: ModuleType, draft: Any, tmp_path: Path) -> None:
    kinds.put(draft, "W16A16S", kinds.matrix())
    draft.recipe = "spec: {process: [{type: float_sparse}, {type: linear_quant, qconfig: {weight: {method: minmax}}}]}"
    found = kinds.verified(draft, tmp_path)
    assert found.compared
    assert not found.problems
    assert found.notes == ["W16A16S: 30.1% to 30.1% of the weights are zero (1 layers)"]
    assert "Notes (1)" in found.text()


def test_sparse_codes_are_counted(kinds: ModuleType, draft: Any, tmp_path: Path) -> None:
    kinds.put(draft, "W8A8S", kinds.matrix())
    (note,) = kinds.verified(draft, tmp_path).notes
    assert note == "W8A8S: 99.0% to 99.0% of the codes fit four bits (1 layers)"


def test_a_pruned_bias_keeps_its_type(kinds: ModuleType, draft: Any, tmp_path: Path) -> None:
    kinds.put(draft, "W16A16S", kinds.matrix())
    bias = torch.randn(kinds.OUT, generator=torch.Generator().manual_seed(4)).bfloat16()
    draft.tensors[f"{DOWN}.bias"], draft.original[f"{DOWN}.bias"] = bias, bias
    draft.types[f"{DOWN}.bias"] = "W16A16S"
    assert not kinds.verified(draft, tmp_path).problems
    draft.types[f"{DOWN}.bias"] = "FLOAT"
    found = verify_folder(draft.write(tmp_path / "other"))
    assert any(f"{DOWN}.bias: has the type FLOAT, expected W16A16S" in text for text in found.problems)
