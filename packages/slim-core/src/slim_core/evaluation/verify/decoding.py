"""What the stored bytes of a quantized weight stand for, written down anew from the description of the format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slim_core.evaluation.verify.findings import Layer
from slim_core.quantization.kinds import LayerKind

__all__ = ["NO_CODE", "Decoder"]

_BLOCK = 32
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FOUR_BIT_FLOATS = (LayerKind.W4A8_MXFP, LayerKind.W4A4_MXFP4, LayerKind.W4A4_MXFP4_DUALSCALE)

Element = Literal["integer", "e4m3", "e2m1", "float"]
Packing = Literal["no", "rows", "columns", "values"]
NO_CODE = 16
"""What stands for a number that is none of the sixteen of four bits."""


@dataclass(frozen=True)
class Decoder:
    """Codes and values of a weight, block by block.

    Args:
        element: what a code is: an integer, a number of eight or four bits, or the weight itself.
        packing: which neighbours share a byte: the first in its low half. ``values``: none do, and a byte is not the
            code of a four-bit number but that number as E4M3.
        scale: float32 ``(out, groups)``: the weight that an element of 1 stands for.
        offset: float32 ``(out, groups)``, subtracted from integers.
        group: columns that share a scale.
    """

    element: Element
    packing: Packing
    scale: Tensor
    offset: Tensor
    group: int

    @classmethod
    def of(cls, layer: Layer, part: Mapping[str, Tensor]) -> Decoder:
        """The decoder of a layer.

        Args:
            part: all of its tensors but the weight, by suffix; ``deq_scale`` as float32.
        """
        scale = _scale(layer, part).float()
        # The second level of a two-level scale has the offset that counts; the first has as many rows of zeros.
        offset = part.get("weight_offset_second", part.get("weight_offset"))
        shifted = offset.float() if offset is not None else torch.zeros_like(scale)
        size = -(-layer.width // scale.shape[1]) if layer.form.group_size else layer.width
        blocks = layer.kind.is_microscaling
        return cls(_element(layer.kind), _packing(layer), scale, shifted, _BLOCK if blocks else max(size, 1))

    @property
    def rows_per_byte(self) -> int:
        return 2 if self.packing == "rows" else 1

    def codes(self, stored: Tensor) -> Tensor:
        """One code per weight ``(rows, in)``: int8, uint8 codes 0..15, or float."""
        if self.packing == "no":
            return stored
        if self.packing == "values":
            return _e2m1_codes(stored.float())
        low, high = _halves(stored)
        if self.packing == "rows":
            return torch.stack([low, high], 1).flatten(0, 1)
        return torch.stack([low, high], 2).flatten(1)

    def values(self, codes: Tensor, rows: slice) -> Tensor:
        """The weights of these output rows, a new float32 tensor."""
        if self.element == "float":
            return codes.to(torch.float32, copy=True)
        scale, offset = self._wide(self.scale[rows], codes), self._wide(self.offset[rows], codes)
        if self.element == "integer":
            return codes.to(torch.float32, copy=True).sub_(offset).mul_(scale)
        elements = codes.float() if self.element == "e4m3" else _e2m1(codes)
        return elements * scale

    def room(self, exact: Tensor, rows: slice) -> Tensor:
        """How far rounding may take float32 weights ``(rows, in)``; ``(rows, in)``, or ``(rows, 1)`` if it is the same
        for a row.

        Half a step, a whole one where an offset was rounded too. Microscaling formats may also cut off: the largest
        element of a block is up to 512 (E4M3) or 7 (E2M1) before it saturates at 448 or 6.
        """
        slack = exact.abs().amax(1, keepdim=True) * 1e-5
        scale = self.scale[rows]
        if self.element == "integer":
            return self._wide(scale * (0.5 + 0.5 * (self.offset[rows] != 0)), exact) + slack
        unit = self._wide(scale, exact)
        size = exact.abs() / unit
        if self.element == "e4m3":
            steps = torch.maximum(size / 16, torch.full_like(size, 2.0**-10))
            steps = torch.where(size <= 512, torch.maximum(steps, size - 448), steps)
        else:
            steps = torch.where(size <= 2, 0.25, torch.where(size <= 4, 0.5, 1.0))
        return steps * unit + slack

    def _wide(self, groups: Tensor, like: Tensor) -> Tensor:
        """One number per column, from one per group; those of a whole row stay one column."""
        if groups.shape[1] == 1:
            return groups
        return groups.repeat_interleave(self.group, 1)[:, : like.shape[1]]


def _element(kind: LayerKind) -> Element:
    if kind is LayerKind.W16A16S:
        return "float"
    if kind in _FOUR_BIT_FLOATS:
        return "e2m1"
    return "e4m3" if kind in (LayerKind.WFP8AFP8_DYNAMIC, LayerKind.W8A8_MXFP8) else "integer"


def _packing(layer: Layer) -> Packing:
    kind = layer.kind
    if kind is LayerKind.W4A8_DYNAMIC or (kind is LayerKind.W4A16 and layer.form.group_size):
        return "rows"
    if kind in _FOUR_BIT_FLOATS:
        return "columns" if layer.packed else "values"
    return "columns" if kind is LayerKind.W4A16 else "no"


def _scale(layer: Layer, part: Mapping[str, Tensor]) -> Tensor:
    match layer.kind:
        case LayerKind.W16A16S:
            return torch.ones(layer.out, 1)
        case LayerKind.W8A8 | LayerKind.W8A8S:
            return (part["deq_scale"].double() / part["input_scale"].double()).unsqueeze(1)
        case LayerKind.W4A8_DYNAMIC if "weight_scale_second" in part:
            return part["weight_scale"] * part["weight_scale_second"]
        case kind if kind.is_microscaling:
            exponent = part["weight_scale"].to(torch.int32) - 127
            power = torch.ldexp(torch.ones(exponent.shape), exponent)
            outer = part.get("weight_dual_scale")
            if outer is None:
                return power
            size = layer.form.outer_block // _BLOCK
            return power * outer.squeeze(2).repeat_interleave(size, 1)[:, : power.shape[1]]
        case _:
            return part["weight_scale"]


def _halves(stored: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high half of every byte: two's complement in int8, plain in uint8."""
    if stored.dtype == torch.uint8:
        return stored & 0x0F, stored >> 4
    return (stored << 4) >> 4, stored >> 4


def _e2m1_codes(values: Tensor) -> Tensor:
    """uint8 codes of four-bit numbers; :data:`NO_CODE` of all others."""
    table = torch.tensor(_E2M1)
    size = torch.searchsorted(table, values.abs()).clamp(max=len(_E2M1) - 1)
    codes = size + 8 * values.signbit()
    return torch.where(table[size] == values.abs(), codes, NO_CODE).to(torch.uint8)


def _e2m1(codes: Tensor) -> Tensor:
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1), torch.nan])
    return table[codes.long()]
