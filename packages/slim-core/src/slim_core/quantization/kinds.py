"""The legality table: which activation scheme goes with which weight scheme, and what layer the pair makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from slim_core.errors import UnsupportedError
from slim_core.recipe.qconfig import LinearQConfig, QConfig

__all__ = ["LAYER_METHODS", "LayerForm", "LayerKind", "LayerMethods", "Scheme", "layer_form"]


class LayerKind(StrEnum):
    """What a layer is after quantization; the value is its name in the ascendv1 format."""

    FLOAT = "FLOAT"
    W16A16S = "W16A16S"
    W8A16 = "W8A16"
    W4A16 = "W4A16"
    W8A8_DYNAMIC = "W8A8_DYNAMIC"
    W8A8_MIX = "W8A8_MIX"
    W8A8 = "W8A8"
    W8A8S = "W8A8S"
    W4A8_DYNAMIC = "W4A8_DYNAMIC"
    WFP8AFP8_DYNAMIC = "WFP8AFP8_DYNAMIC"
    W8A8_MXFP8 = "W8A8_MXFP8"
    W4A8_MXFP = "W4A8_MXFP"
    W4A4_DYNAMIC = "W4A4_DYNAMIC"
    W4A4_MXFP4 = "W4A4_MXFP4"
    W4A4_MXFP4_DUALSCALE = "W4A4_MXFP4_DUALSCALE"

    @property
    def has_static_input(self) -> bool:
        """Whether the layer holds a scale for its input that calibration must find."""
        return self in (LayerKind.W8A8, LayerKind.W8A8_MIX, LayerKind.W8A8S)

    @property
    def weight_bits(self) -> int:
        """Width of the weight's codes; 16 where it stays in floating point."""
        return 16 if self in (LayerKind.FLOAT, LayerKind.W16A16S) else 4 if self.startswith("W4") else 8

    @property
    def is_microscaling(self) -> bool:
        """Whether blocks of 32 weights share an exponent."""
        return "_MXFP" in self


@dataclass(frozen=True)
class LayerForm:
    """A kind of layer and what else decides the shapes of its parameters.

    Args:
        group_size: input columns that share a weight scale; 0: all of them.
        symmetric: whether the weight has no offset.
        outer_block: input columns that share the outer scale of a dual-scale weight; 0 for all other kinds.
    """

    kind: LayerKind
    group_size: int = 0
    symmetric: bool = True
    outer_block: int = 0

    @property
    def dynamic(self) -> LayerForm | None:
        """The same with input scales that are found at run time; None if there is no such layer."""
        if not self.kind.has_static_input:
            return self
        same = self.kind in (LayerKind.W8A8, LayerKind.W8A8_MIX)  # their weights are those of W8A8_DYNAMIC
        return replace(self, kind=LayerKind.W8A8_DYNAMIC) if same else None

    def for_width(self, width: int) -> LayerForm:
        """The form of a linear with this many input features: one group of all columns is no group."""
        return replace(self, group_size=0) if self.group_size == width else self

    def __str__(self) -> str:
        grouped = f" in groups of {self.group_size}" if self.group_size else ""
        return f"{self.kind}{grouped}{'' if self.symmetric else ', asymmetric'}"


@dataclass(frozen=True)
class Scheme:
    """Dtype, scope and symmetry of one side of a linear."""

    dtype: str
    scope: str
    symmetric: bool

    @classmethod
    def of(cls, config: QConfig | None) -> Scheme:
        """The scheme of a recipe block; None is the float activation of weight-only layers."""
        if config is None or config.dtype == "float":
            return FLOAT
        return cls(config.dtype, config.scope, config.symmetric)

    def __str__(self) -> str:
        if self.dtype == "float":
            return "float"
        return f"{self.dtype} {self.scope} {'symmetric' if self.symmetric else 'asymmetric'}"


