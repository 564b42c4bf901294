"""``model_config``: what a pipeline generates while calibration inputs are captured.

Wan models take the fields of their own project (its command line); all others those of the pipeline's ``__call__`` in
diffusers, or the names that their original projects have for them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, Field, ValidationError, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from slim_core.recipe import Integer, Number, StrictModel
from slim_core.recipe.wording import nearest, one_of

__all__ = ["GeneralSettings", "WanSettings", "check_settings", "field_names"]

SEED = 42  # what -1 stands for: calibration is repeatable unless somebody wants it otherwise

_SIZE = re.compile(r"([1-9]\d{1,4})\*([1-9]\d{1,4})")


def _says_something(value: str) -> str:
    if not value.strip():
        raise PydanticCustomError("empty_prompt", "must not be empty")
    return value


def _is_size(value: str) -> str:
    if not _SIZE.fullmatch(value):
        raise PydanticCustomError("size", "must be width*height in pixels, such as 1280*720")
    return value


def _has_a_middle_frame(value: int) -> int:
    if value % 4 != 1:
        below = max(value - value % 4 - 3, 1) if value % 4 == 0 else value - value % 4 + 1
        raise PydanticCustomError(
            "frames",
            "must be 4n+1, because the VAE makes one latent of the first frame and one of every four that follow; "
            "{below} or {above} would do",
            {"below": below, "above": below + 4},
        )
    return value


Prompt = Annotated[str, Field(max_length=10_000), AfterValidator(_says_something)]
Scale = Annotated[Number, Field(ge=0)]
Frames = Annotated[int, Field(ge=1, le=10_000), AfterValidator(_has_a_middle_frame)]


class WanSettings(StrictModel):
    """The fields of the original Wan projects."""

    prompt: Prompt = Field(description="What is generated")
    negative_prompt: str = Field("", max_length=10_000, description="What is not; used with guidance")
    task: Literal["t2v-14B", "t2v-1.3B", "i2v-14B", "t2v-A14B", "i2v-A14B", "ti2v-5B"] | None = Field(
        None, description="Which of the published models it is. Default: what the checkpoint is"
    )
    size: Annotated[str, AfterValidator(_is_size)] | None = Field(
        None, description="Width*height in pixels. Default: 1280*720, 832*480 for t2v-1.3B, 1280*704 for ti2v-5B"
    )
    frame_num: Frames = Field(81, description="Frames of the video, 4n+1")
    sample_steps: int | None = Field(
        None, ge=1, le=1000, description="Sampling steps. Default: 50; 40 with two experts"
    )
    sample_solver: Literal["unipc", "dpm++"] = Field("unipc", description="Sampling method")
    sample_shift: float | None = Field(
        None, gt=0, description="Shift of the noise schedule. Default: by model and size"
    )
    sample_guide_scale: Scale | tuple[Scale, Scale] | None = Field(
        None, description="Guidance scale; of two experts first that for low noise. Default: 5.0, or by model"
    )
    base_seed: int = Field(-1, ge=-1, lt=2**63, description=f"Seed of the noise; -1 is {SEED}")
    image: str | None = Field(None, min_length=1, description="Picture that the video begins with")
    offload_model: bool = Field(True, description="Move each part of the pipeline off the device once it has run")
    t5_cpu: bool = Field(False, description="Run the text encoder on the CPU")
    # Accepted so that a project's own settings can be copied, as long as they ask for nothing that is not done.
    convert_model_dtype: bool = Field(False, description="No effect: weights are captured in the dtype they run in")
    ckpt_dir: str | None = Field(None, description="No effect: --model_path says where the model is")
    save_file: str | None = Field(None, description="No effect: no video is kept")
    ulysses_size: int = Field(1, ge=1, description="Must be 1")
    ring_size: int = Field(1, ge=1, description="Must be 1")
    t5_fsdp: bool = Field(False, description="Must be false")
    dit_fsdp: bool = Field(False, description="Must be false")
    use_prompt_extend: bool = Field(False, description="Must be false")

    @field_validator("ulysses_size", "ring_size", "t5_fsdp", "dit_fsdp", "use_prompt_extend")
    @classmethod
    def _is_not_done(cls, value: int | bool) -> int | bool:
        if value not in (1, False) or value is True:
            raise PydanticCustomError("not_done", "is not done while calibration inputs are captured; leave it out")
        return value

    def warnings(self) -> list[str]:
        unused = ("convert_model_dtype", "ckpt_dir", "save_file")
        return [f"{name}: has no effect" for name in unused if name in self.model_fields_set]

    @property
    def pixels(self) -> tuple[int, int] | None:
        """Width and height, None if they follow from the model."""
        found = _SIZE.fullmatch(self.size) if self.size is not None else None
        return (int(found[1]), int(found[2])) if found else None

    @property
    def seed(self) -> int:
        return SEED if self.base_seed == -1 else self.base_seed


class GeneralSettings(StrictModel):
    """The fields that pipelines of diffusers share; what is left out is as the pipeline has it by itself."""

    prompt: Prompt = Field(description="What is generated")
    negative_prompt: str | None = Field(
        None,
        max_length=10_000,
        validation_alias=AliasChoices("negative_prompt", "neg_prompt"),
        description="What is not",
    )
    image: str | tuple[str, ...] | None = Field(None, description="Picture, or pictures, to begin with or to edit")
    height: int | None = Field(None, ge=16, le=16384, description="Pixels")
    width: int | None = Field(None, ge=16, le=16384, description="Pixels")
    video_size: tuple[Integer, Integer] | None = Field(None, description="Height and width in one")
    num_frames: int | None = Field(
        None,
        ge=1,
        le=10_000,
        validation_alias=AliasChoices("num_frames", "video_length"),
        description="Frames of a video",
    )
    num_inference_steps: int | None = Field(
        None,
        ge=1,
        le=1000,
        validation_alias=AliasChoices("num_inference_steps", "infer_steps", "sample_steps"),
        description="Sampling steps",
    )
    guidance_scale: float | None = Field(
        None,
        ge=0,
        validation_alias=AliasChoices("guidance_scale", "embedded_cfg_scale"),
        description="Guidance scale",
    )
    true_cfg_scale: float | None = Field(None, ge=0, description="Scale of guidance by a second, unconditional call")
    max_sequence_length: int | None = Field(None, ge=1, description="Most tokens of the prompt")
    seed: int = Field(
        -1,
        ge=-1,
        lt=2**63,
        validation_alias=AliasChoices("seed", "base_seed"),
        description=f"Seed of the noise; -1 is {SEED}",
    )
    offload_model: bool = Field(True, description="Move each part of the pipeline off the device once it has run")

    @field_validator("video_size")
    @classmethod
    def _has_pixels(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and min(value) < 16:
            raise PydanticCustomError("size", "must be two numbers of pixels, at least 16")
        return value

    def call(self) -> dict[str, Any]:
        """The arguments of the pipeline that were given, pictures as paths."""
        given = {
            name: value
            for name in type(self).model_fields
            if name not in ("seed", "offload_model", "video_size") and (value := getattr(self, name)) is not None
        }
        if self.video_size is not None:
            given |= dict(zip(("height", "width"), self.video_size, strict=True))
        return given


_FAMILIES: tuple[type[StrictModel], ...] = (WanSettings, GeneralSettings)


def field_names(family: type[StrictModel]) -> dict[str, str]:
    """Every name that a recipe may use, and the field it is for."""
    names: dict[str, str] = {}
    for field, info in family.model_fields.items():
        choices = info.validation_alias.choices if isinstance(info.validation_alias, AliasChoices) else [field]
        names |= {str(choice): field for choice in choices}
    return names


def check_settings(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Refuse what no family of models would take; which family it is shows when the model is opened.

    Raises:
        ValidationError: an unknown name, or a value of the wrong type or out of range for all that know the name.
    """
    known = [name for family in _FAMILIES for name in field_names(family)]
    problems: list[InitErrorDetails] = []
    for name, value in given.items():
        if name not in known:
            text = f"unknown field{nearest(str(name), known)} (fields: {one_of(list(dict.fromkeys(known)))})"
            problems.append(_problem(text, name, value))
            continue
        texts = [_objection(family, name, value) for family in _FAMILIES if name in field_names(family)]
        if all(texts):
            problems.append(_problem(str(texts[0]), name, value))
    if problems:
        raise ValidationError.from_exception_data("model_config", problems)
    return given


def _objection(family: type[StrictModel], name: str, value: Any) -> str | None:
    """What one family says of one value; None if it takes it."""
    try:
        family.model_validate({"prompt": "any", name: value})
    except ValidationError as error:
        message = error.errors(include_url=False)[0]["msg"]
        return re.sub(r"^(Input|String|Tuple|List|Dictionary) should", "must", message)
    return None


def _problem(text: str, name: str, value: Any) -> InitErrorDetails:
    return InitErrorDetails(type=PydanticCustomError("setting", "{text}", {"text": text}), loc=(name,), input=value)
