"""``spec`` of ``modelslim_v0``: every field of the old Python interface that a recipe could hold, with its range."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from slim_core.quantization.kinds import LayerKind
from slim_core.recipe import StrictModel, escape_pattern
from slim_core.recipe.patterns import MAX_LENGTH, compile_pattern
from slim_llm.v0.names import from_fnmatch, is_exact

__all__ = [
    "DEFAULT_DATASET",
    "AntiConfig",
    "CalibConfig",
    "CalibParams",
    "FlexConfig",
    "MixType",
    "SaveParams",
    "SpecV0",
]

DEFAULT_DATASET = "teacher_qualification.jsonl"
MixType = Literal["w8a8", "w8a16", "w8a8_dynamic", "w4a8_dynamic", "float"]


def _wrong(text: str) -> PydanticCustomError:
    # Through ctx, since the template would trip over braces in the text.
    return PydanticCustomError("v0", "{text}", {"text": text})


def _choice(*allowed: int) -> AfterValidator:
    def check(value: int) -> int:
        if value not in allowed:
            raise _wrong(f"must be {', '.join(map(str, allowed[:-1]))} or {allowed[-1]}")
        return value

    return AfterValidator(check)


def _refused(why: str) -> BeforeValidator:
    def refuse(value: Any) -> Any:
        raise _wrong(why)

    return BeforeValidator(refuse)


def _empty_if_none(value: Any) -> Any:
    return () if value is None else value


def _literal(name: str) -> str:
    if len(escape_pattern(name)) > MAX_LENGTH:
        raise _wrong(f"a name has at most {MAX_LENGTH} characters")
    return name


def _pattern(key: str) -> str:
    try:
        pattern = escape_pattern(key) if is_exact(key) else from_fnmatch(key)
        if pattern is not None:
            compile_pattern(pattern)
    except ValueError as error:
        raise _wrong(str(error)) from error
    return key


def _level(value: Any) -> Any:
    if not isinstance(value, str) or not re.fullmatch(r"L\d{1,4}", value):
        raise _wrong("must be L and a number, such as L0")
    return value


Names = Annotated[
    tuple[Annotated[str, Field(min_length=1), AfterValidator(_literal)], ...],
    BeforeValidator(_empty_if_none, json_schema_input_type=list[str] | None),
]
ApiOnly = Annotated[Any, _refused("exists in the Python interface of modelslim_v0 only; remove it")]
Device = Annotated[Any, Field(description="Ignored: the device is that of the command")]


class FlexConfig(StrictModel):
    """Exponents of flexible smoothing; both are searched where one is missing."""

    alpha: float | None = Field(default=None, gt=0, lt=1, description="Exponent of the activations")
    beta: float | None = Field(default=None, gt=0, lt=1, description="Exponent of the weights")


class AntiConfig(StrictModel):
    """``anti_cfg``: outlier suppression."""

    anti_method: Literal["m1", "m2", "m3", "m4", "m5", "m6"] = Field(default="m2", description="Algorithm")
    w_bit: Annotated[int, _choice(4, 8)] = Field(default=8, description="Weight bits that the algorithm assumes")
    a_bit: Annotated[int, _choice(8, 16)] = Field(default=8, description="Activation bits that it assumes")
    w_sym: bool = Field(default=True, description="Whether it assumes weights without an offset")
    disable_anti_names: Names = Field(default=(), description="Linears to leave alone")
    flex_config: FlexConfig | None = Field(default=None, description="Exponents of m6")
    dev_type: Device = None
    dev_id: Device = None

    @model_validator(mode="after")
    def _consistent(self) -> AntiConfig:
        if self.anti_method != "m3":
            _raise_all(type(self).__name__, self, _only_awq(self))
        return self


def _only_awq(config: AntiConfig) -> Iterator[tuple[str, str]]:
    if config.a_bit == 16:
        yield "a_bit", "16 is for anti_method m3 only; use 8"
    if not config.w_sym:
        yield "w_sym", "false is for anti_method m3 only; use true"


class CalibConfig(StrictModel):
    """``calib_cfg``: quantization. :attr:`kind` is the layer that it makes."""

    w_bit: Annotated[int, _choice(4, 8)] = Field(default=8, description="Weight bits")
    a_bit: Annotated[int, _choice(4, 8, 16)] = Field(default=8, description="Activation bits; 16: floating point")
    disable_names: Names = Field(default=(), description="Linears that stay in floating point")
    disable_last_linear: bool = Field(default=True, description="The head stays in floating point")
    act_method: Annotated[int, _choice(1, 2, 3)] = Field(
        default=1, description="Static activations: 1 minmax, 2 histogram, 3 chosen for each layer"
    )
    w_method: Literal["MinMax", "GPTQ", "HQQ", "NF"] = Field(default="MinMax", description="How weights are rounded")
    w_sym: bool = Field(default=True, description="Weights have no offset")
    mm_tensor: bool = Field(default=True, description="One scale per weight tensor; only false can be carried out")
    is_dynamic: bool = Field(default=False, description="Activations get a scale per token at run time")
    pdmix: bool = Field(default=False, description="Per token in prefill, per tensor in decode")
    use_kvcache_quant: bool = Field(default=False, description="int8 KV cache")
    kv_sym: bool = Field(default=True, description="The KV cache has no offset")
    use_fa_quant: bool = Field(default=False, description="int8 attention")
    fa_amp: int = Field(default=0, ge=0, description="Layers whose attention falls back to floating point")
    is_lowbit: bool = Field(default=False, description="The low-bit engine")
    co_sparse: bool = Field(default=False, description="The sparse engine; overridden by is_lowbit")
    use_sigma: bool = Field(default=False, description="Low-bit engine: outliers by deviation, not by share")
    sigma_factor: float = Field(default=3.0, ge=3, le=4, description="Deviations from the mean")
    fraction: float = Field(default=0.01, ge=0.01, le=0.1, description="Share of weights that are outliers")
    do_smooth: bool = Field(default=False, description="Smoothing of the low-bit engine")
    open_outlier: bool = Field(default=True, description="Low-bit engine: false means weights in groups")
    group_size: Annotated[int, _choice(32, 64, 128, 256)] = Field(default=64, description="Columns of a group")
    pr: float = Field(default=1.0, ge=0, le=1, description="Probability of quantizing while calibrating")
    nonuniform: bool = Field(default=False, description="Levels at uneven distances; cannot be carried out")
    percdamp: float = Field(default=0.01, gt=0, description="GPTQ: damping")
    dev_type: Device = None
    dev_id: Device = None

    block_size: ApiOnly = Field(default=None, exclude=True)
    simulate_tp: ApiOnly = Field(default=None, exclude=True)
    timestep: ApiOnly = Field(default=None, exclude=True)

    @field_validator("w_method")
    @classmethod
    def _known_method(cls, value: str) -> str:
        if value in ("HQQ", "NF"):
            raise _wrong("modelslim_v1 has no such weight method; use MinMax or GPTQ")
        return value

    @field_validator("mm_tensor")
    @classmethod
    def _per_channel(cls, value: bool) -> bool:
        if value:  # only where it is written: defaults are not validated
            raise _wrong("modelslim_v1 has no weights with one scale per tensor; write false for one per channel")
        return value

    @field_validator("nonuniform")
    @classmethod
    def _uniform(cls, value: bool) -> bool:
        if value:
            raise _wrong("modelslim_v1 has no levels at uneven distances; write false")
        return value

    @property
    def sparse_engine(self) -> bool:
        """Whether the second engine, which knows only ``fraction``, is at work."""
        return self.co_sparse and not self.is_lowbit

    @property
    def bits(self) -> tuple[int, int]:
        """Width of weights and activations, as the engine settles it."""
        return (4, 8) if self.sparse_engine else (self.w_bit, self.a_bit)

    @property
    def kind(self) -> LayerKind | None:
        """The layer that these settings make, None if there is none. The first that fits counts."""
        grouped = self.is_lowbit and not self.open_outlier
        conditions: tuple[tuple[LayerKind, tuple[int, int], bool], ...] = (
            (LayerKind.W8A8S, (4, 8), self.sparse_engine or (self.is_lowbit and not self.is_dynamic)),
            (LayerKind.W4A8_DYNAMIC, (4, 8), self.is_dynamic and grouped and self.w_sym),
            (LayerKind.W4A4_DYNAMIC, (4, 4), self.is_dynamic and self.w_method == "MinMax" and self.w_sym),
            (LayerKind.W8A8_DYNAMIC, (8, 8), self.is_dynamic),
            (LayerKind.W8A8_MIX, (8, 8), self.pdmix),
            (LayerKind.W8A8, (8, 8), True),
            (LayerKind.W8A16, (8, 16), True),
            (LayerKind.W4A16, (4, 16), True),
        )
        return next((kind for kind, bits, holds in conditions if bits == self.bits and holds), None)

    @property
    def in_groups(self) -> bool:
        """Whether weights get a scale per group of columns."""
        return self.is_lowbit and not self.open_outlier and self.kind is not LayerKind.W8A8S

    @model_validator(mode="after")
    def _consistent(self) -> CalibConfig:
        _raise_all(type(self).__name__, self, _conflicts(self))
        return self


_NO_KIND = {
    (4, 8): "4 with a_bit 8 needs is_lowbit or co_sparse (W8A8S), or is_dynamic, is_lowbit and open_outlier: false "
    "together (W4A8_DYNAMIC in groups)",
    (4, 4): "4 with a_bit 4 needs is_dynamic: true, w_method MinMax and w_sym: true",
    (8, 4): "8 with a_bit 4 makes no layer; use a_bit 8, or w_bit 4",
}


def _conflicts(config: CalibConfig) -> Iterator[tuple[str, str]]:
    """Settings that exclude each other: the field to blame, and why."""
    kind = config.kind
    if config.bits[1] != 16 and not config.w_sym:
        yield "w_sym", "an offset of the weights needs a_bit 16; use true"
    elif kind is None:
        yield "w_bit", _NO_KIND[config.bits]
    if config.act_method == 3 and config.is_lowbit:
        yield "act_method", "is_lowbit cannot choose a method for each layer; use 1 or 2"
    if config.pdmix and config.bits != (8, 8):
        yield "pdmix", f"goes with w_bit 8 and a_bit 8 only, not with {config.bits[0]} and {config.bits[1]}; use false"
    if kind is LayerKind.W8A8S and config.w_method != "MinMax":
        yield "w_method", "the sparse engines have a method of their own; use MinMax"
    if config.in_groups and kind in (LayerKind.W8A8, LayerKind.W8A8_MIX):
        yield "open_outlier", f"false asks for weights in groups, which {kind} layers do not have; use true"


def _raise_all(title: str, config: StrictModel, problems: Iterator[tuple[str, str]]) -> None:
    """Report problems that concern several fields at the field to blame."""
    details = [
        InitErrorDetails(type=_wrong(text), loc=(field,), input=getattr(config, field)) for field, text in problems
    ]
    if details:
        raise ValidationError.from_exception_data(title, details)


class AntiParams(StrictModel):
    """``anti_params``."""

    norm_class_name: str | None = Field(default=None, description="Ignored: norms are found without it")


class CalibParams(StrictModel):
    """``calib_params``: which layers fall back, and which get another type."""

    disable_level: Annotated[str, BeforeValidator(_level)] = Field(
        default="L0", description="How many linears fall back to floating point, chosen by sensitivity"
    )
    mix_cfg: dict[Annotated[str, AfterValidator(_pattern)], MixType] | None = Field(
        default=None, description="Name or fnmatch pattern to the type of these linears; the first pattern counts"
    )
    all_tensors: ApiOnly = Field(default=None, exclude=True)

    @property
    def fallback(self) -> int:
        """How many linears ``disable_level`` asks to fall back."""
        return int(self.disable_level[1:])


class SaveParams(StrictModel):
    """``calib_save_params``."""

    part_file_size: int | None = Field(default=None, ge=1, description="Size limit of a file in GB; none: one file")
    safetensors_name: str | None = Field(default=None, description="Ignored: the format names the files")


def _mapping(model: type[StrictModel]) -> Callable[[Any], Any]:
    return lambda value: model() if value is None else value


class SpecV0(StrictModel):
    """``spec`` of ``modelslim_v0``."""

    anti_cfg: AntiConfig | None = Field(default=None, description="Outlier suppression; left out: none")
    anti_params: Annotated[AntiParams, BeforeValidator(_mapping(AntiParams))] = AntiParams()
    calib_cfg: Annotated[CalibConfig, BeforeValidator(_mapping(CalibConfig))] = CalibConfig()
    calib_params: Annotated[CalibParams, BeforeValidator(_mapping(CalibParams))] = CalibParams()
    calib_save_params: Annotated[SaveParams, BeforeValidator(_mapping(SaveParams))] = SaveParams()
    batch_size: int = Field(default=4, ge=1, description="Ignored: samples of one length share a forward")
    anti_dataset: str | None = Field(default=None, min_length=1, description="Data of the outlier suppression")
    calib_dataset: str | None = Field(
        default=DEFAULT_DATASET, min_length=1, description="Calibration set; null: quantize without data"
    )
