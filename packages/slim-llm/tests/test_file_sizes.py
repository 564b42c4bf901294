"""The same tensors whatever the size of the files, and the files that this size means."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from slim_core.savers import ascendv1

ModelFolder = Callable[..., Path]
Quantize = Callable[..., Any]


def placed(tensors: dict[str, torch.Tensor], order: list[str], limit: int) -> dict[str, str]:
    """Which file each tensor goes to: one is closed before the tensor that would bring it to the limit."""
    shards: list[list[str]] = [[]]
    pending = 0
    for name in order:
        size = tensors[name].numel() * tensors[name].element_size()
        if shards[-1] and pending + size >= limit:
            shards.append([])
            pending = 0
        shards[-1].append(name)
        pending += size
    return {
        name: f"quant_model_weights-{i:05d}-of-{len(shards):05d}.safetensors"
        for i, shard in enumerate(shards, 1)
        for name in shard
    }


@pytest.mark.parametrize(("size", "gib", "files"), [(1, 4096, 10), (1, 1, 70), (2, 65536, 3)])
@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_size_of_files(
    naive: ModuleType,
    model_folder: ModelFolder,
    output: ModelFolder,
    quantize: Quantize,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
    size: int,
    gib: int,
    files: int,
) -> None:
    usual = naive.read(output("qwen2", scheme))  # made before the limit is changed, because others use it too
    monkeypatch.setattr(ascendv1, "_GIB", gib)
    quantize(model_folder("qwen2"), tmp_path / "out", scheme, part_file_size=size)
    found = naive.read(tmp_path / "out")
    assert found.description == usual.description
    for name, tensor in usual.tensors.items():
        assert naive.bits(found.tensors[name]) == naive.bits(tensor)
    order = [name for name in found.description if name not in naive.GLOBALS]
    assert found.place == placed(usual.tensors, order, size * gib)
    assert len(set(found.place.values())) >= files
    index = json.loads((tmp_path / "out" / "quant_model_weights.safetensors.index.json").read_text())
    assert index["weight_map"] == found.place


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_one_file(
    naive: ModuleType, model_folder: ModelFolder, output: ModelFolder, quantize: Quantize, tmp_path: Path, scheme: str
) -> None:
    quantize(model_folder("qwen2"), tmp_path / "out", scheme, part_file_size=0)
    found, usual = naive.read(tmp_path / "out"), naive.read(output("qwen2", scheme))
    assert set(found.place.values()) == {"quant_model_weights.safetensors"}
    assert not list((tmp_path / "out").glob("*index.json"))
    assert found.description == usual.description
    for name, tensor in usual.tensors.items():
        assert naive.bits(found.tensors[name]) == naive.bits(tensor)
