"""How one tensor is quantized: the ``qconfig`` leaves of a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from slim_core.recipe.base import Flag, Integer, Number, StrictModel
from slim_core.recipe.wording import nearest, one_of

__all__ = ["METHODS", "ActConfig", "DType", "Ext", "LinearQConfig", "QConfig", "Scope", "WeightConfig"]

DType = Literal["float", "int8", "int4", "mxfp8", "mxfp4", "fp8_e4m3"]
Scope = Literal["per_tensor", "per_channel", "per_group", "per_block", "per_token", "pd_mix", "per_head", "dual_scale"]

_SEARCH = frozenset({"enable_search", "search_min", "search_max", "search_step"})
_MOST_STEPS = 1000
METHODS: Mapping[str, frozenset[str]] = {
    "none": frozenset(),
    "minmax": frozenset({"aggregation_type", "axes", "group_size"}),
    "histogram": frozenset({"bins", "metric", "percentile"}),
    "ssz": frozenset({"step", "weighted", "group_size"}),
    "gptq": frozenset({"percdamp", "block_size", "group_size", "actorder"}),
    "autoround": frozenset({"group_size", "scale_dtype"}),
    "sparse": frozenset({"fraction", "use_sigma", "sigma_factor"}),
    "mse_round": frozenset({"axes"}),
    "ceil_x": frozenset({"axes", "ceil_x_value"}) | _SEARCH,
    "fouroversix": frozenset({"axes"}),
    "dualscale": frozenset({"axes", "dual_block_size"}),
}
"""Methods of the protocol and the ``ext`` keys each of them reads."""

_SCOPES_OF_KEY: Mapping[str, frozenset[str]] = {
    "aggregation_type": frozenset({"per_tensor", "per_channel", "per_head", "pd_mix"}),
    "axes": frozenset({"per_block", "dual_scale"}),
    "group_size": frozenset({"per_group"}),
}
_FLOATING = ("float", "mxfp8", "mxfp4", "fp8_e4m3")
# What the reference tool allows for the method sparse; other values are carried out as well.
_DOCUMENTED = {"fraction": (0.01, 0.1), "sigma_factor": (3, 4)}


class Ext(TypedDict, total=False):
    """Settings of single methods. A key that no method reads is an error, one that this method ignores a warning."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)  # pyright: ignore

    aggregation_type: Annotated[
        Literal["max", "mean"], Field(description="minmax: extremes over all samples, or the mean of each sample's")
    ]
    step: Annotated[Integer, Field(gt=0, description="ssz: least-squares steps, at most. Default: 50")]
    weighted: Annotated[
        Flag, Field(description="ssz: count the error of a column by its mean squared input. Default: false")
    ]
    actorder: Annotated[Flag, Field(description="gptq: solve the columns with the largest inputs first. Default: true")]
    percdamp: Annotated[
        Number, Field(gt=0, description="gptq: damping as a share of the Hessian's mean diagonal. Default: 0.01")
    ]
    block_size: Annotated[Integer, Field(gt=0, description="gptq: input columns solved at a time. Default: 128")]
    group_size: Annotated[Integer, Field(gt=0, description="per_group scope: input columns that share a scale")]
    scale_dtype: Annotated[
        Literal["float16", "float32", "bfloat16"], Field(description="autoround: precision of the scales")
    ]
    fraction: Annotated[
        Number, Field(ge=0, le=1, description="sparse: share of each row's weights kept at full width. Default: 0.01")
    ]
    use_sigma: Annotated[
        Flag, Field(description="sparse: keep what lies outside sigma_factor deviations instead. Default: false")
    ]
    sigma_factor: Annotated[
        Number, Field(gt=0, description="sparse: standard deviations from the row's mean. Default: 3.0")
    ]
    axes: Annotated[Integer | list[Integer], Field(description="MX formats: axis along which the blocks run")]
    dual_block_size: Annotated[Integer, Field(gt=0, description="dualscale: columns that share the outer scale")]
    ceil_x_value: Annotated[Number, Field(ge=6, le=12, description="ceil_x: where a block's maximum is mapped to")]
    enable_search: Annotated[Flag, Field(description="ceil_x: search that value instead")]
    search_min: Annotated[Number, Field(gt=0, description="ceil_x: lowest value searched")]
    search_max: Annotated[Number, Field(gt=0, description="ceil_x: highest value searched")]
    search_step: Annotated[Number, Field(gt=0, description="ceil_x: distance between the values searched")]
    bins: Annotated[Integer, Field(gt=1, le=32768, description="histogram: number of bins, at most. Default: 8192")]
    metric: Annotated[
        Literal["mse", "percentile", "entropy"],
        Field(description="histogram: what the clipping range minimises, or that it keeps a percentile. Default: mse"),
    ]
    percentile: Annotated[
        Number, Field(gt=0, le=100, description="histogram, metric percentile: percent of values kept. Default: 99.99")
    ]


