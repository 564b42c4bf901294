"""``spec`` of ``multimodal_sd_modelslim_v1``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from slim_core.errors import SchemaValidateError
from slim_core.recipe import AnySaver, DatasetConfig, LayerWiseSpec, PriorStage, Recipe, SaverConfig, StrictModel
from slim_core.recipe.plugins import SAVER_GROUP, PluginConfig
from slim_core.recipe.problems import validate
from slim_sd.settings import GeneralSettings, WanSettings, check_settings

__all__ = ["DumpConfig", "SdConfig", "SpecSd", "dump_folder", "settings_of"]

S = TypeVar("S", WanSettings, GeneralSettings)

_NO_DATASET = (
    "diffusion models are calibrated on what their own pipeline is given while it generates; write the prompt into "
    "multimodal_sd_config.model_config, or point multimodal_sd_config.dump_config.dump_data_dir to a calib_data.pth, "
    "and leave dataset out"
)


def _without_nulls(value: Any) -> Any:
    """A setting without a value is none."""
    if not isinstance(value, Mapping):
        return value
    return {key: item for key, item in cast("Mapping[Any, Any]", value).items() if item is not None}


Settings = Annotated[Mapping[str, Any], BeforeValidator(_without_nulls), AfterValidator(check_settings)]
"""Field type: what the pipeline generates."""


class DumpConfig(StrictModel):
    """How calibration inputs are captured, and where they are kept."""

    capture_mode: Literal["args"] = Field(
        default="args", description="What is captured: the arguments of the transformer"
    )
    dump_data_dir: str = Field(
        default="",
        max_length=4096,
        description="Folder of calib_data.pth, which is used if it is there. Default: save_path",
    )
    enable_dump: bool = Field(default=True, description="Whether a missing calib_data.pth may be captured")
    time_steps: int | None = Field(
        default=None,
        ge=1,
        description="Calibrate on so many sampling steps, evenly spread. Default: all that were captured",
    )


class SdConfig(StrictModel):
    """Capture, and what is generated meanwhile."""

    dump_config: DumpConfig = Field(default_factory=DumpConfig, description="Capture of calibration inputs")
    tensor_names: Literal["original", "diffusers"] = Field(
        default="original",
        description="Whose names Wan's tensors are written under; MindIE-SD wants those of its own project",
    )
    settings: Settings = Field(default_factory=dict, alias="model_config", description="What the pipeline generates")
    newer: Settings | None = Field(default=None, alias="inference_config", description="Another name of model_config")

    @model_validator(mode="after")
    def _one_of_two_names(self) -> SdConfig:
        if self.newer is not None and "settings" in self.model_fields_set:
            raise PydanticCustomError("two_names", "model_config and inference_config are one and the same; give one")
        return self

    @model_serializer(mode="wrap")
    def _by_the_names_of_recipes(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        plain = handler(self)
        names = plain["tensor_names"]
        return {"dump_config": plain["dump_config"], "tensor_names": names, self.name: dict(self.given)}

    @property
    def name(self) -> str:
        """What the recipe calls the settings."""
        return "inference_config" if self.newer is not None else "model_config"

    @property
    def given(self) -> Mapping[str, Any]:
        return self.newer if self.newer is not None else self.settings


class SpecSd(LayerWiseSpec):
    """The fields of ``modelslim_v1``, with a pipeline to capture calibration inputs from in place of a data set.

    ``runner`` takes what ``modelslim_v1`` takes, and becomes ``layer_wise``.
    """

    models = "diffusion models"

    save: tuple[AnySaver, ...] = Field(
        default_factory=lambda: (
            cast("SaverConfig", PluginConfig(SAVER_GROUP).parse({"type": "mindie_format_saver"})),
        ),
        description="What writes the result. Default: mindie_format_saver",
    )
    dataset: DatasetConfig = Field(
        default=DatasetConfig(path="calib_data.pth"), exclude=True, description="Refused: see multimodal_sd_config"
    )
    multimodal_sd_config: SdConfig = Field(
        default_factory=SdConfig, description="Capture of calibration inputs from the model's own pipeline"
    )

    @field_validator("dataset", mode="before")
    @classmethod
    def _is_refused(cls, value: Any) -> Any:
        raise PydanticCustomError("no_dataset", "{text}", {"text": _NO_DATASET})

    @field_validator("prior")
    @classmethod
    def _on_the_same_capture(cls, stages: tuple[PriorStage, ...]) -> tuple[PriorStage, ...]:
        if any(stage.dataset is not None for stage in stages):
            raise PydanticCustomError("no_dataset", "{text}", {"text": _NO_DATASET})
        return stages


def settings_of(recipe: Recipe, spec: SpecSd, family: type[S]) -> S:
    """What the pipeline of a family of models is to generate.

    Raises:
        SchemaValidateError: nothing is said of it, or something that this family does not know.
    """
    config = spec.multimodal_sd_config
    place = ("spec", "multimodal_sd_config", config.name)
    if not config.given:
        raise SchemaValidateError(
            "the recipe needs calibration inputs, but does not say what to generate while they are captured",
            where=f"{recipe.document.where(place)}: {'.'.join(place)}",
            remedy="give at least a prompt, or use data-free processors only",
        )
    return validate(family, dict(config.given), document=recipe.document, at=place)


def dump_folder(spec: SpecSd) -> Path | None:
    """Where the recipe keeps what was captured; None: with the output."""
    given = spec.multimodal_sd_config.dump_config.dump_data_dir
    return Path(given).expanduser() if given else None
