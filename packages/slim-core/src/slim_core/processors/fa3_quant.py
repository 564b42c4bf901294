"""``fa3_quant``: query, key and value in eight or four bits for the attention kernel (FAQuant)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from slim_core.processors.attention import finish_attentions
from slim_core.processors.base import AttentionRule, Processor, UnitWork
from slim_core.quantization.attention import AttentionForm, AttentionKind, StateForm
from slim_core.recipe import (
    DType,
    Exclude,
    Include,
    NameFilter,
    Number,
    Phase,
    ProcessorConfig,
    QConfig,
    Scope,
    StrictModel,
)
from slim_core.recipe.qconfig import Ext

__all__ = ["Fa3Quant", "Fa3QuantConfig", "StateConfig"]

_SCHEMES = {
    ("int8", "per_head"),
    ("fp8_e4m3", "per_head"),
    ("int8", "per_token"),
    ("fp8_e4m3", "per_token"),
    ("mxfp4", "per_block"),
    ("mxfp8", "per_block"),
}
QUERY_KEY_RATIO, VALUE_RATIO = 0.9999, 1.0
"""Query and key have single values far outside, which the softmax forgives; those of the value go into the output."""


class StateExt(Ext, total=False):
    """Settings of the methods, and the one of static attention."""

    ratio: Annotated[Number, Field(ge=0.99, le=1, description="per_head: share of a head's values that is not clipped")]


def _scope(data: dict[str, Any]) -> Scope:
    return "per_block" if data.get("dtype") in ("mxfp4", "mxfp8") else "per_head"


class StateConfig(QConfig):
    """How one of query, key and value is quantized; omitted fields mean int8 with one static scale per head."""

    methods: ClassVar[Mapping[str, frozenset[str]]] = {"minmax": frozenset({"ratio"}), "none": frozenset({"ratio"})}

    dtype: DType = Field(default="int8", description="Number format: int8, fp8_e4m3, mxfp8 or mxfp4. Default: int8")
    scope: Scope = Field(
        default_factory=_scope,
        description="per_head: static; per_token: at run time; per_block: mxfp8 and mxfp4. Default: per_head",
    )
    symmetric: bool = Field(default=True, description="Zero maps to zero: always true")
    method: str = Field(default="minmax", description="How the scale is found: minmax")
    ext: StateExt = Field(default_factory=StateExt, description="Settings: ratio")  # pyright: ignore

    @model_validator(mode="after")
    def _legal(self) -> StateConfig:
        text = ""
        if (self.dtype, self.scope) not in _SCHEMES:
            known = ", ".join(f"{dtype} {scope}" for dtype, scope in sorted(_SCHEMES))
            text = f"attention is not quantized to {self.dtype} {self.scope}; use one of {known}"
        elif not self.symmetric:
            text = "attention is quantized without offset; use symmetric: true"
        if text:
            raise PydanticCustomError("illegal_state", "{text}", {"text": text})
        return self

    def warnings(self) -> list[str]:
        found = super().warnings()
        if "ratio" in self.ext and self.scope != "per_head":
            found.append(f"ext.ratio has no effect with scope {self.scope}")
        return found

    def form(self, ratio: float) -> StateForm:
        """What it makes of a state; ``ratio`` counts if ``ext`` has none."""
        share = float(self.ext.get("ratio", ratio)) if self.scope == "per_head" else 1.0
        return StateForm(self.dtype, self.scope, self.symmetric, share)


class Fa3Details(StrictModel):
    """Query, key and value, each with its own configuration; what is left out stays in floating point."""

    fa_q: StateConfig | None = Field(default=None, description="How the query is quantized. Default: not at all")
    fa_k: StateConfig | None = Field(default=None, description="How the key is quantized. Default: not at all")
    fa_v: StateConfig | None = Field(default=None, description="How the value is quantized. Default: not at all")

    @model_validator(mode="after")
    def _something(self) -> Fa3Details:
        if self.fa_q is None and self.fa_k is None and self.fa_v is None:
            raise PydanticCustomError("nothing_quantized", "give at least one of fa_q, fa_k and fa_v")
        return self


class Fa3QuantConfig(ProcessorConfig):
    """Quantize query, key and value of the attentions that ``include`` names and ``exclude`` does not."""

    phase = Phase.QUANTIZATION

    type: Literal["fa3_quant"] = "fa3_quant"
    qconfig: StateConfig | None = Field(
        default=None, description="How all three are quantized. Default: int8 per_head symmetric minmax"
    )
    details: Fa3Details | None = Field(default=None, description="In place of qconfig: query, key and value apart")
    include: Include = Field(default=("*",), description="Patterns of attention modules to quantize; empty means all")
    exclude: Exclude = Field(default=(), description="Patterns of attention modules to leave alone; wins over include")

    @model_validator(mode="after")
    def _one_of_both(self) -> Fa3QuantConfig:
        if self.qconfig is not None and self.details is not None:
            raise PydanticCustomError("both_given", "qconfig and details exclude each other; give one of them")
        return self


class Fa3Quant(Processor):
    """Static scales from the range of each head over all samples; dynamic formats need no data."""

    Config = Fa3QuantConfig
    config: Fa3QuantConfig

    def attention_rules(self) -> list[AttentionRule]:
        details = self.config.details
        every = self.config.qconfig or StateConfig()
        q, k, v = (every,) * 3 if details is None else (details.fa_q, details.fa_k, details.fa_v)
        form = AttentionForm(
            AttentionKind.FAQUANT,
            q and q.form(QUERY_KEY_RATIO),
            k and k.form(QUERY_KEY_RATIO),
            v and v.form(VALUE_RATIO),
        )
        return [AttentionRule(self.position, NameFilter(self.config.include, self.config.exclude), form)]

    def schemes(self) -> Mapping[str, StrictModel]:
        return {self.position: self.config.details or self.config.qconfig or StateConfig()}

    def notes(self) -> list[str]:
        return [f"{self.position}: {text}" for text in self.config.warnings()]

    def process(self, work: UnitWork) -> None:
        finish_attentions(work, self.position)
