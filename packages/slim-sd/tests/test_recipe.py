"""``spec`` of ``multimodal_sd_modelslim_v1`` and what its settings allow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from slim_core.errors import SchemaValidateError
from slim_core.recipe import Recipe, dump_recipe, load_recipe, recipe_from_dict
from slim_core.recipe.load import dump_yaml
from slim_sd.recipe import SpecSd, dump_folder, settings_of
from slim_sd.settings import SEED, GeneralSettings, WanSettings

GUIDE = """\
apiversion: multimodal_sd_modelslim_v1
spec:
  process:
    - type: linear_quant
      qconfig:
        act: {scope: per_token, dtype: int8, symmetric: true, method: minmax}
        weight: {scope: per_channel, dtype: int8, symmetric: true, method: minmax}
      include: ["*"]
      exclude: ["*ffn.2*"]
  save:
    - type: mindie_format_saver
      part_file_size: 0
  multimodal_sd_config:
    dump_config:
      capture_mode: args
      dump_data_dir: ""
    model_config:
      prompt: "A stylish woman walks down a street"
      offload_model: True
      frame_num: 121
      task: "t2v-14B"
      size: "1280*720"
      sample_steps: 50
"""


def recipe(config: dict[str, Any] | None = None, **spec: Any) -> Recipe:
    content = {"process": [], **spec}
    if config is not None:
        content["multimodal_sd_config"] = config
    return recipe_from_dict({"apiversion": "multimodal_sd_modelslim_v1", "spec": content})


def settings(**given: Any) -> WanSettings:
    asked = recipe({"model_config": {"prompt": "a cat", **given}})
    return settings_of(asked, asked.spec(SpecSd), WanSettings)


def general(**given: Any) -> GeneralSettings:
    asked = recipe({"model_config": {"prompt": "a cat", **given}})
    return settings_of(asked, asked.spec(SpecSd), GeneralSettings)


def test_the_example_of_the_guide(tmp_path: Path) -> None:
    path = tmp_path / "wan.yaml"
    path.write_text(GUIDE)
    asked = load_recipe(path)
    spec = asked.spec(SpecSd)
    assert spec.runner == "layer_wise"
    assert spec.warnings() == []
    assert spec.save[0].type == "mindie_format_saver"
    found = settings_of(asked, spec, WanSettings)
    assert (found.frame_num, found.task, found.pixels, found.sample_steps) == (121, "t2v-14B", (1280, 720), 50)
    assert found.offload_model
    assert dump_folder(spec) is None


def test_what_is_written_is_the_same_recipe(tmp_path: Path) -> None:
    path = tmp_path / "wan.yaml"
    path.write_text(GUIDE)
    asked = load_recipe(path)
    effective = dump_recipe(asked, asked.spec(SpecSd))
    again = tmp_path / "again.yaml"
    again.write_text(effective)
    assert load_recipe(again).spec(SpecSd) == asked.spec(SpecSd)
    assert yaml.safe_load(effective)["spec"]["multimodal_sd_config"]["model_config"]["frame_num"] == 121
    assert "dataset" not in yaml.safe_load(effective)["spec"]
    assert dump_yaml(yaml.safe_load(effective)) == effective


def test_defaults() -> None:
    spec = recipe().spec(SpecSd)
    assert spec.save[0].type == "mindie_format_saver"
    assert spec.save[0].part_file_size == 0  # pyright: ignore[reportAttributeAccessIssue]
    dump = spec.multimodal_sd_config.dump_config
    assert (dump.capture_mode, dump.dump_data_dir, dump.enable_dump, dump.time_steps) == ("args", "", True, None)


@pytest.mark.parametrize("runner", ["auto", "model_wise", "dp_layer_wise"])
def test_the_runner_is_always_layer_wise(runner: str) -> None:
    spec = recipe(runner=runner).spec(SpecSd)
    assert spec.runner == "layer_wise"
    (warning,) = spec.warnings()
    assert warning == f"runner: {runner!r} becomes 'layer_wise', the only one for diffusion models"


@pytest.mark.parametrize("dataset", ["mix_calib.jsonl", None, {"path": "x"}])
def test_a_dataset_is_refused_with_the_reason(dataset: Any) -> None:
    with pytest.raises(SchemaValidateError, match="calibrated on what their own pipeline is given") as told:
        recipe(dataset=dataset).spec(SpecSd)
    assert "spec.dataset" in str(told.value)
    with pytest.raises(SchemaValidateError, match="calibrated on what their own pipeline is given"):
        recipe(prior=[{"process": [{"type": "adapt_rotation", "stage": 1}], "dataset": "x"}]).spec(SpecSd)


def test_settings_have_two_names_and_either_is_kept() -> None:
    asked = recipe({"inference_config": {"prompt": "a cat"}})
    spec = asked.spec(SpecSd)
    assert settings_of(asked, spec, WanSettings).prompt == "a cat"
    assert "inference_config" in dump_recipe(asked, spec)
    with pytest.raises(SchemaValidateError, match="model_config and inference_config are one and the same"):
        recipe({"model_config": {"prompt": "a"}, "inference_config": {"prompt": "a"}}).spec(SpecSd)


def test_settings_without_a_value_are_none() -> None:
    assert settings(sample_steps=None, size=None).sample_steps is None


def test_nothing_to_generate() -> None:
    for config in ({"model_config": {}}, {}, None):
        asked = recipe(config)
        spec = asked.spec(SpecSd)
        with pytest.raises(SchemaValidateError, match="does not say what to generate"):
            settings_of(asked, spec, WanSettings)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"promt": "x"}, "model_config.promt: got 'x'; unknown field; did you mean 'prompt'?"),
        ({"sample_step": 5}, "did you mean 'sample_steps'?"),
        ({"prompt": ""}, "must not be empty"),
        ({"prompt": 3}, "must be a valid string"),
        ({"frame_num": 120}, "must be 4n+1"),
        ({"frame_num": 0}, "greater than or equal to 1"),
        ({"frame_num": True}, "must be a number, not true or false"),
        ({"frame_num": "many"}, "must be a valid integer"),
        ({"size": "1280x720"}, "must be width*height"),
        ({"size": "0*720"}, "must be width*height"),
        ({"task": "t2i-14B"}, "must be 't2v-14B'"),
        ({"sample_steps": 0}, "greater than or equal to 1"),
        ({"sample_solver": "euler"}, "must be 'unipc' or 'dpm++'"),
        ({"sample_shift": -1.0}, "greater than 0"),
        ({"offload_model": "True"}, "must be true or false, without quotes"),
        ({"offload_model": 1}, "must be true or false, without quotes"),
        ({"t5_fsdp": True}, "is not done while calibration inputs are captured"),
        ({"ulysses_size": 2}, "is not done while calibration inputs are captured"),
        ({"height": 8}, "greater than or equal to 16"),
        ({"num_inference_steps": 0}, "greater than or equal to 1"),
    ],
)
def test_bad_settings_are_refused_by_the_recipe_alone(given: dict[str, Any], said: str) -> None:
    with pytest.raises(SchemaValidateError) as told:
        recipe({"model_config": {"prompt": "a cat", **given}}).spec(SpecSd)
    assert said in str(told.value)
    assert f"spec.multimodal_sd_config.model_config.{next(iter(given))}: " in str(told.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"dump_config": {"capture_mode": "kwargs"}}, "dump_config.capture_mode: got 'kwargs'; allowed: args"),
        ({"dump_config": {"time_steps": 0}}, "dump_config.time_steps"),
        ({"dump_confg": {}}, "unknown field; did you mean 'dump_config'?"),
        ({"tensor_names": "mine"}, "allowed: original, diffusers"),
    ],
)
def test_bad_capture_settings_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(SchemaValidateError) as told:
        recipe(config).spec(SpecSd)
    assert said in str(told.value)


def test_frames_near_a_wrong_number() -> None:
    for wrong, near in ((120, "117 or 121"), (2, "1 or 5"), (4, "1 or 5"), (83, "81 or 85")):
        with pytest.raises(SchemaValidateError, match=near):
            settings(frame_num=wrong)
    assert [settings(frame_num=right).frame_num for right in (1, 5, 81, 121)] == [1, 5, 81, 121]


def test_seeds() -> None:
    assert settings().seed == settings(base_seed=-1).seed == SEED
    assert settings(base_seed=7).seed == 7


def test_settings_of_the_command_line_that_mean_nothing_here() -> None:
    found = settings(save_file="x.mp4", ckpt_dir="/there", ulysses_size=1, t5_fsdp=False)
    assert found.warnings() == ["ckpt_dir: has no effect", "save_file: has no effect"]


def test_general_settings_take_the_names_of_other_projects() -> None:
    made = general(video_length=5, infer_steps=7, video_size=[64, 96], embedded_cfg_scale=6.0, neg_prompt="bad")
    assert made.call() == {
        "prompt": "a cat",
        "negative_prompt": "bad",
        "num_frames": 5,
        "num_inference_steps": 7,
        "guidance_scale": 6.0,
        "height": 64,
        "width": 96,
    }


def test_settings_of_one_family_are_not_those_of_another() -> None:
    with pytest.raises(SchemaValidateError, match=r"model_config\.video_length: .*unknown field"):
        settings(video_length=5)
    with pytest.raises(SchemaValidateError, match=r"model_config\.frame_num: .*unknown field"):
        general(frame_num=5)
