"""Quantization types: ``w`` weight bits ``a`` activation bits, then ``c8``, ``f8`` or ``f4``, then ``s`` for sparse."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slim_core.errors import SchemaValidateError
from slim_core.recipe.wording import nearest_name, one_of

__all__ = ["DEFAULT_QUANT_TYPE", "QUANT_TYPES", "QuantType", "parse_quant_type"]

DEFAULT_QUANT_TYPE = "w8a8"
QUANT_TYPES = (
    *("w4a4", "w4a4c8", "w4a4f4", "w4a4f8", "w4a8", "w4a8c8"),
    *("w8a16", "w8a8", "w8a8s", "w8a8c8", "w8a8f8", "w16a16s"),
)
"""The closed list of the protocol."""

_GRAMMAR = re.compile(r"w(?P<w>\d+)a(?P<a>4|8|16)(?:(?P<cache>c8)|f(?P<fa>[48]))?(?P<sparse>s)?")


@dataclass(frozen=True)
class QuantType:
    """One quantization type, taken apart."""

    name: str
    w_bit: int
    a_bit: int
    kv_cache: bool = False
    fa_bit: int | None = None
    is_sparse: bool = False

    def fits(self, label: Mapping[str, Any]) -> bool:
        """Whether a practice's label says exactly this. Absent bits never fit; absent flags mean false."""
        fa_bit = label.get("fa_bit")
        if fa_bit is None and label.get("fa_quant"):
            fa_bit = 8
        return (
            (label.get("w_bit"), label.get("a_bit")) == (self.w_bit, self.a_bit)
            and bool(label.get("is_sparse")) == self.is_sparse
            and bool(label.get("kv_cache")) == self.kv_cache
            and fa_bit == self.fa_bit
        )


def parse_quant_type(text: str) -> QuantType:
    """Take a quantization type apart.

    Raises:
        SchemaValidateError: it is none of :data:`QUANT_TYPES`; names the nearest.
    """
    match = _GRAMMAR.fullmatch(text)
    if text not in QUANT_TYPES or match is None:
        near = nearest_name(text, QUANT_TYPES)
        raise SchemaValidateError(
            f"got {text[:200]!r}; allowed: {one_of(QUANT_TYPES)}",
            where="quant_type",
            remedy=f"did you mean {near!r}?" if near else None,
        )
    return QuantType(
        name=text,
        w_bit=int(match["w"]),
        a_bit=int(match["a"]),
        kv_cache=bool(match["cache"]),
        fa_bit=int(match["fa"]) if match["fa"] else None,
        is_sparse=bool(match["sparse"]),
    )