class QConfig(StrictModel):
    """Number format, granularity and method of one tensor; every field but ``ext`` is required.

    A processor with its own methods subclasses this and overrides :attr:`methods` (and the type of ``ext``).
    """

    methods: ClassVar[Mapping[str, frozenset[str]]] = METHODS

    dtype: DType = Field(description="Number format")
    scope: Scope = Field(description="What shares one scale; for activations per_tensor is static, per_token dynamic")
    symmetric: bool = Field(description="Zero maps to zero: no offset")
    method: str = Field(description=f"How the scale is found: {one_of(METHODS)}")
    ext: Ext = Field(default_factory=Ext, description="Settings of the method")

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        if method not in cls.methods:
            raise PydanticCustomError(
                "unknown_method",
                "allowed: {allowed}{hint}",
                {"allowed": one_of(cls.methods), "hint": nearest(method, cls.methods)},
            )
        return method

    @model_validator(mode="after")
    def _search_interval(self) -> QConfig:
        low, high = self.ext.get("search_min", 6), self.ext.get("search_max", 12)
        if _SEARCH & self.ext.keys() and high <= low:
            raise PydanticCustomError(
                "search_interval",
                "ext.search_max ({high}) must exceed ext.search_min ({low})",
                {"low": low, "high": high},
            )
        step = self.ext.get("search_step", 0.25)
        if _SEARCH & self.ext.keys() and (high - low) / step > _MOST_STEPS:
            raise PydanticCustomError(
                "search_step",
                "ext.search_step ({step}) makes more than {most} values to try; take a larger one",
                {"step": step, "most": _MOST_STEPS},
            )
        return self

    def warnings(self) -> list[str]:
        """The keys of ``ext`` that have no effect with this method and scope, or an unusual value."""
        ignored = [
            f"ext.{key} has no effect with method {self.method} and scope {self.scope}"
            for key in self.ext
            if key not in self.methods[self.method] or self.scope not in _SCOPES_OF_KEY.get(key, {self.scope})
        ]
        if self.method == "ceil_x":
            return ignored + self._search_warnings()
        metric = self.ext.get("metric", "mse")
        if self.method == "histogram" and "percentile" in self.ext and metric != "percentile":
            ignored.append(f"ext.percentile has no effect with ext.metric {metric}")
        return ignored + (self._sparse_warnings() if self.method == "sparse" else [])

    def _search_warnings(self) -> list[str]:
        searching = self.ext.get("enable_search", False)
        idle = {"ceil_x_value"} if searching else _SEARCH - {"enable_search"}
        return [
            f"ext.{key} has no effect with ext.enable_search {str(searching).lower()}"
            for key in self.ext
            if key in idle
        ]

    def _sparse_warnings(self) -> list[str]:
        by_sigma = self.ext.get("use_sigma", False)
        key, other = ("sigma_factor", "fraction") if by_sigma else ("fraction", "sigma_factor")
        (low, high), value = _DOCUMENTED[key], self.ext.get(key)
        found = [f"ext.{other} has no effect with ext.use_sigma {str(by_sigma).lower()}"] if other in self.ext else []
        if value is not None and not low <= value <= high:
            found.append(f"ext.{key} is {value}; the protocol documents {low} to {high}")
        return found


def _act_symmetric(data: dict[str, Any]) -> bool:
    dynamic = data.get("scope") in ("per_token", "per_block", "per_head", "dual_scale")
    return dynamic or data.get("dtype") in _FLOATING


def _act_method(data: dict[str, Any]) -> str:
    return "none" if data.get("dtype") == "float" else "minmax"


class ActConfig(QConfig):
    """An activation; omitted fields mean static int8 with an offset."""

    dtype: DType = Field(default="int8", description="Number format. Default: int8")
    scope: Scope = Field(
        default="per_tensor", description="per_tensor: one static scale; per_token: a scale per token at run time"
    )
    symmetric: bool = Field(
        default_factory=_act_symmetric,
        description="Zero maps to zero: no offset. Default: true for dynamic scopes and floating formats, else false",
    )
    method: str = Field(default_factory=_act_method, description="How the scale is found. Default: minmax")


class WeightConfig(QConfig):
    """A weight; omitted fields mean int8 with one scale per output channel."""

    dtype: DType = Field(default="int8", description="Number format. Default: int8")
    scope: Scope = Field(default="per_channel", description="What shares one scale. Default: per_channel")
    symmetric: bool = Field(default=True, description="Zero maps to zero: no offset. Default: true")
    method: str = Field(default="minmax", description="How the scale is found. Default: minmax")


class LinearQConfig(StrictModel):
    """Activation and weight of a linear layer; ``act`` is None where activations stay in floating point."""

    act: ActConfig | None = Field(default=None, description="Activation; left out, activations stay in floating point")
    weight: WeightConfig = Field(description="Weight; an empty mapping takes the defaults")

    @field_validator("act")
    @classmethod
    def _float_is_none(cls, act: ActConfig | None) -> ActConfig | None:
        return None if act is not None and act.dtype == "float" else act
