"""Folders of the original Wan project: recognised, and their configuration."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from slim_core.checkpoint.reader import Checkpoint
from slim_core.errors import InvalidModelError, UnsupportedError
from slim_sd.wan import files as wan_files

PipelineFolder = Callable[..., Path]
ORIGINALS = ("wan2_1_t2v", "wan2_1_i2v", "wan2_2_t2v", "wan2_2_i2v", "wan2_2_ti2v")


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_configuration_is_that_of_the_diffusers_layout(name: str, pipeline_folder: PipelineFolder) -> None:
    original, diffusers = pipeline_folder(name, layout="original"), pipeline_folder(name)
    assert wan_files.is_original(original)
    assert not wan_files.is_original(diffusers)
    for component, folder in wan_files.transformer_folders(original).items():
        expected = json.loads((diffusers / component / "config.json").read_text())
        expected.pop("_diffusers_version")
        assert wan_files.transformer_config(folder) == expected
        with torch.device("meta"):
            module = WanTransformer3DModel.from_config(expected)
        shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        stored = load_file(diffusers / component / "diffusion_pytorch_model.safetensors")
        assert shapes == {name: tuple(value.shape) for name, value in stored.items()}


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("wan2_1_t2v", ("t2v", False, False, None, 5.0)),
        ("wan2_1_i2v", ("i2v", False, True, None, 5.0)),
        ("wan2_2_t2v", ("t2v", True, False, 0.875, 12.0)),
        ("wan2_2_i2v", ("i2v", True, False, 0.9, 5.0)),
        ("wan2_2_ti2v", ("ti2v", False, False, None, 5.0)),
    ],
)
def test_families(name: str, family: tuple[Any, ...], pipeline_folder: PipelineFolder) -> None:
    assert wan_files.family(pipeline_folder(name, layout="original")) == wan_files.WanFamily(*family)


def test_shards_are_read(pipeline_folder: PipelineFolder) -> None:
    whole = pipeline_folder("wan2_1_t2v", layout="original")
    split = pipeline_folder("wan2_1_t2v", layout="original", shards=3)
    assert len(list(split.glob("*.safetensors"))) == 3
    assert wan_files.transformer_config(split) == wan_files.transformer_config(whole)


class Shapes:
    """A checkpoint of which only shapes are known."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def meta(self, name: str) -> Any:
        return SimpleNamespace(shape=tuple(self.tensors[name].shape))