FLOAT = Scheme("float", "per_tensor", True)
_STATIC, _STATIC_SYMMETRIC = Scheme("int8", "per_tensor", False), Scheme("int8", "per_tensor", True)
_MIXED = Scheme("int8", "pd_mix", False)
_TOKEN_8, _TOKEN_4 = Scheme("int8", "per_token", True), Scheme("int4", "per_token", True)
_INT8, _INT4 = Scheme("int8", "per_channel", True), Scheme("int4", "per_channel", True)
_INT8_SHIFTED, _INT4_SHIFTED = Scheme("int8", "per_channel", False), Scheme("int4", "per_channel", False)
_INT8_GROUPS, _INT4_GROUPS = Scheme("int8", "per_group", True), Scheme("int4", "per_group", True)
_INT8_GROUPS_SHIFTED, _INT4_GROUPS_SHIFTED = Scheme("int8", "per_group", False), Scheme("int4", "per_group", False)
_MXFP8, _MXFP4 = Scheme("mxfp8", "per_block", True), Scheme("mxfp4", "per_block", True)
_DUAL = Scheme("mxfp4", "dual_scale", True)

_TABLE: dict[tuple[Scheme, Scheme], LayerKind] = {
    (_STATIC, _INT8): LayerKind.W8A8,
    (_STATIC_SYMMETRIC, _INT8): LayerKind.W8A8,
    (_MIXED, _INT8): LayerKind.W8A8_MIX,
    (_TOKEN_8, _INT8): LayerKind.W8A8_DYNAMIC,
    (_TOKEN_8, _INT8_GROUPS): LayerKind.W8A8_DYNAMIC,
    (_TOKEN_8, _INT4): LayerKind.W4A8_DYNAMIC,
    (_TOKEN_8, _INT4_GROUPS): LayerKind.W4A8_DYNAMIC,
    (_TOKEN_4, _INT4): LayerKind.W4A4_DYNAMIC,
    (_TOKEN_4, _INT4_SHIFTED): LayerKind.W4A4_DYNAMIC,
    (_TOKEN_4, _INT4_GROUPS): LayerKind.W4A4_DYNAMIC,
    (_TOKEN_4, _INT4_GROUPS_SHIFTED): LayerKind.W4A4_DYNAMIC,
    (FLOAT, _INT8): LayerKind.W8A16,
    (FLOAT, _INT8_SHIFTED): LayerKind.W8A16,
    (FLOAT, _INT8_GROUPS): LayerKind.W8A16,
    (FLOAT, _INT8_GROUPS_SHIFTED): LayerKind.W8A16,
    (FLOAT, _INT4): LayerKind.W4A16,
    (FLOAT, _INT4_SHIFTED): LayerKind.W4A16,
    (FLOAT, _INT4_GROUPS): LayerKind.W4A16,
    (FLOAT, _INT4_GROUPS_SHIFTED): LayerKind.W4A16,
    (Scheme("fp8_e4m3", "per_token", True), Scheme("fp8_e4m3", "per_channel", True)): LayerKind.WFP8AFP8_DYNAMIC,
    (_MXFP8, _MXFP8): LayerKind.W8A8_MXFP8,
    (_MXFP8, _MXFP4): LayerKind.W4A8_MXFP,
    (_MXFP4, _MXFP4): LayerKind.W4A4_MXFP4,
    (_DUAL, _DUAL): LayerKind.W4A4_MXFP4_DUALSCALE,
}

_Methods = Mapping[Scheme, tuple[str, ...]]


@dataclass(frozen=True)
class LayerMethods:
    """The methods that a processor has for every activation and every weight scheme; the first is the obvious one."""

    act: _Methods
    weight: _Methods


LAYER_METHODS = LayerMethods(
    act={
        FLOAT: ("none",),
        _STATIC: ("minmax", "histogram"),
        _STATIC_SYMMETRIC: ("minmax", "histogram"),
        _MIXED: ("minmax", "histogram"),
        _DUAL: ("dualscale",),
    },
    weight={
        _INT8: ("minmax", "ssz", "gptq", "sparse"),
        _INT4: ("minmax", "ssz", "gptq"),
        _INT8_SHIFTED: ("minmax", "gptq"),
        _INT4_SHIFTED: ("minmax", "gptq"),
        _INT8_GROUPS: ("minmax", "ssz", "gptq"),
        _INT4_GROUPS: ("minmax", "ssz", "gptq"),
        _INT8_GROUPS_SHIFTED: ("minmax", "gptq"),
        _INT4_GROUPS_SHIFTED: ("minmax", "gptq"),
        _MXFP8: ("minmax", "mse_round"),
        _MXFP4: ("minmax", "ceil_x", "fouroversix"),
        _DUAL: ("dualscale",),
    },
)
"""What ``linear_quant`` can do; a scheme that is missing has ``minmax``."""


