"""What a folder holds, counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slim_core.errors import InvalidModelError
from slim_core.evaluation.inspect import inspect_folder


def test_quantized_folder(draft: Any, tmp_path: Path) -> None:
    found = inspect_folder(draft.write(tmp_path / "out"))
    assert (found.format, found.model_quant_type) == ("ascendv1", "W8A8")
    assert found.tensors == len(draft.tensors)
    assert found.nbytes == sum(tensor.nbytes for tensor in draft.tensors.values())
    assert {kind: tally.modules for kind, tally in found.types.items()} == {
        "FLOAT": 5,
        "W8A8": 10,
        "W8A8_DYNAMIC": 2,
        "W8A16": 2,
    }
    assert found.leaves["q_proj", "W8A8"].modules == 2
    assert found.leaves["q_proj", "W8A8"].tensors == 2 * 6
    assert list(found.float_linears) == ["model.embed_tokens", "lm_head"]
    assert found.global_keys["group_size"] == 0
    assert sum(tally.tensors for tally in found.shards.values()) == found.tensors
    assert found.files["config.json"] > 0


def test_text_of_a_quantized_folder(draft: Any, tmp_path: Path) -> None:
    lines = inspect_folder(draft.write(tmp_path / "out")).text().splitlines()
    assert f"format ascendv1, type W8A8, {len(draft.tensors)} tensors, 9.0 KiB" in lines
    assert any(line.split()[:3] == ["down_proj", "W8A8_DYNAMIC", "2"] for line in lines)
    assert "not quantized (2)" in lines
    assert "  lm_head" in lines
    assert any(line.startswith("quant_model_weights-00002-of-00002.safetensors") for line in lines)


def test_float_folder(draft: Any, tmp_path: Path) -> None:
    found = inspect_folder(draft.write_original(tmp_path / "model"))
    assert (found.format, found.model_quant_type) == ("float", None)
    assert list(found.types) == ["BF16"]
    assert found.leaves["q_proj", "BF16"].tensors == 4
    text = found.text()
    assert "dtype" in text
    assert "not quantized" not in text


def test_many_float_linears_are_cut(draft: Any, tmp_path: Path) -> None:
    for i in range(20):
        draft.add_float(f"model.extra.{i}.weight", draft.original["model.embed_tokens.weight"])
    assert "... and 10 more" in inspect_folder(draft.write(tmp_path / "out")).text()


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError):
        inspect_folder(tmp_path)
