"""``dynamic_cache``: an int8 cache of keys and values (C8)."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from slim_core.processors.attention import finish_attentions
from slim_core.processors.base import AttentionRule, Processor, UnitWork
from slim_core.quantization.attention import AttentionForm, AttentionKind, StateForm
from slim_core.recipe import DType, Exclude, Include, NameFilter, Phase, ProcessorConfig, QConfig, Scope, StrictModel

__all__ = ["CacheConfig", "DynamicCache", "DynamicCacheConfig"]

DEFAULT_PERCENTILE = 99.99
LOWEST_PERCENTILE = 99
ENGINE = "vllm-ascend"


class CacheConfig(QConfig):
    """How keys or values are cached; omitted fields mean symmetric int8 per channel over the whole range."""

    methods: ClassVar[Mapping[str, frozenset[str]]] = {
        "minmax": frozenset(),
        "histogram": frozenset({"percentile"}),
    }

    dtype: DType = Field(default="int8", description="Number format: int8")
    scope: Scope = Field(default="per_channel", description="per_channel: one static scale per channel of every head")
    symmetric: bool = Field(default=True, description="Zero maps to zero: no offset. Default: true")
    method: str = Field(
        default="minmax",
        description="minmax: the whole range; histogram: ext.percentile of the values of each channel. Default: minmax",
    )

    @model_validator(mode="after")
    def _legal(self) -> CacheConfig:
        if (self.dtype, self.scope) != ("int8", "per_channel"):
            text = f"the cache is int8 per_channel, not {self.dtype} {self.scope}; engines read no other scales for it"
            raise PydanticCustomError("illegal_cache", "{text}", {"text": text})
        if self.ext.get("percentile", 100) < LOWEST_PERCENTILE:
            text = f"ext.percentile must be at least {LOWEST_PERCENTILE} here; what is clipped is kept in memory"
            raise PydanticCustomError("low_percentile", "{text}", {"text": text})
        return self

    def form(self) -> StateForm:
        """What it makes of keys or values."""
        percentile = self.ext.get("percentile", DEFAULT_PERCENTILE) if self.method == "histogram" else 100.0
        return StateForm(self.dtype, self.scope, self.symmetric, float(Fraction(str(percentile)) / 100))


class CacheDetails(StrictModel):
    """Keys and values, each with its own configuration."""

    key: CacheConfig = Field(default=CacheConfig(), description="How keys are cached. Default: int8 symmetric minmax")
    value: CacheConfig = Field(
        default=CacheConfig(), description="How values are cached. Default: int8 symmetric minmax"
    )


class DynamicCacheConfig(ProcessorConfig):
    """Find the scales of an int8 KV cache for the attentions that ``include`` names and ``exclude`` does not."""

    phase = Phase.QUANTIZATION

    type: Literal["dynamic_cache"] = "dynamic_cache"
    qconfig: CacheConfig | None = Field(
        default=None, description="How keys and values are cached. Default: int8 per_channel symmetric minmax"
    )
    details: CacheDetails | None = Field(default=None, description="In place of qconfig: keys and values apart")
    include: Include = Field(default=(), description="Patterns of attention modules to quantize; empty means all")
    exclude: Exclude = Field(default=(), description="Patterns of attention modules to leave alone; wins over include")

    @model_validator(mode="after")
    def _one_of_both(self) -> DynamicCacheConfig:
        if self.qconfig is not None and self.details is not None:
            raise PydanticCustomError("both_given", "qconfig and details exclude each other; give one of them")
        return self


class DynamicCache(Processor):
    """Ranges of keys and values as they enter the cache, after rotary embedding, over all samples."""

    Config = DynamicCacheConfig
    config: DynamicCacheConfig

    def attention_rules(self) -> list[AttentionRule]:
        details = self.config.details
        both = self.config.qconfig or CacheConfig()
        key, value = (both, both) if details is None else (details.key, details.value)
        form = AttentionForm(AttentionKind.C8, None, key.form(), value.form())
        return [AttentionRule(self.position, NameFilter(self.config.include, self.config.exclude), form)]

    def schemes(self) -> Mapping[str, StrictModel]:
        return {self.position: self.config.details or self.config.qconfig or CacheConfig()}

    def notes(self) -> list[str]:
        found = [f"{self.position}: {text}" for text in self.config.warnings()]
        (rule,) = self.attention_rules()
        if not all(form.symmetric for _, form in rule.form.states()):
            found.append(f"{self.position}: an asymmetric cache has offsets, which paged decode of {ENGINE} ignores")
        return found

    def process(self, work: UnitWork) -> None:
        finish_attentions(work, self.position)
