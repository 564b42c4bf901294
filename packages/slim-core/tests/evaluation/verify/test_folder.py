"""Clean folders have no problem, what is worth a warning is no problem; and what engines load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slim_core.errors import InvalidModelError, SchemaValidateError
from slim_core.evaluation.verify import verify_folder

DOWN = "model.layers.1.mlp.down_proj"
INDEX = "quant_model_weights.safetensors.index.json"


def test_a_clean_folder_has_no_problem(draft: Any, tmp_path: Path) -> None:
    found = verify_folder(draft.write(tmp_path / "out"))
    assert found.ok
    assert not found.problems
    assert not found.warnings
    assert found.checked == len(draft.tensors)
    assert not found.compared
    assert "ok" in found.text()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_clean_folder_agrees_with_its_original(
    new_draft: Callable[[torch.dtype], Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    draft = new_draft(dtype)
    found = verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"))
    assert not found.problems
    assert not found.warnings
    assert found.compared
    assert "compared with the original" in found.text()


def test_one_file_without_index(draft: Any, tmp_path: Path) -> None:
    draft.shards = 1
    folder = draft.write(tmp_path / "out")
    (folder / INDEX).unlink()
    (folder / "quant_model_weights-00001-of-00001.safetensors").rename(folder / "quant_model_weights.safetensors")
    assert not verify_folder(folder).problems


def test_what_engines_load(draft: Any, tmp_path: Path) -> None:
    folder = draft.write(tmp_path / "out")
    found = verify_folder(folder)
    table = {(entry.engine, entry.kind, entry.place): (entry.count, entry.loadable) for entry in found.loadable}
    assert table["vllm-ascend", "W8A8", "linear"] == (10, True)
    assert table["vllm-ascend-310p", "W8A16", "linear"] == (2, False)
    assert "NO CLASS" in found.text()
    assert any("has no class for W8A16" in text for text in verify_folder(folder, engine="vllm-ascend-310p").problems)
    assert not verify_folder(folder, engine="vllm-ascend").problems


def test_static_experts_are_warned_about(draft: Any, tmp_path: Path) -> None:
    draft.add_linear("model.layers.0.mlp.experts.0.down_proj", "W8A16", torch.randn(8, 8))
    found = verify_folder(draft.write(tmp_path / "out"))
    assert not found.problems
    assert any("has no class for W8A16 experts" in warning for warning in found.warnings)


def test_known_types_without_rules_are_warned_about(draft: Any, tmp_path: Path) -> None:
    draft.relabel(DOWN, "W8A8SC")
    found = verify_folder(draft.write(tmp_path / "out"))
    assert not found.problems
    assert any("what has the type W8A8SC is not checked further" in warning for warning in found.warnings)


def test_long_lists_are_cut(draft: Any, tmp_path: Path) -> None:
    for name in list(draft.types):
        draft.types[f"{name}.lost.weight"] = "FLOAT"
    assert "more" in verify_folder(draft.write(tmp_path / "out")).text()


def test_wrong_arguments(draft: Any, tmp_path: Path) -> None:
    folder = draft.write(tmp_path / "out")
    with pytest.raises(InvalidModelError, match="is not a folder"):
        verify_folder(tmp_path / "nothing")
    with pytest.raises(InvalidModelError, match="cannot be read"):
        verify_folder(folder, tmp_path / "nothing")
    with pytest.raises(SchemaValidateError, match="unknown engine"):
        verify_folder(folder, engine="tensorrt")
