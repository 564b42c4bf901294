"""The legality table: which activation scheme goes with which weight scheme, and what layer the pair makes."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum

from slim_core.errors import UnsupportedError
from slim_core.recipe.qconfig import LinearQConfig, QConfig

__all__ = ["LayerKind", "Scheme", "layer_kind"]


class LayerKind(StrEnum):
    """What a layer is after quantization; the value is its name in the ascendv1 format."""

    FLOAT = "FLOAT"
    W8A8 = "W8A8"
    W8A8_DYNAMIC = "W8A8_DYNAMIC"
    W8A16 = "W8A16"

    @property
    def needs_data(self) -> bool:
        """Whether activations must be observed."""
        return self is LayerKind.W8A8


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
_WEIGHT_8 = Scheme("int8", "per_channel", True)

_TABLE: dict[tuple[Scheme, Scheme], LayerKind] = {
    (Scheme("int8", "per_tensor", False), _WEIGHT_8): LayerKind.W8A8,
    (Scheme("int8", "per_tensor", True), _WEIGHT_8): LayerKind.W8A8,
    (Scheme("int8", "per_token", True), _WEIGHT_8): LayerKind.W8A8_DYNAMIC,
    (FLOAT, _WEIGHT_8): LayerKind.W8A16,
    (FLOAT, Scheme("int8", "per_channel", False)): LayerKind.W8A16,
}
_METHODS = {"act": ("minmax",), "weight": ("minmax",)}


def layer_kind(config: LinearQConfig) -> LayerKind:
    """The kind of layer that a ``qconfig`` block makes.

    Raises:
        UnsupportedError: no layer takes this pair, or a method is not available for it; names the nearest legal one.
    """
    act, weight = Scheme.of(config.act), Scheme.of(config.weight)
    for side, block in (("act", config.act), ("weight", config.weight)):
        allowed = ("none",) if block is not None and block.dtype == "float" else _METHODS[side]
        if block is not None and block.method not in allowed:
            raise UnsupportedError(
                f"method {block.method!r} is not available for {Scheme.of(block)} {side}",
                where=f"qconfig.{side}.method",
                remedy=f"use {' or '.join(map(repr, allowed))}",
            )
    if kind := _TABLE.get((act, weight)):
        return kind
    pairs = {f"act {a}, weight {w}": kind for (a, w), kind in _TABLE.items()}
    near = get_close_matches(f"act {act}, weight {weight}", list(pairs), n=1, cutoff=0.0)[0]
    raise UnsupportedError(
        f"no layer has activations {act} with weights {weight}",
        where="qconfig",
        remedy=f"the nearest legal pair is {near} ({pairs[near]})",
    )
