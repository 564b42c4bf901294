"""The typed form of a recipe: its metadata and the ``spec`` that all ``*_v1`` protocols share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from slim_core.recipe.base import Flag, Integer, SaverConfig, StrictModel
from slim_core.recipe.order import in_order
from slim_core.recipe.plugins import PROCESSOR_GROUP, SAVER_GROUP, AnyProcessor, AnySaver, PluginConfig, plugin_names
from slim_core.recipe.stages import check_stages

__all__ = ["Dataset", "DatasetConfig", "Label", "Metadata", "PriorStage", "SpecV1", "spec_model"]

ShortText = Annotated[str, Field(max_length=200)]


class Label(TypedDict, total=False):
    """What a practice quantizes to; further keys are allowed and mean nothing."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore

    w_bit: Annotated[Integer, Field(description="Weight bits")]
    a_bit: Annotated[Integer, Field(description="Activation bits")]
    is_sparse: Annotated[Flag, Field(description="Weights are sparse")]
    kv_cache: Annotated[Flag, Field(description="The KV cache is quantized")]
    fa_quant: Annotated[Flag, Field(description="Attention is quantized (to 8 bits unless fa_bit says otherwise)")]
    fa_bit: Annotated[Integer, Field(description="Attention bits")]


class Metadata(StrictModel):
    """How the practice library finds a recipe; optional in a recipe of one's own."""

    config_id: ShortText = Field(default="Unknown", description="Name of the practice")
    score: float = Field(default=100.0, ge=0, description="Practices with a higher score are preferred")
    label: Label = Field(default_factory=Label, description="What the practice quantizes to")
    verified_model_types: tuple[ShortText, ...] = Field(default=(), description="Model types the practice is meant for")
    verified_tags: Mapping[str, tuple[tuple[str, ...], ...]] = Field(
        default_factory=dict, description="Model type to scenarios; a scenario is a list of engine and hardware tags"
    )


class DatasetConfig(StrictModel):
    """A calibration set; in a recipe a plain name means one with these defaults."""

    path: str = Field(min_length=1, max_length=4096, description="File name in lab_calib, or a path")
    max_length: int | None = Field(default=None, ge=1, description="Cut samples to this many tokens. Default: never")
    num_samples: int | None = Field(default=None, ge=1, description="Use only the first samples. Default: all")
    batch_size: int = Field(default=1, ge=1, description="Samples per forward")
    min_tokens_per_expert: int = Field(
        default=0,
        ge=0,
        description="Calibration tokens that every routed expert should see. Default: no quota",
    )
    extra_share: float = Field(
        default=0.25,
        ge=0,
        description="Extra samples, from which only experts below the quota learn: at most this share of the tokens",
    )
    route_starved_experts: bool = Field(
        default=False, description="Show experts that stay below the quota tokens that were routed to others"
    )

    @model_validator(mode="after")
    def _routing_has_a_quota(self) -> DatasetConfig:
        if self.route_starved_experts and not self.min_tokens_per_expert:
            raise PydanticCustomError(
                "routing_without_quota", "route_starved_experts needs min_tokens_per_expert, a number above 0"
            )
        return self

    @model_serializer(mode="wrap")
    def _name_if_plain(self, handler: SerializerFunctionWrapHandler) -> Any:
        return self.path if self == DatasetConfig(path=self.path) else handler(self)


def _from_name(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Dataset = Annotated[DatasetConfig, BeforeValidator(_from_name, json_schema_input_type=str | DatasetConfig)]
"""Field type: a calibration set, given by name or as a mapping."""


Processors = Annotated[tuple[AnyProcessor, ...], AfterValidator(in_order)]
"""Field type: processors, each of which comes before those of a later phase."""


class PriorStage(StrictModel):
    """A run ahead of the main one, whose results the main one uses."""

    process: Processors = Field(description="Processors of this stage, in order")
    dataset: Dataset | None = Field(default=None, description="Calibration set of this stage. Default: the one of spec")

    @field_validator("dataset")
    @classmethod
    def _no_quota(cls, value: DatasetConfig | None) -> DatasetConfig | None:
        if value is not None and value.min_tokens_per_expert:
            raise PydanticCustomError(
                "quota_of_a_stage", "min_tokens_per_expert is met in the main stage; give it in spec.dataset"
            )
        return value


class SpecV1(StrictModel):
    """``spec`` of ``modelslim_v1``; the multimodal protocols subclass it and add their own fields.

    Processors and savers are the configuration classes of the installed entry points, chosen by ``type``.
    """

    runner: Literal["auto", "layer_wise", "dp_layer_wise", "model_wise"] = Field(
        default="auto",
        description="How layers are scheduled: one at a time, one at a time on several devices, or all at once",
    )
    process: Processors = Field(default=(), description="Processors, in order")
    save: tuple[AnySaver, ...] = Field(
        default_factory=lambda: (cast("SaverConfig", PluginConfig(SAVER_GROUP).parse({"type": "ascendv1_saver"})),),
        description="The saver that writes the result. Default: ascendv1_saver",
    )
    dataset: Dataset = Field(
        default=DatasetConfig(path="mix_calib.jsonl"), description="Calibration set. Default: mix_calib.jsonl"
    )
    propagate: Literal["float", "quantized"] = Field(
        default="float",
        description="What a block hands to the next one during calibration: its exact or its quantized output",
    )
    prior: tuple[PriorStage, ...] = Field(default=(), description="Stages to run ahead of process")

    @model_validator(mode="after")
    def _stages_fit(self) -> SpecV1:
        check_stages([stage.process for stage in self.prior], self.process)
        return self


def spec_model() -> type[SpecV1]:
    """:class:`SpecV1`, after checking that every installed processor and saver can be imported.

    Validating a recipe needs no such call: it imports the types that the recipe names and no others.

    Raises:
        EnvError: an entry point is broken; names the package it belongs to.
    """
    for group in (PROCESSOR_GROUP, SAVER_GROUP):
        for name in plugin_names(group):
            PluginConfig(group).config_class(name)
    return SpecV1
