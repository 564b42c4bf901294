"""A checkpoint with tensors added to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from slim_core.checkpoint.added import AddedTensors
from slim_core.checkpoint.reader import Checkpoint
from slim_core.checkpoint.source import TensorMeta, TensorSource
from slim_core.errors import InvalidModelError


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    save_file({"a": torch.arange(6).view(3, 2), "b": torch.ones(2)}, tmp_path / "model.safetensors")
    return Checkpoint(tmp_path)


def test_both_are_seen(source: Checkpoint) -> None:
    new = torch.arange(8.0).view(4, 2)
    view: TensorSource = AddedTensors(source, {"new": new})
    assert list(view) == ["a", "b", "new"]
    assert "new" in view
    assert "a" in view
    assert "c" not in view
    assert view.meta("new") == TensorMeta("new", torch.float32, (4, 2))
    assert view.meta("a") == source.meta("a")
    assert view.load("new") is new
    assert torch.equal(view.load("a"), source.load("a"))
    assert torch.equal(view.rows("new", 1, 3), new[1:3])
    assert torch.equal(view.rows("a", 1, 3), source.rows("a", 1, 3))
    assert view.stored("new") is None
    assert view.stored("a") == source.stored("a")
    view.prefetch(["a", "new"])
    view.release_rows("new", 0, 1)
    view.release_rows("a", 0, 1)
    view.release(["a", "new"])
    assert torch.equal(view.load("a"), torch.arange(6).view(3, 2))
    with pytest.raises(InvalidModelError, match="there is no tensor 'c'"):
        view.load("c")


def test_names_are_taken_once(source: Checkpoint) -> None:
    with pytest.raises(InvalidModelError, match="b: the checkpoint has a tensor of this name already"):
        AddedTensors(source, {"c": torch.ones(1), "b": torch.ones(1)})
