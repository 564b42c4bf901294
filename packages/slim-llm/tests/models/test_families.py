"""Some of what ``benchmarks/families.py`` tries on every causal language model of transformers: those that have
something of their own in how they are built or stored. It says of each whether the files are right.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slim_core.errors import InvalidModelError
from slim_llm.models.loading import open_model

BENCHMARKS = Path(__file__).parents[4] / "benchmarks"
# What is peculiar about each, and linears that must be quantized, or must not.
FAMILIES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "falcon": ("a linear with a forward of its own", ("self_attention.dense",), ()),
    "git": ("a vision tower larger than the text model", ("git.encoder.layer.output.dense",), ("image_encoder",)),
    "dbrx": ("experts in two dimensions, beside a router", ("Wqkv",), ("router",)),
    "kimi_linear": ("a convolution that is stored in three parts", ("self_attn.q_proj",), ("conv1d", "mlp.gate.")),
    "qwen4_exp_text": ("an embedding that is stored in numbered parts", ("down_proj",), ("ngram_embedding",)),
    "inkling_text": ("shared experts in stacks of their own", ("shared_experts.up_proj",), ("mlp.gate.",)),
    "inkling2_text": ("stacks under other names, weights without one", ("model.llm.layers.mlp.experts.gate_proj",), ()),
    "deepseek_v4": ("a buffer that is stored as a bias", ("experts.w1",), ("mlp.gate.",)),
    "mamba": ("linears whose weight the model multiplies by itself", ("mixer.in_proj",), ("dt_proj",)),
}


@pytest.fixture(scope="module")
def families() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module("families")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_peculiar_families(families: ModuleType, tmp_path: Path, model_type: str) -> None:
    _, wanted, kept = FAMILIES[model_type]
    found = families.survey(model_type, "", tmp_path)
    assert found.outcome == "passed", found.reason
    assert not [name for name in wanted if not any(kind.endswith(name) for kind in found.kinds)], found.kinds
    assert not [kind for kind in found.kinds if any(f"{name}." in f"{kind}." for name in kept)]


def test_the_survey_notices_numbers_that_are_wrong(families: ModuleType, tmp_path: Path) -> None:
    """Gate and up of one expert swapped, which verifies on its own: only the original's names tell."""
    assert families.survey("mixtral", "", tmp_path).outcome == "passed"
    (file,) = (tmp_path / "dynamic").glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.0.block_sparse_moe.experts.0"
    for part in ("weight", "weight_scale", "weight_offset"):
        first, second = f"{name}.w1.{part}", f"{name}.w3.{part}"
        tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()
    file.chmod(0o600)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"experts\.0\.w1\.weight' is not what it was"):
        importlib.import_module("rebuilt").rebuild(tmp_path / "model", tmp_path / "dynamic", tmp_path / "again")


@pytest.fixture(scope="module")
def in_parts(families: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in-parts") / "model"
    families.save(families.build("olmo_hybrid", torch.float32), folder)
    return folder


def changed(source: Path, folder: Path, change: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_parts_are_those_of_the_checkpoint_in_order(in_parts: Path) -> None:
    model, stored = open_model(in_parts), load_file(in_parts / "model.safetensors")
    prefix = "model.layers.0.linear_attn"
    parts = [f"{prefix}.{part}_conv1d.weight" for part in "qkv"]
    assert model.joined[f"{prefix}.conv1d.weight"] == tuple(parts)
    assert torch.equal(model.source.load(f"{prefix}.conv1d.weight"), torch.cat([stored[part] for part in parts]))
    assert {name for unit in model.units for name in unit.tensors} == set(stored)
    assert "linear_attention" in json.loads((in_parts / "config.json").read_text())["layer_types"]


def test_a_part_that_is_missing(in_parts: Path, tmp_path: Path) -> None:
    name = "model.layers.0.linear_attn.k_conv1d.weight"
    folder = changed(in_parts, tmp_path / "model", lambda tensors: tensors.pop(name))
    with pytest.raises(InvalidModelError, match=r"1 of the 3 tensors that make 'model\.layers\.0\.linear_attn\.conv1d"):
        open_model(folder)
