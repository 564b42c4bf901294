"""What a pipeline is told, worked out from a recipe's settings and the model in a folder."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from slim_core.errors import SchemaValidateError
from slim_core.recipe import Recipe
from slim_sd.loading import is_wan, open_transformer
from slim_sd.pipeline.components import quiet_libraries
from slim_sd.pipeline.folders import layout_of, pipeline_index, transformer_folders
from slim_sd.pipeline.pictures import open_picture
from slim_sd.recipe import SpecSd, settings_of
from slim_sd.settings import SEED, GeneralSettings, WanSettings

__all__ = ["Generation", "planned_generation"]

_SIZES_720 = ("720*1280", "1280*720")
_SIZES_480 = ("480*832", "832*480")
_SIZES = {
    "t2v-14B": (*_SIZES_720, *_SIZES_480),
    "t2v-1.3B": _SIZES_480,
    "i2v-14B": (*_SIZES_720, *_SIZES_480),
    "t2v-A14B": (*_SIZES_720, *_SIZES_480),
    "i2v-A14B": (*_SIZES_720, *_SIZES_480),
    "ti2v-5B": ("704*1280", "1280*704"),
}
_DEFAULT_SIZES = {"t2v-1.3B": "832*480", "ti2v-5B": "1280*704"}
_GUIDANCE = {"t2v-A14B": (3.0, 4.0), "i2v-A14B": (3.5, 3.5)}  # for low and for high noise
_STRIDES = {"ti2v-5B": 16}
# Pipelines that need a picture and do not say so by their arguments, which all have defaults.
_FROM_PICTURES = re.compile(r"Edit|Img2Img|ImageToImage|ImageToVideo")
_PICTURE = 1024  # pixels of a side, for an estimate where neither settings nor pipeline say more

Place = Callable[[str], str]
"""Where a setting stands, for messages."""


@dataclass(frozen=True)
class Generation:
    """One call of a pipeline.

    Args:
        arguments: of the call, pictures as paths.
        facts: what a captured file is recognised by, as JSON values.
        seed: of the noise.
        tokens: how many a transformer is given at once, as far as it is known before.
        calls: how often a transformer is called, as far as it is known before.
        solver, shift: of the scheduler, None for its own.
        from_image: whether the pipeline that begins with a picture is needed where there is another one.
        offload: whether parts of the pipeline leave the device once they have run.
        text_on_cpu: whether the text encoder stays on the CPU.
        where: the place of the settings in the recipe, for messages.
    """

    arguments: dict[str, Any]
    facts: dict[str, Any] = field(repr=False)
    seed: int
    tokens: int
    calls: int
    solver: Any = None
    shift: float | None = None
    from_image: bool = False
    offload: bool = True
    text_on_cpu: bool = False
    where: str = ""


def published_model(config: Mapping[str, Any], experts: int) -> str | None:
    """Which of the published Wan models a transformer is; None if it is another one."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    pictures = config["in_channels"] == 36
    if width == 5120 and experts > 1:
        return "i2v-A14B" if pictures else "t2v-A14B"
    if width == 5120:
        return "i2v-14B" if pictures else "t2v-14B"
    return {1536: "t2v-1.3B", 3072: "ti2v-5B"}.get(width)


