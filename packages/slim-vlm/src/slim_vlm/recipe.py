"""``spec`` of ``multimodal_vlm_modelslim_v1``."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, field_validator
from pydantic_core import PydanticCustomError

from slim_core.recipe import Dataset, DatasetConfig, PriorStage, Recipe, SpecV1

__all__ = ["SpecVlm", "read_spec"]

_RUNNER = "layer_wise"


def _images(value: DatasetConfig) -> DatasetConfig:
    """Refuse what would cut pictures in two, or need padding between samples of different sizes."""
    if value.max_length is not None:
        raise PydanticCustomError("cut_images", "max_length would cut through the tokens of an image; leave it out")
    if value.batch_size != 1:
        raise PydanticCustomError("image_batches", "batch_size must be 1: images differ in size, one runs at a time")
    return value


Images = Annotated[Dataset, AfterValidator(_images)]
"""Field type: a calibration set of images."""


class SpecVlm(SpecV1):
    """The fields of ``modelslim_v1``, with images to calibrate on.

    ``runner`` takes what ``modelslim_v1`` takes, and becomes ``layer_wise``.
    """

    default_text: str = Field(
        default="Describe this image in detail.",
        max_length=10_000,
        description="Prompt for images that come without one",
    )
    dataset: Images = Field(
        default=DatasetConfig(path="calibImages"),
        description="Calibration set: a name in lab_calib, a folder of images, one with a JSON or JSONL file beside "
        "them, or such a file. Default: calibImages",
    )

    @field_validator("runner")
    @classmethod
    def _one_layer_at_a_time(cls, value: str) -> str:
        return _RUNNER

    @field_validator("prior")
    @classmethod
    def _on_images_too(cls, stages: tuple[PriorStage, ...]) -> tuple[PriorStage, ...]:
        for stage in stages:
            if stage.dataset is not None:
                _images(stage.dataset)
        return stages

    @field_validator("default_text")
    @classmethod
    def _says_something(cls, value: str) -> str:
        if not value.strip():
            raise PydanticCustomError("empty_prompt", "must not be empty; leave it out for the default prompt")
        return value


def read_spec(recipe: Recipe) -> tuple[SpecVlm, list[str]]:
    """``spec`` of a recipe, and warnings about what it says.

    Raises:
        SchemaValidateError: it does not fit; names every problem with line and field.
    """
    spec = recipe.spec(SpecVlm)
    runner = recipe.raw_spec.get("runner", _RUNNER)
    if runner == _RUNNER:
        return spec, []
    where = recipe.document.where(("spec", "runner"))
    return spec, [f"{where}: runner {runner!r} becomes {_RUNNER!r}, the only one for vision-language models"]
