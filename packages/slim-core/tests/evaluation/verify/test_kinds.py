"""Clean layers of every kind have no problem."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from slim_core.evaluation.verify import rows as verify_rows

DOWN = "model.layers.1.mlp.down_proj"
PLAIN = "model.layers.1.mlp.fc"  # no engine knows it


@pytest.mark.parametrize("columns", [128, 192])
def test_clean_layers(kinds: ModuleType, every_kind: str, columns: int, draft: Any, tmp_path: Path) -> None:
    kinds.put(draft, every_kind, kinds.matrix(columns=columns))
    found = kinds.verified(draft, tmp_path)
    assert not found.problems, found.text()
    assert not kinds.about_values(found)
    assert found.compared
    assert found.checked == len(draft.tensors)


@pytest.mark.parametrize("name", ["MXFP8", "MXFP4", "FP8", "W8A8S", "W4A4"])
def test_widths_that_are_no_multiple_of_a_block(kinds: ModuleType, name: str, draft: Any, tmp_path: Path) -> None:
    kinds.put(draft, name, kinds.matrix(columns=80))
    found = kinds.verified(draft, tmp_path)
    assert not found.problems, found.text()
    assert not kinds.about_values(found)


def test_many_row_blocks(
    kinds: ModuleType, every_kind: str, draft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_rows, "_BLOCK_ELEMENTS", 300)
    monkeypatch.setattr(verify_rows, "_HELD_ELEMENTS", 600)
    kinds.put(draft, every_kind, kinds.matrix())
    found = kinds.verified(draft, tmp_path)
    assert not found.problems, found.text()
    assert not kinds.about_values(found)


def test_scale_bias_in_one_part(kinds: ModuleType, draft: Any, tmp_path: Path) -> None:
    kinds.put(draft, ("W4A8_DYNAMIC", lambda w: kinds.w4a8(w, 1), 0), kinds.matrix(), PLAIN)
    assert not kinds.verified(draft, tmp_path).problems


def test_rows_of_zeros(kinds: ModuleType, draft: Any, tmp_path: Path) -> None:
    weight = kinds.matrix()
    weight[3] = 0
    kinds.put(draft, "W8A8S", weight)
    assert float(draft.tensors[f"{DOWN}.deq_scale"][3]) == 0.03125
    found = kinds.verified(draft, tmp_path)
    assert not found.problems, found.text()