# config.json as published: model, its fields, and what its Diffusers repository says.
PUBLISHED = {
    "Wan2.1-T2V-1.3B": (
        {"dim": 1536, "ffn_dim": 8960, "in_dim": 16, "model_type": "t2v", "num_heads": 12, "num_layers": 30},
        {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960, "in_channels": 16, "image_dim": None},
    ),
    "Wan2.1-T2V-14B": (
        {"dim": 5120, "ffn_dim": 13824, "in_dim": 16, "model_type": "t2v", "num_heads": 40, "num_layers": 40},
        {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824, "added_kv_proj_dim": None},
    ),
    "Wan2.1-I2V-14B": (
        {"dim": 5120, "ffn_dim": 13824, "in_dim": 36, "model_type": "i2v", "num_heads": 40, "num_layers": 40},
        {"num_attention_heads": 40, "in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    ),
    "Wan2.2-TI2V-5B": (
        {"dim": 3072, "ffn_dim": 14336, "in_dim": 48, "model_type": "ti2v", "num_heads": 24, "num_layers": 30}
        | {"out_dim": 48},
        {"num_attention_heads": 24, "in_channels": 48, "out_channels": 48, "num_layers": 30},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name: str, tmp_path: Path, tiny_wan: ModuleType) -> None:
    original, expected = PUBLISHED[name]
    config = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "eps": 1e-06, "freq_dim": 256, "text_len": 512}
    config |= {"out_dim": 16} | original
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole: dict[str, Any] = {"attention_head_dim": 128, "out_channels": config["out_dim"], "in_channels": 16}
    whole |= {"ffn_dim": config["ffn_dim"]} | expected
    with torch.device("meta"):
        module = WanTransformer3DModel(**whole)
    tensors = Shapes(tiny_wan.original_transformer_names(module.state_dict()))
    found = wan_files.transformer_config(tmp_path, cast("Checkpoint", tensors))
    assert {key: found[key] for key in whole} == whole
    assert (found["text_dim"], found["patch_size"], found["qk_norm"]) == (4096, [1, 2, 2], "rms_norm_across_heads")


@pytest.fixture
def copied(tmp_path: Path, pipeline_folder: PipelineFolder) -> Path:
    """An original folder to be spoiled."""
    return shutil.copytree(pipeline_folder("wan2_1_t2v", layout="original"), tmp_path / "model")


@pytest.mark.parametrize(
    ("field", "value", "error", "problem"),
    [
        ("dim", None, InvalidModelError, "dim is missing"),
        ("dim", "64", InvalidModelError, "dim must be a positive whole number, not '64'"),
        ("num_layers", True, InvalidModelError, "num_layers must be a positive whole number"),
        ("num_layers", 0, InvalidModelError, "num_layers must be a positive whole number"),
        ("num_layers", 3, InvalidModelError, "num_layers says 3, the weights say 2"),
        ("num_heads", 5, InvalidModelError, "dim 64 is no multiple of num_heads 5"),
        ("dim", 128, InvalidModelError, "dim says 128, the weights say 64"),
        ("in_dim", 36, InvalidModelError, "in_dim says 36, the weights say 16"),
        ("out_dim", 48, InvalidModelError, "out_dim says 192, the weights say 64"),
        ("ffn_dim", 256, InvalidModelError, "ffn_dim says 256, the weights say 128"),
        ("freq_dim", 256, InvalidModelError, "freq_dim says 256, the weights say 32"),
        ("text_dim", 4096, InvalidModelError, "text_dim says 4096, the weights say 32"),
        ("patch_size", [1, 4, 4], InvalidModelError, "patch_size says"),
        ("patch_size", 2, InvalidModelError, "patch_size must be three numbers"),
        ("eps", "small", InvalidModelError, "eps must be a number between 0 and 1"),
        ("eps", 0, InvalidModelError, "eps must be a number between 0 and 1"),
        ("qk_norm", False, UnsupportedError, "qk_norm is False"),
        ("window_size", [3, 3], UnsupportedError, "window_size is"),
        ("model_type", "s2v", UnsupportedError, "model_type 's2v'"),
        ("_class_name", "VaceWanModel", UnsupportedError, "VaceWanModel"),
        ("audio_dim", 1024, UnsupportedError, "unknown field 'audio_dim'"),
    ],
)
def test_wrong_fields(copied: Path, field: str, value: Any, error: type[Exception], problem: str) -> None:
    path = copied / "config.json"
    config = json.loads(path.read_text())
    config[field] = value
    path.write_text(json.dumps(config))
    with pytest.raises(error, match=problem) as caught:
        wan_files.transformer_config(copied)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "problem"), [("[1]", "not a JSON object"), ("{", "not a JSON object"), (None, "is missing")]
)
def test_broken_files(copied: Path, content: str | None, problem: str) -> None:
    path = copied / "config.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert not wan_files.is_original(copied)
    with pytest.raises(InvalidModelError, match=problem):
        wan_files.transformer_config(copied)


def test_weights_of_something_else(copied: Path) -> None:
    file = copied / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["patch_embedding.weight"]
    save_file(tensors, file)
    with pytest.raises(InvalidModelError, match=r"'patch_embedding\.weight' is missing"):
        wan_files.transformer_config(copied)
    save_file(tensors | {"patch_embedding.weight": torch.ones(64, 16)}, file)
    with pytest.raises(InvalidModelError, match="has 2 dimensions, not 5"):
        wan_files.transformer_config(copied)


@pytest.mark.parametrize("missing", ["high_noise_model", "low_noise_model"])
def test_one_of_two_experts_is_missing(missing: str, tmp_path: Path, pipeline_folder: PipelineFolder) -> None:
    folder = shutil.copytree(pipeline_folder("wan2_2_t2v", layout="original"), tmp_path / "model")
    shutil.rmtree(folder / missing)
    assert wan_files.is_original(folder)
    with pytest.raises(InvalidModelError, match=f"{missing}/config.json is missing"):
        wan_files.transformer_folders(folder)
