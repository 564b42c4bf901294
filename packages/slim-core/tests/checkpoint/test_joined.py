"""Tensors that are stored in parts: the numbers that plain concatenation gives, and what is stored comes once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from slim_core.checkpoint.joined import JoinedSource, Part
from slim_core.checkpoint.reader import Checkpoint
from slim_core.errors import InvalidModelError

TENSORS: dict[str, Tensor] = {
    "q.weight": torch.arange(6.0).view(3, 1, 2),
    "k.weight": torch.arange(8.0).view(4, 1, 2) + 10,
    "v.weight": torch.arange(2.0).view(1, 1, 2) + 20,
    "wide.weight": torch.zeros(3, 1, 5),
    "half.weight": torch.zeros(3, 1, 2, dtype=torch.bfloat16),
    "scalar": torch.tensor(1.0),
}
PARTS = ("q.weight", "k.weight", "v.weight")
WHOLE = torch.cat([TENSORS[part] for part in PARTS])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return Checkpoint(tmp_path)


def test_the_whole_is_its_parts_in_order(checkpoint: Checkpoint) -> None:
    source = JoinedSource(checkpoint, {"conv.weight": PARTS})
    meta = source.meta("conv.weight")
    assert (meta.name, meta.dtype, meta.shape) == ("conv.weight", torch.float32, (8, 1, 2))
    assert torch.equal(source.load("conv.weight"), WHOLE)
    assert source.stored("conv.weight") is None
    for start in range(9):
        for stop in range(9):
            assert torch.equal(source.rows("conv.weight", start, stop), WHOLE[start:stop]), (start, stop)


def test_what_is_stored_comes_once_and_as_it_is(checkpoint: Checkpoint) -> None:
    source = JoinedSource(checkpoint, {"conv.weight": PARTS})
    assert sorted(source) == sorted(TENSORS)
    assert "conv.weight" in source
    assert "k.weight" in source
    assert "other.weight" not in source
    assert torch.equal(source.load("k.weight"), TENSORS["k.weight"])
    assert torch.equal(source.rows("k.weight", 1, 3), TENSORS["k.weight"][1:3])
    assert source.stored("k.weight") == checkpoint.stored("k.weight")
    assert source.meta("k.weight") == checkpoint.meta("k.weight")


def test_to_read_ahead_and_to_release_the_whole_is_to_do_so_with_its_parts(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []
    for method in ("prefetch", "release"):
        monkeypatch.setattr(checkpoint, method, lambda names, method=method: asked.append((method, list(names))))
    monkeypatch.setattr(checkpoint, "release_rows", lambda name, *_: asked.append(("rows", [name])))
    source = JoinedSource(checkpoint, {"conv.weight": PARTS})
    source.prefetch(["conv.weight", "scalar"])
    source.release(["scalar", "conv.weight"])
    source.release_rows("conv.weight", 0, 1)
    source.release_rows("k.weight", 0, 1)
    assert asked == [
        ("prefetch", [*PARTS, "scalar"]),
        ("release", ["scalar", *PARTS]),
        ("release", [*PARTS]),
        ("rows", ["k.weight"]),
    ]


@pytest.mark.parametrize(
    ("name", "parts", "message"),
    [
        ("scalar", PARTS, r"scalar: is stored, and its parts too \('q.weight'\)"),
        ("conv.weight", ("q.weight", "wide.weight"), r"do not fit together: 'q.weight' \[3, 1, 2\], 'wide.weight'"),
        ("conv.weight", ("q.weight", "half.weight"), "do not fit together"),
        ("conv.weight", ("scalar",), "do not fit together"),
    ],
)
def test_parts_that_do_not_belong_together(
    checkpoint: Checkpoint, name: str, parts: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InvalidModelError, match=message):
        JoinedSource(checkpoint, {name: parts})


def test_rows_of_a_larger_tensor(checkpoint: Checkpoint) -> None:
    parts = {"a": (Part("k.weight", range(2)),), "b": (Part("k.weight", range(2, 4)), "v.weight")}
    source = JoinedSource(checkpoint, parts)
    assert torch.equal(source.load("a"), TENSORS["k.weight"][:2])
    whole = torch.cat([TENSORS["k.weight"][2:], TENSORS["v.weight"]])
    assert torch.equal(source.load("b"), whole)
    for start in range(4):
        for stop in range(start, 4):
            assert torch.equal(source.rows("b", start, stop), whole[start:stop])
    assert sorted(source) == sorted(TENSORS)  # what is stored comes once
    source.prefetch(["a", "b"])
    source.release(["a", "b"])


@pytest.mark.parametrize("shape", [(24,), (24, 5)])
def test_pairs_of_rotary_embeddings_are_taken_apart(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Two heads of six rows behind six others: row by row as the definition says it."""
    stored = torch.arange(float(torch.Size(shape).numel())).view(shape)
    save_file({"wqkv": stored}, tmp_path / "model.safetensors")
    apart = torch.empty(12, *shape[1:])
    for head in range(2):
        for pair in range(3):
            for half in range(2):
                apart[head * 6 + half * 3 + pair] = stored[6 + head * 6 + 2 * pair + half]
    source = JoinedSource(Checkpoint(tmp_path), {"q": (Part("wqkv", range(6, 18), heads=2),)})
    assert source.meta("q").shape == (12, *shape[1:])
    assert torch.equal(source.load("q"), apart)
    assert torch.equal(source.rows("q", 2, 7), apart[2:7])
    save_file({"q": apart.contiguous()}, tmp_path / "model.safetensors")
    back = JoinedSource(Checkpoint(tmp_path), {"again": (Part("q", heads=2, back=True),)})
    assert torch.equal(back.load("again"), stored[6:18])


@pytest.mark.parametrize("part", [Part("k.weight", range(2, 5)), Part("q.weight", heads=2)])
def test_rows_that_are_not_there(part: Part, checkpoint: Checkpoint) -> None:
    with pytest.raises(InvalidModelError, match="do not fit into its shape") as caught:
        JoinedSource(checkpoint, {"a": (part,)})
    assert caught.value.where == part.name
