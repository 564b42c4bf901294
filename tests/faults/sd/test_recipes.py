"""Recipes for diffusion models that ask for what is not there, or for what the model does not do.

A row: what is done to a workplace where all is right, and kind, words, place and way out of the message.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

DATASET, SCHEMA, UNSUPPORTED = "202 InvalidDatasetError", "203 SchemaValidateError", "301 UnsupportedError"
SETTINGS = "spec.multimodal_sd_config.model_config"
DUMP = "spec.multimodal_sd_config.dump_config"
PUBLISHED = {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 1}  # the width of the 1.3B model
OWN_PIPELINE = "diffusion models are calibrated on what their own pipeline is given while it generates"


def say(**changes: object) -> Callable[..., None]:
    """Change settings; None removes one."""
    return lambda w: w.say(**changes)


def on(name: str, change: Callable[..., None] = lambda w: None, **sizes: object) -> Callable[..., None]:
    """Another model, and a fault."""

    def both(w) -> None:
        w.become(name, **sizes)
        change(w)

    return both


def general(**changes: object) -> Callable[..., None]:
    """Settings that pipelines of diffusers know, and a fault."""
    return say(size=None, frame_num=None, sample_steps=2, **changes)


def edit(old: str, new: str) -> Callable[..., None]:
    return lambda w: w.edit(old, new)


def dump(line: str) -> Callable[..., None]:
    return edit("capture_mode: args", f"capture_mode: args\n      {line}")


def settings(text: str) -> Callable[..., None]:
    """The whole model_config."""

    def change(w) -> None:
        whole = w.recipe.read_text("utf-8")
        w.edit(whole[whole.index("    model_config:") :], text)

    return change


def broken_picture(w) -> None:
    (w.folder / "a.png").write_text("no picture")
    w.say(image="a.png")


# What a setting is set to, and what is said of it.
VALUES: dict[str, tuple[str, object, str, str]] = {
    "task of no model": ("task", "t2v-13B", "got 't2v-13B'; must be 't2v-14B', 't2v-1.3B'", "'ti2v-5B'"),
    "task of another kind": ("task", "i2v-14B", "the recipe says i2v-14B, the checkpoint is t2v", "leave task out"),
    "frames": ("frame_num", 8, "got 8; must be 4n+1", "5 or 9 would do"),
    "no frames": ("frame_num", 0, "got 0; must be", "greater than or equal to 1"),
    "frames yes": ("frame_num", "true", "got True; must be a number", "not true or false"),
    "frames and a half": ("frame_num", 5.5, "got 5.5; must be a valid integer", "fractional part"),
    "size that is not divisible": ("size", '"70*64"', "70*64: the width must be a multiple of 16", "64 and 80 are"),
    "size of the other side": ("size", '"64*24"', "64*24: the height must be a multiple of 16", "16 and 32 are"),
    "size with an x": ("size", "64x64", "got '64x64'; must be width*height in pixels", "such as 1280*720"),
    "size is a list": ("size", "[64, 64]", "got a list", "must be a valid string"),
    "unknown setting": ("sample_step", 3, "got 3; unknown field", "did you mean 'sample_steps'?"),
    "unlike any setting": ("zzz", 3, "got 3; unknown field", "fields: prompt, negative_prompt"),
    "blank prompt": ("prompt", '" "', "got ' '", "must not be empty"),
    "prompt is a number": ("prompt", 7, "got 7", "must be a valid string"),
    "offload 1": ("offload_model", 1, "got 1; must be true or false", "without quotes"),
    "offload in quotes": ("offload_model", '"True"', "got 'True'; must be true or false", "without quotes"),
    "no steps": ("sample_steps", 0, "got 0; must be", "greater than or equal to 1"),
    "steps in words": ("sample_steps", "many", "got 'many'", "must be a valid integer"),
    "shift nan": ("sample_shift", ".nan", "got nan", "must be a finite number"),
    "shift 0": ("sample_shift", 0, "got 0", "must be greater than 0"),
    "guidance yes": ("sample_guide_scale", "yes", "got True; must be a number", "not true or false"),
    "two scales for one": ("sample_guide_scale", "[3, 4]", "there is one transformer, and two scales", "give one"),
    "solver": ("sample_solver", "euler", "got 'euler'", "must be 'unipc' or 'dpm++'"),
    "seed": ("base_seed", -2, "got -2; must be", "greater than or equal to -1"),
    "several devices": ("ulysses_size", 2, "got 2; is not done while calibration inputs are captured", "leave it out"),
    "a picture": ("image", "a.png", "the model makes videos of text alone", "leave image out"),
}
RECIPES = {
    **{
        name: (say(**{field: value}), SCHEMA, what, f": {SETTINGS}.{field}: ", remedy)
        for name, (field, value, what, remedy) in VALUES.items()
    },
    "no prompt": (say(prompt=None), SCHEMA, "required field is missing", f"{{recipe}}:17: {SETTINGS}.prompt", ""),
    "task of another size": (
        on("wan2_1_t2v", say(task="t2v-14B"), **PUBLISHED),
        SCHEMA,
        "the recipe says t2v-14B, the checkpoint is t2v-1.3B",
        f"{{recipe}}:23: {SETTINGS}.task",
        "say t2v-1.3B",
    ),
    "size of the larger model": (
        on("wan2_1_t2v", say(size='"1280*720"'), **PUBLISHED),
        SCHEMA,
        "t2v-1.3B does not make 1280*720",
        f"{{recipe}}:22: {SETTINGS}.size",
        "use one of 480*832, 832*480",
    ),
    "no settings": (
        settings(""),
        SCHEMA,
        "the recipe needs calibration inputs, but does not say what to generate",
        f"{{recipe}}:13: {SETTINGS}",
        "give at least a prompt, or use data-free processors only",
    ),
    "settings are a list": (
        settings("    model_config: [a]\n"),
        SCHEMA,
        "got a list",
        f"{{recipe}}:17: {SETTINGS}",
        "must be a mapping",
    ),
    "two names for the settings": (
        edit("    model_config:", "    inference_config: {prompt: a}\n    model_config:"),
        SCHEMA,
        "model_config and inference_config are one and the same",
        "{recipe}:13: spec.multimodal_sd_config",
        "give one",
    ),
    "no picture": (
        on("wan2_1_i2v"),
        SCHEMA,
        "the model begins with a picture, and the recipe names none",
        f"{{recipe}}:17: {SETTINGS}.image",
        "give image: PATH",
    ),
    "picture that is not there": (
        on("wan2_1_i2v", say(image="a.png")),
        DATASET,
        "a.png: the picture cannot be read: No such file",
        f"{{recipe}}:23: {SETTINGS}.image",
        "a relative path starts at the working folder",
    ),
    "picture that is none": (
        on("wan2_1_i2v", broken_picture),
        DATASET,
        "a.png: the picture cannot be read: cannot identify",
        f"{{recipe}}:23: {SETTINGS}.image",
        "give a JPEG or PNG file",
    ),
    "no picture to edit": (
        on("qwen_image_edit", general()),
        SCHEMA,
        "QwenImageEditPipeline needs a picture",
        f"{SETTINGS}.image",
        "give image: PATH",
    ),
    "settings of Wan for another model": (
        on("flux"),
        SCHEMA,
        f"size: unknown field | {SETTINGS}.frame_num: unknown field",
        f"{{recipe}}:19: {SETTINGS}.size",
        "fields: prompt, negative_prompt, image, height, width",
    ),
    "setting that the pipeline lacks": (
        on("flux", general(num_frames=5)),
        SCHEMA,
        "FluxPipeline does not take it",
        f"{{recipe}}:21: {SETTINGS}.num_frames",
        "leave it out",
    ),
    "height that the pipeline refuses": (
        on("hunyuan_video", general(height=33, width=32, num_frames=5)),
        SCHEMA,
        "HunyuanVideoPipeline does not take these settings: `height` and `width` have to be divisible by 16",
        f"{{recipe}}:17: {SETTINGS}: ",
        "change them",
    ),
    "dataset": (
        edit("  save:", "  dataset: mix_calib.jsonl\n  save:"),
        SCHEMA,
        f"got 'mix_calib.jsonl'; {OWN_PIPELINE}",
        "{recipe}:10: spec.dataset",
        "leave dataset out",
    ),
    "dataset of a stage ahead": (
        edit(
            "  save:",
            "  prior:\n    - process: [{type: adapt_rotation, stage: 1}]\n      dataset: a.jsonl\n  save:",
        ),
        SCHEMA,
        OWN_PIPELINE,
        "{recipe}:10: spec.prior",
        "leave dataset out",
    ),
    "capture mode": (
        edit("capture_mode: args", "capture_mode: kwargs"),
        SCHEMA,
        "got 'kwargs'; allowed: args",
        f"{{recipe}}:15: {DUMP}.capture_mode",
        "did you mean 'args'?",
    ),
    "unknown field of the capture": (
        edit("capture_mode: args", "capture_mod: args"),
        SCHEMA,
        "unknown field",
        f"{{recipe}}:15: {DUMP}.capture_mod",
        "did you mean 'capture_mode'?",
    ),
    "no time steps": (
        dump("time_steps: 0"),
        SCHEMA,
        "got 0; must be greater than or equal to 1",
        f"{{recipe}}:16: {DUMP}.time_steps",
        "",
    ),
    "time steps yes": (dump("time_steps: true"), SCHEMA, "got True", f"{{recipe}}:16: {DUMP}.time_steps", "not true"),
    "enable_dump 1": (
        dump("enable_dump: 1"),
        SCHEMA,
        "got 1; must be true or false",
        f"{{recipe}}:16: {DUMP}.enable_dump",
        "without quotes",
    ),
    "folder is a number": (
        edit('dump_data_dir: ""', "dump_data_dir: 7"),
        SCHEMA,
        "got 7",
        f"{{recipe}}:16: {DUMP}.dump_data_dir",
        "must be a valid string",
    ),
    "unknown section": (
        edit("multimodal_sd_config", "multimodal_sd_confg"),
        SCHEMA,
        "unknown field",
        "{recipe}:13: spec.multimodal_sd_confg",
        "did you mean 'multimodal_sd_config'?",
    ),
    "names": (
        edit("    dump_config:", "    tensor_names: hf\n    dump_config:"),
        SCHEMA,
        "got 'hf'; allowed: original, diffusers",
        "{recipe}:14: spec.multimodal_sd_config.tensor_names",
        "",
    ),
    "runner": (
        edit("  process:", "  runner: layerwise\n  process:"),
        SCHEMA,
        "got 'layerwise'; allowed: auto, layer_wise, dp_layer_wise, model_wise",
        "{recipe}:3: spec.runner",
        "did you mean 'layer_wise'?",
    ),
    "capture that is forbidden": (
        dump("enable_dump: false"),
        DATASET,
        "there is no calib_data.pth, and enable_dump is false",
        "{save}",
        "set enable_dump: true to capture it, or use data-free processors only",
    ),
    "type without a place in the format": (
        edit("        act: {scope: per_tensor, dtype: int8, symmetric: false, method: minmax}\n", ""),
        UNSUPPORTED,
        "the MindIE-SD format has no place for W8A16 layers",
        "blocks.0.self_attn.q",
        "use ascendv1_saver",
    ),
    "of modelslim_v1": (
        edit("multimodal_sd_modelslim_v1", "modelslim_v1"),
        SCHEMA,
        "unknown field",
        "{recipe}:13: spec.multimodal_sd_config",
        "fields: runner, process, save",
    ),
}


@pytest.mark.parametrize(("fault", "kind", "what", "where", "remedy"), RECIPES.values(), ids=RECIPES)
def test_recipes(workplace, refused, fault: Callable[..., object], kind, what, where, remedy) -> None:
    workplace.fill_save()
    fault(workplace)
    refused(kind, what, where, remedy, "--overwrite")


@pytest.mark.parametrize("runner", ["auto", "dp_layer_wise", "model_wise"])
def test_another_runner(workplace, runner: str) -> None:
    workplace.edit("  process:", f"  runner: {runner}\n  process:")
    found = workplace.run("--dry-run")
    assert found.exit_code == 0, found.output
    said = f"spec.runner: {runner!r} becomes 'layer_wise', the only one for diffusion models"
    assert f"    - {workplace.recipe}:3: {said}" in found.stdout.splitlines()
    assert "runner     layer_wise: " in found.stdout
