"""What a folder of a diffusion model is, and which of its components are quantized."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from slim_core.errors import InvalidModelError, SlimError, UnsupportedError
from slim_sd.pipeline.folders import is_diffusion_model, layout_of, pipeline_index, transformer_folders

PipelineFolder = Callable[..., Path]


def write_index(folder: Path, **entries: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline", **entries}))
    for name, entry in entries.items():
        if isinstance(entry, list) and entry[0]:
            (folder / name).mkdir(exist_ok=True)
    return folder


def test_layouts_and_transformers(pipeline_folder: PipelineFolder) -> None:
    for name, originals, theirs in (
        ("wan2_1_t2v", {"transformer": "."}, {"transformer": "transformer"}),
        (
            "wan2_2_t2v",
            {"transformer": "high_noise_model", "transformer_2": "low_noise_model"},
            {"transformer": "transformer", "transformer_2": "transformer_2"},
        ),
    ):
        for layout, folders in (("original", originals), ("diffusers", theirs)):
            root = pipeline_folder(name, layout=layout)
            assert layout_of(root) == layout
            assert is_diffusion_model(root)
            assert transformer_folders(root) == {component: root / place for component, place in folders.items()}


def test_the_index_keeps_what_is_there(tmp_path: Path) -> None:
    folder = write_index(
        tmp_path,
        _diffusers_version="0.42.1",
        transformer=["diffusers", "FluxTransformer2DModel"],
        image_encoder=[None, None],
        scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"],
        boundary_ratio=0.9,
    )
    assert pipeline_index(folder) == {
        "_class_name": "FluxPipeline",
        "_diffusers_version": "0.42.1",
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "boundary_ratio": 0.9,
    }


def test_folders_that_are_neither(tmp_path: Path, pipeline_folder: PipelineFolder) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(InvalidModelError, match="does not exist"):
        layout_of(missing)
    with pytest.raises(InvalidModelError, match=r"neither model_index\.json .* nor the config\.json of a WanModel"):
        layout_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(InvalidModelError, match="neither"):
        layout_of(tmp_path)
    with pytest.raises(InvalidModelError, match="one component of a pipeline"):
        layout_of(pipeline_folder("wan2_1_t2v") / "transformer")
    assert not is_diffusion_model(tmp_path)


@pytest.mark.parametrize(
    ("content", "error", "problem"),
    [
        ("{", InvalidModelError, "not a JSON object"),
        ("[]", InvalidModelError, "not a JSON object"),
        ("{}", InvalidModelError, "_class_name"),
        ('{"_class_name": ["pipeline.py", "Mine"]}', UnsupportedError, "code that comes with the model"),
        ('{"_class_name": "A", "vae": ["diffusers"]}', InvalidModelError, "'vae' must be a library and a class"),
        ('{"_class_name": "A", "vae": [1, 2]}', InvalidModelError, "'vae' must be a library and a class"),
        ('{"_class_name": "A", "vae": ["my_code", "Vae"]}', UnsupportedError, "Vae of 'my_code'"),
        ('{"_class_name": "A", "vae": ["diffusers", "AutoencoderKL"]}', InvalidModelError, "'vae' .* is missing"),
    ],
)
def test_broken_indices(tmp_path: Path, content: str, error: type[SlimError], problem: str) -> None:
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(error, match=problem) as caught:
        pipeline_index(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_an_index_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").mkdir()
    with pytest.raises(InvalidModelError, match="cannot be read"):
        pipeline_index(tmp_path)


def test_a_pipeline_without_a_transformer(tmp_path: Path) -> None:
    folder = write_index(
        tmp_path,
        unet=["diffusers", "UNet2DConditionModel"],
        transformer_prior=["diffusers", "PriorTransformer"],
        vae=["diffusers", "AutoencoderKL"],
    )
    with pytest.raises(UnsupportedError, match=r"no transformer; its components are transformer_prior, unet, vae"):
        transformer_folders(folder)


def test_a_missing_component(tmp_path: Path, pipeline_folder: PipelineFolder) -> None:
    folder = shutil.copytree(pipeline_folder("wan2_1_t2v"), tmp_path / "model")
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(InvalidModelError, match=r"component 'text_encoder' \(UMT5EncoderModel\) is missing"):
        transformer_folders(folder)
