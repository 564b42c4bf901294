"""Reading a quantized folder back, whatever its format: which layers are quantized, and the layers themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from slim_core.checkpoint.reader import Checkpoint
from slim_core.errors import InvalidModelError, UnsupportedError, VerificationError
from slim_core.model.attention import AttentionInfo
from slim_core.model.inputs import mul_scale_of
from slim_core.quantization.attention import QuantizedAttention
from slim_core.quantization.kinds import LayerKind
from slim_core.quantization.layers import (
    DynamicInt,
    Fp8Dynamic,
    MixedInt8,
    MxDynamic,
    QuantizedLinear,
    ScaledInput,
    SparseFloat,
    StaticInt8,
    WeightOnlyInt,
)
from slim_core.savers.ascendv1 import FP8_ENGINE_LABEL
from slim_core.savers.ascendv1_attention import read_attention, stored_attentions
from slim_core.savers.base import INNER
from slim_core.savers.mindie_layout import codes_of_values
from slim_core.savers.packing import unpack_columns, unpack_rows

__all__ = ["QuantizedFolder", "decode_deq_scale"]

_FLOATING = frozenset(str(kind) for kind in LayerKind if "FP" in kind)


class QuantizedFolder:
    """A folder that ``slim quant`` (or the reference tool) wrote. Each format has a class of its own, which says how
    its files are named.

    Args:
        folder: holds the weights.
        description: the file that names the type of every tensor.
        index: the index of the weight files; None if they have none.

    Raises:
        InvalidModelError: the description or the weights are missing or malformed.
    """

    format: ClassVar[str]
    global_keys: ClassVar[frozenset[str]]
    """The keys of the description that name neither a tensor nor an attention."""

    def __init__(self, folder: Path, description: Path, index: str | None) -> None:
        self.folder = folder
        try:
            content = json.loads(description.read_text("utf-8"))
        except FileNotFoundError:
            raise InvalidModelError(
                f"there is no {description.name}", where=str(folder), remedy="point to a folder that slim quant wrote"
            ) from None
        except (OSError, ValueError) as error:
            raise InvalidModelError(f"cannot be read as JSON: {error}", where=str(description)) from error
        if not isinstance(content, dict):
            raise InvalidModelError("is not a JSON object", where=str(description))
        self.description: dict[str, Any] = content
        self.source = Checkpoint(folder, index)

    @property
    def types(self) -> dict[str, str]:
        """The type of every tensor that the description names."""
        return {key: str(value) for key, value in self.description.items() if self._is_tensor(key)}

    def _is_tensor(self, key: str) -> bool:
        return key not in self.global_keys and not key.endswith(".quant_type")

    def layers(self) -> Iterator[tuple[str, str]]:
        """Module prefix and type of every quantized linear."""
        for name, kind in self.types.items():
            if name.endswith(".weight") and kind != LayerKind.FLOAT:
                prefix = name.removesuffix(".weight")
                outer = prefix.removesuffix(INNER)
                yield outer if mul_scale_of(outer) in self.source else prefix, kind

    def attentions(self) -> set[str]:
        """The checkpoint names of all quantized attentions."""
        return set(stored_attentions(self.description))

    def attention(self, info: AttentionInfo) -> QuantizedAttention | None:
        """The quantized attention of this name, None if it is a float one.

        Raises:
            InvalidModelError: it is described in a way that is not understood.
            VerificationError: one of its tensors is missing or has another size.
        """
        return read_attention(self.description, self.source, info)

    def layer(self, prefix: str) -> QuantizedLinear | None:
        """The quantized linear of this name, None if it is a float one.

        Raises:
            UnsupportedError: its type is not known here.
            VerificationError: one of its tensors is missing.
        """
        if (factor := mul_scale_of(prefix)) in self.source:
            inner = self.layer(prefix + INNER)
            return None if inner is None else ScaledInput(inner, self.source.load(factor))
        kind = str(self.description.get(f"{prefix}.weight", LayerKind.FLOAT))
        if kind == FP8_ENGINE_LABEL:
            kind = LayerKind.WFP8AFP8_DYNAMIC
        bias = self._bias(prefix)
        match kind:
            case LayerKind.FLOAT:
                return None
            case LayerKind.W8A8 | LayerKind.W8A8S:
                return self._static(prefix, bias, LayerKind(kind))
            case LayerKind.W8A8_MIX:
                return MixedInt8(self._static(prefix, bias, LayerKind.W8A8), self._part(prefix, "weight_scale").float())
            case LayerKind.W8A8_DYNAMIC | LayerKind.W4A4_DYNAMIC:
                bits = LayerKind(kind).weight_bits
                scale, offset = self._scales(prefix)
                codes = self._part(prefix, "weight")
                return DynamicInt(codes, scale, offset, bias, weight_bits=bits, act_bits=bits)
            case LayerKind.W4A8_DYNAMIC:
                return self._w4a8(prefix, bias)
            case LayerKind.W8A16:
                return WeightOnlyInt(self._part(prefix, "weight"), *self._scales(prefix), bias)
            case LayerKind.W4A16:
                scale, offset = self._scales(prefix)
                unpack = unpack_rows if scale.shape[1] > 1 else unpack_columns
                return WeightOnlyInt(unpack(self._part(prefix, "weight")), scale, offset, bias, bits=4)
            case LayerKind.W16A16S:
                return SparseFloat(self._part(prefix, "weight"), bias)
            case _ if kind in _FLOATING:
                return self._floating(prefix, bias, LayerKind(kind))
            case _:
                raise UnsupportedError(f"layers of type {kind!r} cannot be read", where=prefix)

    def _static(self, prefix: str, bias: Tensor | None, kind: LayerKind) -> StaticInt8:
        return StaticInt8(
            weight=self._part(prefix, "weight"),
            deq_scale=decode_deq_scale(self._part(prefix, "deq_scale")),
            quant_bias=self._part(prefix, "quant_bias"),
            input_scale=self._part(prefix, "input_scale").float(),
            input_offset=self._part(prefix, "input_offset").float(),
            bias=bias,
            kind=kind,
        )

    def _w4a8(self, prefix: str, bias: Tensor | None) -> DynamicInt:
        codes = unpack_rows(self._part(prefix, "weight"))
        scale, offset = self._scales(prefix)
        second = None
        if f"{prefix}.weight_scale_second" in self.source:
            second, offset = self._scales(prefix, "_second")
        return DynamicInt(codes, scale, offset, bias, second, weight_bits=4)

    def _floating(self, prefix: str, bias: Tensor | None, kind: LayerKind) -> QuantizedLinear:
        weight, scale = self._part(prefix, "weight"), self._part(prefix, "weight_scale")
        if kind is LayerKind.WFP8AFP8_DYNAMIC:
            return Fp8Dynamic(weight, scale.float(), bias)
        elements = weight
        if kind is not LayerKind.W8A8_MXFP8:
            packed = weight.dtype == torch.uint8
            elements = unpack_columns(weight) if packed else codes_of_values(weight, f"{prefix}.weight")
        if kind is not LayerKind.W4A4_MXFP4_DUALSCALE:
            return MxDynamic(kind, elements, scale, bias)
        outer = self._part(prefix, "weight_dual_scale").float()
        if elements.shape[1] % max(outer.shape[1], 1):
            raise VerificationError(
                f"holds {outer.shape[1]} outer scales for {elements.shape[1]} columns, and no block size divides them",
                where=f"{prefix}.weight_dual_scale",
            )
        return MxDynamic(kind, elements, scale, bias, outer)

    def _scales(self, prefix: str, level: str = "") -> tuple[Tensor, Tensor]:
        """Scale and offset; an offset that a writer left out is zero."""
        scale = self._part(prefix, f"weight_scale{level}").float()
        name = f"{prefix}.weight_offset{level}"
        return scale, self.source.load(name).float() if name in self.source else torch.zeros_like(scale)

    def _part(self, prefix: str, part: str) -> Tensor:
        name = f"{prefix}.{part}"
        if name not in self.source:
            raise VerificationError("the tensor is missing", where=name)
        return self.source.load(name)

    def _bias(self, prefix: str) -> Tensor | None:
        name = f"{prefix}.bias"
        return self.source.load(name) if name in self.source else None


def decode_deq_scale(stored: Tensor) -> Tensor:
    """The float32 values of a ``deq_scale`` that is stored as float32 or as its bits in int64."""
    if stored.dtype == torch.float32:
        return stored
    return stored.to(torch.int32).view(torch.float32)