def layer_form(config: LinearQConfig, methods: LayerMethods = LAYER_METHODS) -> LayerForm:
    """The form of the layer that a ``qconfig`` block makes.

    Args:
        methods: the methods that the processor has.

    Raises:
        UnsupportedError: no layer takes this pair, or a method or a group size does not go with it; names the nearest
            legal choice.
    """
    act, weight = Scheme.of(config.act), Scheme.of(config.weight)
    kind = _TABLE.get((act, weight))
    if kind is None:
        raise _no_such_pair(act, weight)
    for side, block, known in (("act", config.act, methods.act), ("weight", config.weight, methods.weight)):
        allowed = known.get(Scheme.of(block), ("minmax",))
        if block is not None and block.method not in allowed:
            raise UnsupportedError(
                f"method {block.method!r} is not available for {Scheme.of(block)} {side}",
                where=f"qconfig.{side}.method",
                remedy=f"use {' or '.join(map(repr, allowed))}",
            )
    if config.weight.method == "sparse":
        if kind is not LayerKind.W8A8:
            raise UnsupportedError(
                f"method 'sparse' makes W8A8S layers, whose activations are int8 per_tensor, not {act}",
                where="qconfig.weight.method",
                remedy="use act int8 per_tensor, or another weight method",
            )
        kind = LayerKind.W8A8S
    usual = 128 if config.weight.method == "gptq" else None
    group_size = _size(config.weight, "group_size", usual) if weight.scope == "per_group" else 0
    outer_block = _size(config.weight, "dual_block_size") if weight.scope == "dual_scale" else 0
    if outer_block % 32:
        raise UnsupportedError(
            f"ext.dual_block_size is {outer_block}, which 32 does not divide",
            where="qconfig.weight.ext.dual_block_size",
            remedy="use a multiple of 32, e.g. 512",
        )
    _check_blocks(config, outer_block)
    return LayerForm(kind, group_size, weight.symmetric, outer_block)


def _check_blocks(config: LinearQConfig, outer_block: int) -> None:
    """Refuse blocks that do not run along the input features, or that differ between activation and weight."""
    for side, block, last in (("act", config.act, (-1,)), ("weight", config.weight, (-1, 1))):
        axes = block.ext.get("axes", -1) if block is not None and block.scope in ("per_block", "dual_scale") else -1
        if axes not in (*last, *([axis] for axis in last)):
            raise UnsupportedError(
                f"ext.axes is {axes}, but the blocks of a linear run along its input features",
                where=f"qconfig.{side}.ext.axes",
                remedy="use -1, or leave it out",
            )
    size = config.act.ext.get("dual_block_size", outer_block) if config.act is not None else outer_block
    if outer_block and size != outer_block:
        raise UnsupportedError(
            f"ext.dual_block_size is {size} for the activation and {outer_block} for the weight",
            where="qconfig.act.ext.dual_block_size",
            remedy="use one size for both",
        )


def _size(config: QConfig, key: str, default: int | None = None) -> int:
    """The size in ``ext`` that the scope of a weight asks for."""
    value = config.ext.get(key, default)
    if not isinstance(value, int):
        raise UnsupportedError(
            f"scope {config.scope} needs ext.{key}",
            where=f"qconfig.weight.ext.{key}",
            remedy=f"add ext: {{{key}: 128}}",
        )
    return value


def _no_such_pair(act: Scheme, weight: Scheme) -> UnsupportedError:
    near = max(_TABLE, key=lambda pair: 2 * _likeness(pair[0], act) + 3 * _likeness(pair[1], weight))
    return UnsupportedError(
        f"no layer has activations {act} with weights {weight}",
        where="qconfig",
        remedy=f"the nearest legal pair is act {near[0]}, weight {near[1]} ({_TABLE[near]})",
    )


def _likeness(one: Scheme, other: Scheme) -> int:
    return 4 * (one.dtype == other.dtype) + 2 * (one.scope == other.scope) + (one.symmetric == other.symmetric)
