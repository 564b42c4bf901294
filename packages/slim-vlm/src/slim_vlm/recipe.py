"""``spec`` of ``multimodal_vlm_modelslim_v1``."""

from __future__ import annotations

from typing import Annotated

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    field_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from slim_core.recipe import Dataset, DatasetConfig, LayerWiseSpec, PriorStage

__all__ = ["SpecVlm"]

_DEFAULT = DatasetConfig(path="calibImages")


def _problems(value: DatasetConfig, *place: str | int) -> list[InitErrorDetails]:
    """What would cut pictures in two, or need padding between samples of different sizes."""
    found: list[InitErrorDetails] = []
    if value.max_length is not None:
        text = PydanticCustomError("cut_images", "it would cut through the tokens of an image; leave it out")
        found.append(InitErrorDetails(type=text, loc=(*place, "max_length"), input=value.max_length))
    if value.batch_size != 1:
        text = PydanticCustomError("image_batches", "must be 1: images differ in size, one runs at a time")
        found.append(InitErrorDetails(type=text, loc=(*place, "batch_size"), input=value.batch_size))
    return found


def _images(value: DatasetConfig) -> DatasetConfig:
    if problems := _problems(value):
        raise ValidationError.from_exception_data("dataset", problems)
    return value


Images = Annotated[Dataset, AfterValidator(_images)]
"""Field type: a calibration set of images."""


class SpecVlm(LayerWiseSpec):
    """The fields of ``modelslim_v1``, with images to calibrate on.

    ``runner`` takes what ``modelslim_v1`` takes, and becomes ``layer_wise``.
    """

    models = "vision-language models"

    default_text: str = Field(
        default="Describe this image in detail.",
        max_length=10_000,
        description="Prompt for images that come without one",
    )
    dataset: Images = Field(
        default=_DEFAULT,
        description="Calibration set: a name in lab_calib, a folder of images, one with a JSON or JSONL file beside "
        "them, or such a file. Default: calibImages",
    )

    @field_validator("prior")
    @classmethod
    def _on_images_too(cls, stages: tuple[PriorStage, ...]) -> tuple[PriorStage, ...]:
        problems = [
            problem
            for i, stage in enumerate(stages)
            if stage.dataset is not None
            for problem in _problems(stage.dataset, i, "dataset")
        ]
        if problems:
            raise ValidationError.from_exception_data("prior", problems)
        return stages

    @field_validator("default_text")
    @classmethod
    def _says_something(cls, value: str) -> str:
        if not value.strip():
            raise PydanticCustomError("empty_prompt", "must not be empty; leave it out for the default prompt")
        return value
