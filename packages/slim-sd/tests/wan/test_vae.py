"""The original VAEs of Wan in diffusers' class."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders import single_file_utils
from torch import Tensor

from slim_core.errors import InvalidModelError, SecurityError, UnsupportedError
from slim_sd.wan.pth_files import load_pth
from slim_sd.wan.vae import load_vae, vae_config, vae_names

PipelineFolder = Callable[..., Path]
FILES = {"wan2_1_t2v": "Wan2.1_VAE.pth", "wan2_2_ti2v": "Wan2.2_VAE.pth"}


@pytest.mark.parametrize("name", FILES)
def test_the_vae_is_that_of_the_diffusers_layout(name: str, pipeline_folder: PipelineFolder) -> None:
    vae = load_vae(pipeline_folder(name, layout="original") / FILES[name])
    expected = AutoencoderKLWan.from_pretrained(pipeline_folder(name) / "vae")
    left_out = {"_name_or_path", "decoder_base_dim", "_use_default_values", "_class_name", "_diffusers_version"}
    of = [{key: value for key, value in each.config.items() if key not in left_out} for each in (vae, expected)]
    assert of[0] == of[1]
    states = vae.state_dict(), expected.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not vae.training
    assert vae.dtype == torch.float32
    latents = torch.randn((1, vae.config.z_dim, 2, 2, 2), generator=torch.Generator().manual_seed(1))
    pictures = vae.decode(latents).sample
    assert torch.equal(pictures, expected.eval().decode(latents).sample)
    assert torch.isfinite(pictures).all()
    assert pictures.std() > 0.1
    video = torch.rand((1, 3, 5, 32, 32), generator=torch.Generator().manual_seed(2))
    assert torch.equal(vae.encode(video).latent_dist.mean, expected.encode(video).latent_dist.mean)


def test_names_are_those_of_the_library(pipeline_folder: PipelineFolder) -> None:
    tensors = load_pth(pipeline_folder("wan2_1_t2v", layout="original") / FILES["wan2_1_t2v"])
    numbered = {name: index for index, name in enumerate(tensors)}
    converted = single_file_utils.convert_wan_vae_to_diffusers(dict(numbered))
    ours = vae_names(tensors, vae_config(tensors, ""))
    # The library's table misses shortcuts of up blocks other than the second, which these models do not have.
    assert {ours[name]: index for name, index in numbered.items()} == converted


@pytest.mark.parametrize(
    ("published", "says"),
    [
        ({}, {"base_dim": 96, "decoder_base_dim": 96, "z_dim": 16, "scale_factor_spatial": 8, "patch_size": None}),
        (
            {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2}
            | {"in_channels": 12, "out_channels": 12, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48},
            {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "scale_factor_spatial": 16, "patch_size": 2},
        ),
    ],
)
def test_published_sizes(published: dict[str, Any], says: dict[str, Any], tiny_wan: ModuleType) -> None:
    with torch.device("meta"):
        vae = AutoencoderKLWan(**published)
    tensors: dict[str, Tensor] = tiny_wan.original_vae_names(vae.state_dict(), vae.config)
    config = vae_config(tensors, "")
    assert {key: config[key] for key in says} == says
    assert config["dim_mult"] == [1, 2, 4, 4]
    assert config["temperal_downsample"] == [False, True, True]
    assert (config["num_res_blocks"], config["scale_factor_temporal"]) == (2, 4)
    with torch.device("meta"):
        made = AutoencoderKLWan(**config)
    names = vae_names(tensors, config)
    assert {names[name]: value.shape for name, value in tensors.items()} == {
        name: value.shape for name, value in made.state_dict().items()
    }
    if config["z_dim"] == 48:
        assert len(config["latents_mean"]) == len(config["latents_std"]) == 48
        assert min(config["latents_std"]) > 0


@pytest.fixture
def spoiled(tmp_path: Path, pipeline_folder: PipelineFolder) -> Callable[..., Path]:
    """``spoiled(change)``: a file whose tensors were changed in place."""

    def make(change: Callable[[dict[str, Tensor]], Any]) -> Path:
        tensors = load_pth(pipeline_folder("wan2_1_t2v", layout="original") / FILES["wan2_1_t2v"])
        change(tensors)
        torch.save(tensors, tmp_path / "Wan2.1_VAE.pth")
        return tmp_path / "Wan2.1_VAE.pth"

    return make


def set_to(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        (lambda t: t.pop("conv2.weight"), InvalidModelError, "'conv2.weight' is missing"),
        (lambda t: t.pop("encoder.middle.1.proj.bias"), InvalidModelError, "mid_block.attentions.0.proj.bias"),
        (set_to("decoder.more.weight", 2), InvalidModelError, "decoder.more.weight"),
        (set_to("encoder.middle.1.proj.bias", 3), InvalidModelError, "mid_block.attentions.0.proj.bias"),
        (set_to("conv2.weight", 8, 8, 1, 1, 1), UnsupportedError, "8 latent channels"),
        (set_to("encoder.downsamples.11.to_qkv.weight", 2), UnsupportedError, "to_qkv"),
        (lambda t: t.pop("encoder.downsamples.0.residual.2.weight"), InvalidModelError, "residual.2.weight"),
        (set_to("encoder.conv1.weight", 0, 3, 3, 3, 3), InvalidModelError, "has the shape"),
        (lambda t: [t.pop(name) for name in list(t) if "downsamples" in name], InvalidModelError, "residual blocks"),
    ],
)
def test_wrong_files(
    spoiled: Callable[..., Path], change: Callable[..., Any], error: type[Exception], problem: str
) -> None:
    file = spoiled(change)
    with pytest.raises(error, match=problem) as caught:
        load_vae(file)
    assert str(file) in str(caught.value)


def test_hostile_truncated_and_missing_files(tmp_path: Path, pipeline_folder: PipelineFolder) -> None:
    file = tmp_path / "Wan2.1_VAE.pth"
    with pytest.raises(InvalidModelError, match="missing"):
        load_vae(file)
    torch.save({"encoder.conv1.weight": Path("x")}, file)
    with pytest.raises(SecurityError):
        load_vae(file)
    shutil.copy(pipeline_folder("wan2_1_t2v", layout="original") / FILES["wan2_1_t2v"], file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(InvalidModelError, match="not a complete"):
        load_vae(file)
