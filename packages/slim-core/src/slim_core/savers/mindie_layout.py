"""The MindIE-SD format: names of files and tensors, the types it has, and where its tensors differ from ascendv1.

They differ in two points. ``deq_scale`` is always float32. The weight of a microscaling four-bit layer is float8_e4m3fn
``(out, in)`` that holds the elements themselves, because that is what every version of MindIE-SD casts to its own
four-bit numbers; newer ones take bytes with two codes, as ascendv1 has them, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache

import torch
from torch import Tensor

from slim_core.errors import VerificationError
from slim_core.quantization.floating import e2m1_values, to_e4m3
from slim_core.quantization.kinds import LayerForm, LayerKind
from slim_core.savers.ascendv1_layout import Part, form_of, layout

__all__ = ["DESCRIPTION_STEM", "FOUR_BITS", "INDEX_FILE", "KINDS", "LARGEST_FILE", "WEIGHT_STEM", "codes_of_values"]
__all__ += ["description_file", "mindie_form_of", "mindie_layout", "model_type", "tensor_name", "values_of_codes"]
__all__ += ["weight_stem"]

DESCRIPTION_STEM, WEIGHT_STEM = "quant_model_description", "quant_model_weight"
INDEX_FILE = f"{WEIGHT_STEM}.safetensors.index.json"
KINDS = frozenset(
    {LayerKind.W8A8, LayerKind.W8A8_DYNAMIC, LayerKind.W8A8_MXFP8, LayerKind.W4A4_MXFP4, LayerKind.W4A4_MXFP4_DUALSCALE}
)
FOUR_BITS = frozenset({LayerKind.W4A4_MXFP4, LayerKind.W4A4_MXFP4_DUALSCALE})
LARGEST_FILE = 100 << 30
"""Bytes of a weight file above which MindIE-SD refuses it."""
_NO_CODE = 255


def model_type(kinds: Iterable[str]) -> str | None:
    """The type of the whole model, which names its files: the most frequent of its layers, the first in the alphabet
    among equals; None without any."""
    counts = Counter(map(str, kinds))
    return min(counts, key=lambda kind: (-counts[kind], kind)) if counts else None


def description_file(kind: str | None) -> str:
    """The name of the description of a model of this type."""
    return f"{DESCRIPTION_STEM}_{kind.lower()}.json" if kind else f"{DESCRIPTION_STEM}.json"


def weight_stem(kind: str | None, *, in_parts: bool) -> str:
    """What the names of weight files begin with; those of a model in parts do not tell its type."""
    return f"{WEIGHT_STEM}_{kind.lower()}" if kind and not in_parts else WEIGHT_STEM


def tensor_name(prefix: str, suffix: str) -> str:
    """The name of a tensor of a quantized linear."""
    return f"{prefix}.{suffix}"


def mindie_layout(form: LayerForm, prefix: str, out: int, width: int, *, packed: bool) -> dict[str, Part]:
    """The tensors of a layer without its bias, by suffix.

    Args:
        out, width: output and input features.
        packed: whether four-bit elements are stored as bytes with two codes.
    """
    parts = layout(form, prefix, out, width)
    if form.kind in FOUR_BITS and not packed:
        parts["weight"] = Part(torch.float8_e4m3fn, (out, width))
    return parts


def mindie_form_of(
    kind: LayerKind, shapes: Mapping[str, tuple[int, ...]], *, packed: bool
) -> tuple[LayerForm, int, int] | None:
    """As :func:`~slim_core.savers.ascendv1_layout.form_of`, also for weights that hold four-bit elements unpacked."""
    weight = shapes.get("weight", ())
    if kind not in FOUR_BITS or packed or len(weight) != 2:
        return form_of(kind, shapes)
    found = form_of(kind, {**shapes, "weight": (weight[0], weight[1] // 2)})
    return None if found is None else (found[0], weight[0], weight[1])


def values_of_codes(codes: Tensor) -> Tensor:
    """E2M1 codes 0..15, uint8, as the float8_e4m3fn numbers they stand for; all of these are E4M3 numbers too."""
    table = to_e4m3(e2m1_values(torch.arange(16, dtype=torch.uint8))).view(torch.uint8)
    return table.index_select(0, codes.flatten().to(torch.int32)).view(torch.float8_e4m3fn).view(codes.shape)


def codes_of_values(values: Tensor, name: str) -> Tensor:
    """The way back from :func:`values_of_codes`.

    Args:
        name: the tensor, for the error.

    Raises:
        VerificationError: a value is no E2M1 number.
    """
    codes = _code_table().index_select(0, values.view(torch.uint8).flatten().to(torch.int32)).view(values.shape)
    if bool((codes == _NO_CODE).any()):
        raise VerificationError("holds values that are no numbers of four bits (E2M1)", where=name)
    return codes


@cache
def _code_table() -> Tensor:
    """For each byte the E2M1 code of the E4M3 number it is, or 255."""
    table = torch.full((256,), _NO_CODE, dtype=torch.uint8)
    codes = torch.arange(16, dtype=torch.uint8)
    table[to_e4m3(e2m1_values(codes)).view(torch.uint8).long()] = codes
    return table