def wan_generation(
    settings: WanSettings, config: Mapping[str, Any], experts: int, place: Place, *, expands: bool = False
) -> Generation:
    """What a Wan pipeline is told.

    Args:
        config: that of (one of) its transformers, as diffusers has it.
        experts: how many transformers there are.
        place: where a setting stands in the recipe.
        expands: whether it is a model that takes a picture or none (TI2V).

    Raises:
        SchemaValidateError: settings do not fit each other or the model.
    """

    def refuse(setting: str, what: str, remedy: str) -> NoReturn:
        raise SchemaValidateError(what, where=place(setting), remedy=remedy)

    model = published_model(config, experts)
    if settings.task is not None and settings.task != (model or settings.task):
        refuse("task", f"the recipe says {settings.task}, the checkpoint is {model}", f"leave task out, or say {model}")
    task = model or settings.task
    _check_picture(settings, config, expands, refuse)
    size = settings.size or _DEFAULT_SIZES.get(task or "", "1280*720" if model else "832*480")
    if model is not None and size not in _SIZES[model]:
        refuse("size", f"{model} does not make {size}", f"use one of {', '.join(_SIZES[model])}")
    width, height = (int(side) for side in size.split("*"))
    _, high, wide = config["patch_size"]
    stride = _STRIDES.get(task or "", 16 if expands else 8)
    for side, step, name in ((width, stride * wide, "width"), (height, stride * high, "height")):
        if side % step:
            near = f"{side // step * step} and {(side // step + 1) * step} are"
            refuse("size", f"{size}: the {name} must be a multiple of {step}", f"choose another; {near}")
    scale = settings.sample_guide_scale if settings.sample_guide_scale is not None else _GUIDANCE.get(task or "", 5.0)
    low, noisy = scale if isinstance(scale, tuple) else (scale, scale)
    if isinstance(settings.sample_guide_scale, tuple) and experts == 1:
        refuse("sample_guide_scale", "there is one transformer, and two scales are given", "give one")
    steps = settings.sample_steps or (40 if experts > 1 else 50)
    arguments: dict[str, Any] = {
        "prompt": settings.prompt,
        "negative_prompt": settings.negative_prompt,
        "height": height,
        "width": width,
        "num_frames": settings.frame_num,
        "num_inference_steps": steps,
        "guidance_scale": noisy,
    }
    if experts > 1:
        arguments["guidance_scale_2"] = low
    if settings.image is not None:
        arguments["image"] = settings.image
    frames = (settings.frame_num - 1) // 4 + 1
    tokens = frames * (height // stride // high) * (width // stride // wide)
    facts = {**arguments, "seed": settings.seed, "solver": settings.sample_solver, "shift": settings.sample_shift}
    return Generation(
        arguments,
        facts,
        settings.seed,
        tokens=tokens,
        calls=steps * (2 if max(low, noisy) > 1 else 1),
        solver=settings.sample_solver,
        shift=settings.sample_shift,
        from_image=expands and settings.image is not None,
        offload=settings.offload_model,
        text_on_cpu=settings.t5_cpu,
    )


def _check_picture(
    settings: WanSettings, config: Mapping[str, Any], expands: bool, refuse: Callable[[str, str, str], NoReturn]
) -> None:
    needs = config["in_channels"] != config["out_channels"] or config.get("image_dim") is not None
    if needs and settings.image is None:
        refuse("image", "the model begins with a picture, and the recipe names none", "give image: PATH")
    if settings.image is not None and not needs and not expands:
        refuse("image", "the model makes videos of text alone", "leave image out")
    kind = "i2v" if needs else "ti2v" if expands else "t2v"
    if settings.task is not None and settings.task.partition("-")[0] != kind:
        refuse("task", f"the recipe says {settings.task}, the checkpoint is {kind}", "leave task out")


def general_generation(settings: GeneralSettings, folder: Path, config: Mapping[str, Any], place: Place) -> Generation:
    """What any other pipeline is told: what the settings say, and the rest as the pipeline has it.

    Raises:
        SchemaValidateError: the pipeline of the folder does not take a setting, or needs one that is missing.
    """
    import diffusers

    name = pipeline_index(folder)["_class_name"]
    given = settings.call()
    with quiet_libraries():
        kind: Any = getattr(diffusers, name, None)
    parameters = {} if kind is None else inspect.signature(kind.__call__).parameters
    for argument in given:
        if parameters and argument not in parameters:
            raise SchemaValidateError(f"{name} does not take it", where=place(argument), remedy="leave it out")
    asks = "image" in parameters and "image" not in given
    if asks and (parameters["image"].default is inspect.Parameter.empty or _FROM_PICTURES.search(name)):
        raise SchemaValidateError(f"{name} needs a picture", where=place("image"), remedy="give image: PATH")

    def value(argument: str, otherwise: int) -> int:
        found = given.get(argument)
        if found is None and argument in parameters and isinstance(parameters[argument].default, int):
            found = parameters[argument].default
        return found or otherwise

    frames = (value("num_frames", 1) - 1) // 4 + 1
    tokens = frames * (value("height", _PICTURE) // 16) * (value("width", _PICTURE) // 16)
    calls = value("num_inference_steps", 50) * (2 if given.get("true_cfg_scale") else 1)
    seed = SEED if settings.seed == -1 else settings.seed
    return Generation(given, {**given, "seed": seed}, seed, tokens=tokens, calls=calls, offload=settings.offload_model)


def planned_generation(folder: Path, recipe: Recipe, spec: SpecSd) -> Generation:
    """What the pipeline of a model folder is told by a recipe.

    Raises:
        SchemaValidateError: the recipe does not say, or what it says does not fit the model.
        InvalidDatasetError: a picture cannot be read.
    """
    components = list(transformer_folders(folder))
    config = open_transformer(folder, components[0]).config
    name = spec.multimodal_sd_config.name

    def place(setting: str) -> str:
        path = ("spec", "multimodal_sd_config", name, setting)
        return f"{recipe.document.where(path)}: {'.'.join(path)}"

    if is_wan(config):
        settings = settings_of(recipe, spec, WanSettings)
        made = wan_generation(settings, config, len(components), place, expands=_expands_timesteps(folder))
    else:
        made = general_generation(settings_of(recipe, spec, GeneralSettings), folder, config, place)
    pictures = made.arguments.get("image") or ()
    digests = [  # read now, not when a large model has been loaded
        hashlib.sha256(open_picture(Path(picture), place("image")).tobytes()).hexdigest()
        for picture in ([pictures] if isinstance(pictures, str) else pictures)
    ]
    facts = {**made.facts, "image": digests} if digests else made.facts  # wherever the pictures lie
    return replace(made, facts=facts, where=place("").rstrip("."))


def _expands_timesteps(folder: Path) -> bool:
    """Whether the pipeline gives every token its own time step, as TI2V does, which may begin with a picture."""
    if layout_of(folder) == "diffusers":
        return bool(pipeline_index(folder).get("expand_timesteps"))
    from slim_sd.wan.files import family

    return family(folder).task == "ti2v"
