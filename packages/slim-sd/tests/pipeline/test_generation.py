"""What a pipeline is told: worked out from settings and the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from slim_core.errors import SchemaValidateError
from slim_core.recipe import recipe_from_dict
from slim_sd.pipeline.generation import Generation, planned_generation, published_model, wan_generation
from slim_sd.recipe import SpecSd, settings_of
from slim_sd.settings import SEED, WanSettings

PipelineFolder = Callable[..., Path]
WIDTHS = {"t2v-14B": 40, "t2v-1.3B": 12, "ti2v-5B": 24}


def config(heads: int = 40, **changes: Any) -> dict[str, Any]:
    plain = {"num_attention_heads": heads, "attention_head_dim": 128, "in_channels": 16, "out_channels": 16}
    return plain | {"patch_size": [1, 2, 2], "image_dim": None, **changes}


def planned(model: dict[str, Any], experts: int = 1, expands: bool = False, **settings: Any) -> Generation:
    recipe = recipe_from_dict(
        {
            "apiversion": "multimodal_sd_modelslim_v1",
            "spec": {"multimodal_sd_config": {"model_config": {"prompt": "a cat", **settings}}},
        }
    )
    asked = settings_of(recipe, recipe.spec(SpecSd), WanSettings)
    return wan_generation(asked, model, experts, lambda setting: f"recipe: {setting}", expands=expands)


@pytest.mark.parametrize(
    ("model", "experts", "name"),
    [
        (config(40), 1, "t2v-14B"),
        (config(12), 1, "t2v-1.3B"),
        (config(40, in_channels=36), 1, "i2v-14B"),
        (config(40), 2, "t2v-A14B"),
        (config(40, in_channels=36), 2, "i2v-A14B"),
        (config(24, in_channels=48, out_channels=48), 1, "ti2v-5B"),
        (config(3), 1, None),
    ],
)
def test_the_model_is_known_by_its_width_and_channels(model: dict[str, Any], experts: int, name: str | None) -> None:
    assert published_model(model, experts) == name


@pytest.mark.parametrize(
    ("model", "experts", "size", "steps", "scales"),
    [
        (config(40), 1, (1280, 720), 50, (5.0, None)),
        (config(12), 1, (832, 480), 50, (5.0, None)),
        (config(40), 2, (1280, 720), 40, (4.0, 3.0)),
        (config(40, in_channels=36), 2, (1280, 720), 40, (3.5, 3.5)),
    ],
)
def test_defaults_by_model(
    model: dict[str, Any], experts: int, size: tuple[int, int], steps: int, scales: tuple[float, float | None]
) -> None:
    picture = {"image": "start.png"} if model["in_channels"] == 36 else {}
    arguments = planned(model, experts, **picture).arguments
    assert (arguments["width"], arguments["height"]) == size
    assert arguments["num_inference_steps"] == steps
    assert (arguments["guidance_scale"], arguments.get("guidance_scale_2")) == scales
    assert arguments["num_frames"] == 81


def test_tokens_and_calls() -> None:
    made = planned(config(40), frame_num=121, size="1280*720")
    assert made.tokens == 31 * 45 * 80
    assert made.calls == 100  # two for each step: with and without the prompt
    assert planned(config(40), sample_guide_scale=1.0).calls == 50


def test_scales_of_two_experts_are_low_noise_first() -> None:
    arguments = planned(config(40), 2, sample_guide_scale=[2.0, 6.0]).arguments
    assert (arguments["guidance_scale"], arguments["guidance_scale_2"]) == (6.0, 2.0)
    with pytest.raises(SchemaValidateError, match="there is one transformer, and two scales are given"):
        planned(config(40), sample_guide_scale=[2.0, 6.0])


@pytest.mark.parametrize(
    ("model", "settings", "said", "where"),
    [
        (config(12), {"task": "t2v-14B"}, "the recipe says t2v-14B, the checkpoint is t2v-1.3B", "task"),
        (config(40), {"task": "i2v-14B", "image": "x.png"}, "the checkpoint is t2v-14B", "task"),
        (config(12), {"size": "1280*720"}, "t2v-1.3B does not make 1280*720", "size"),
        (config(40), {"size": "640*640"}, "t2v-14B does not make 640*640", "size"),
        (config(3), {"size": "100*64"}, "the width must be a multiple of 16", "size"),
        (config(3), {"size": "64*100"}, "the height must be a multiple of 16", "size"),
        (config(3), {"task": "i2v-14B"}, "the checkpoint is t2v", "task"),
        (config(40), {"image": "x.png"}, "the model makes videos of text alone", "image"),
        (config(40, in_channels=36), {}, "begins with a picture, and the recipe names none", "image"),
    ],
)
def test_settings_that_do_not_fit_the_model(
    model: dict[str, Any], settings: dict[str, Any], said: str, where: str
) -> None:
    with pytest.raises(SchemaValidateError) as told:
        planned(model, **settings)
    assert said in str(told.value)
    assert told.value.where == f"recipe: {where}"


def test_a_model_that_takes_a_picture_or_none() -> None:
    model = config(24, in_channels=48, out_channels=48)
    assert not planned(model, expands=True).from_image
    assert planned(model, expands=True, image="x.png").from_image
    assert planned(model, expands=True).arguments["width"] == 1280
    assert planned(model, expands=True).tokens == 21 * (704 // 32) * (1280 // 32)


def test_what_a_capture_is_recognised_by() -> None:
    facts = planned(config(40), base_seed=-1, sample_shift=3.0).facts
    assert facts["seed"] == SEED
    assert (facts["solver"], facts["shift"], facts["prompt"]) == ("unipc", 3.0, "a cat")
    assert planned(config(40), offload_model=False).facts == planned(config(40)).facts
    assert json.loads(json.dumps(facts)) == facts


def general(folder: Path, **settings: Any) -> Generation:
    content = {"multimodal_sd_config": {"model_config": {"prompt": "a cat", **settings}}}
    recipe = recipe_from_dict({"apiversion": "multimodal_sd_modelslim_v1", "spec": content})
    return planned_generation(folder, recipe, recipe.spec(SpecSd))


def test_other_pipelines_are_told_what_is_given(pipeline_folder: PipelineFolder) -> None:
    made = general(pipeline_folder("flux"), height=64, width=32, num_inference_steps=3, seed=5)
    assert made.arguments == {"prompt": "a cat", "height": 64, "width": 32, "num_inference_steps": 3}
    assert (made.seed, made.calls, made.tokens) == (5, 3, 4 * 2)


@pytest.mark.parametrize(
    ("name", "settings", "said", "where"),
    [
        ("flux", {"num_frames": 5}, "FluxPipeline does not take it", "num_frames"),
        ("sd3", {"true_cfg_scale": 2.0}, "StableDiffusion3Pipeline does not take it", "true_cfg_scale"),
    ],
)
def test_what_a_pipeline_does_not_take(
    pipeline_folder: PipelineFolder, name: str, settings: dict[str, Any], said: str, where: str
) -> None:
    with pytest.raises(SchemaValidateError, match=said) as told:
        general(pipeline_folder(name), **settings)
    assert told.value.where is not None
    assert told.value.where.endswith(f"spec.multimodal_sd_config.model_config.{where}")


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("name", ["wan2_1_t2v", "wan2_2_t2v", "wan2_2_ti2v"])
def test_wan_folders_of_both_layouts(pipeline_folder: PipelineFolder, name: str, layout: str) -> None:
    made = general(pipeline_folder(name, layout=layout), size="64*64", frame_num=5, sample_steps=3)
    assert ("guidance_scale_2" in made.arguments) == (name == "wan2_2_t2v")
    assert made.tokens == 2 * (16 if name != "wan2_2_ti2v" else 4)


def test_pictures_are_recognised_by_what_they_show(
    pipeline_folder: PipelineFolder, tmp_path: Path, tiny_pipelines: ModuleType
) -> None:
    model, facts = pipeline_folder("wan2_1_i2v"), []
    for name, seed in (("one.png", 0), ("copy.png", 0), ("other.png", 1)):
        tiny_pipelines.parts.picture(32, 32, seed).save(tmp_path / name)
        made = general(model, size="64*64", frame_num=5, image=str(tmp_path / name))
        assert made.arguments["image"] == str(tmp_path / name)
        facts.append(made.facts)
    assert facts[0] == facts[1]
    assert facts[0] != facts[2]
