"""Every fault in the values of a layer is found, whatever its kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

DOWN = "model.layers.1.mlp.down_proj"


def at(suffix: str, index: Any, value: Any) -> Callable[[Any], None]:
    return lambda draft: draft.set(f"{DOWN}.{suffix}", index, value)


def times(suffix: str, factor: float) -> Callable[[Any], None]:
    return lambda draft: draft.times(f"{DOWN}.{suffix}", factor)


def halves_swapped(draft: Any) -> None:
    """Low half first becomes high half first."""
    packed = draft.tensors[f"{DOWN}.weight"].numpy().view(np.uint8).astype(np.int64)
    swapped = ((packed & 15) << 4 | packed >> 4).astype(np.uint8)
    draft.tensors[f"{DOWN}.weight"] = torch.from_numpy(swapped).view(draft.tensors[f"{DOWN}.weight"].dtype)


def rolled(draft: Any) -> None:
    draft.roll(f"{DOWN}.weight")


def one_more(draft: Any) -> None:
    at("weight_scale", (3, 1), int(draft.tensors[f"{DOWN}.weight_scale"][3, 1]) + 1)(draft)


HUGE = "its relative error against the original is"
FAULTS: dict[str, tuple[str, Callable[[Any], None], str]] = {
    "W8A8S quant_bias": ("W8A8S", at("quant_bias", 2, 9), f"{DOWN}.quant_bias: is 9 in row 2, expected"),
    "W8A8S deq_scale": ("W8A8S", at("deq_scale", 2, 0.0), f"{DOWN}.deq_scale: is 0.0 in row 2"),
    "W8A8S row not written": ("W8A8S", at("weight", 5, 0), f"{DOWN}.weight: row 5 has only zeros"),
    "W8A8S code": ("W8A8S", at("weight", (5, 7), 120), "row 5 is off by"),
    "MIX scales disagree": ("W8A8_MIX", at("weight_scale", (4, 0), 1.0), f"{DOWN}.deq_scale: is"),
    "MIX offset": ("W8A8_MIX", at("weight_offset", (4, 0), 1.0), f"{DOWN}.weight_offset: is not zero everywhere"),
    "MIX quant_bias": ("W8A8_MIX", at("quant_bias", 0, 99999), f"{DOWN}.quant_bias: is 99999 in row 0"),
    "MIX input": ("W8A8_MIX", at("input_scale", 0, 0.1), "expected a value that bfloat16 can hold"),
    "MIX rows": ("W8A8_MIX", rolled, f"{DOWN}.quant_bias: is"),
    "groups: scale": (
        "W8A8_DYNAMIC grouped",
        at("weight_scale", (6, 2), -1.0),
        "weight_scale: is -1.0 in row 6 (1 such",
    ),
    "groups: offset": (
        "W8A8_DYNAMIC grouped",
        at("weight_offset", (6, 2), 3.0),
        "weight_offset: is not zero everywhere",
    ),
    "groups: code": ("W8A8_DYNAMIC grouped", at("weight", (6, 70), 1), "row 6 is off by"),
    "groups: columns moved": (
        "W8A16 grouped",
        lambda d: d.tensors.update({f"{DOWN}.weight_scale": d.tensors[f"{DOWN}.weight_scale"].roll(1, 1)}),
        f"{DOWN}.weight: {HUGE}",
    ),
    "groups: row not written": ("W8A16 grouped", at("weight", 5, 0), f"{DOWN}.weight: row 5 has only zeros"),
    "W8A16 offset no integer": (
        "W8A16 grouped asymmetric",
        at("weight_offset", (1, 1), 0.5),
        "weight_offset: holds values that are not integers in -128..127",
    ),
    "W8A16 offset too large": (
        "W8A16 grouped asymmetric",
        at("weight_offset", (1, 1), 128.0),
        "weight_offset: holds values that are not integers in -128..127",
    ),
    "W4A16 halves": ("W4A16", halves_swapped, f"{DOWN}.weight: {HUGE}"),
    "W4A16 offset": ("W4A16 asymmetric", at("weight_offset", (1, 0), 8.0), "not integers in -8..7"),
    "W4A16 groups halves": ("W4A16 grouped", halves_swapped, f"{DOWN}.weight: {HUGE}"),
    "W4A16 groups scale": ("W4A16 grouped", times("weight_scale", 2), f"{DOWN}.weight: {HUGE}"),
    "W4A16 row not written": ("W4A16", at("weight", 3, 0), f"{DOWN}.weight: row 3 has only zeros"),
    "W4A8 scale_bias": ("W4A8", at("scale_bias", (3, 5), 1e3), "scale_bias: is 1000 in row 3, column 5, expected"),
    "W4A8 scale_bias unscaled": ("W4A8", times("scale_bias", 0.125), f"{DOWN}.scale_bias: is"),
    "W4A8 scale_bias not finite": ("W4A8", at("scale_bias", (3, 5), float("nan")), "scale_bias: holds NaN or infinity"),
    "W4A8 halves": ("W4A8", halves_swapped, f"{DOWN}.scale_bias: is"),
    "W4A8 halves, weight": ("W4A8", halves_swapped, f"{DOWN}.weight: {HUGE}"),
    "W4A8 offset": ("W4A8", at("weight_offset", (2, 0), 1.0), f"{DOWN}.weight_offset: is not zero everywhere"),
    "W4A8 rows not written": ("W4A8", at("weight", 3, 0), f"{DOWN}.weight: row 6 has only zeros"),
    "second scale": (
        "W4A8 in two levels",
        at("weight_scale_second", (2, 1), 0.0),
        f"{DOWN}.weight_scale_second: is 0.0 in row 2",
    ),
    "second offset": (
        "W4A8 in two levels",
        at("weight_offset_second", (2, 1), 1.0),
        f"{DOWN}.weight_offset_second: is not zero everywhere",
    ),
    "second scale moved": (
        "W4A8 in two levels",
        lambda d: d.tensors.update(
            {f"{DOWN}.weight_scale_second": d.tensors[f"{DOWN}.weight_scale_second"].roll(1, 0)}
        ),
        f"{DOWN}.scale_bias: is",
    ),
    "W4A4 range": ("W4A4", at("weight", (9, 1), 8), f"{DOWN}.weight: row 9 holds codes outside -8..7"),
    "W4A4 offset": ("W4A4 grouped asymmetric", at("weight_offset", (1, 1), -9.0), "not integers in -8..7"),
    "W4A4 row not written": ("W4A4", at("weight", 9, 0), f"{DOWN}.weight: row 9 has only zeros"),
    "W4A4 rows": ("W4A4", rolled, f"{DOWN}.weight: {HUGE}"),
    "FP8 NaN": ("FP8", at("weight", (4, 4), 0x7F), f"{DOWN}.weight: holds NaN in row 4"),
    "FP8 offset": ("FP8", at("weight_offset", (2, 0), 1.0), f"{DOWN}.weight_offset: is not zero everywhere"),
    "FP8 scale": ("FP8", at("weight_scale", (2, 0), float("inf")), f"{DOWN}.weight_scale: is inf in row 2"),
    "FP8 element": ("FP8", at("weight", (4, 4), 0x7E), "row 4 is off by"),
    "FP8 rows": ("FP8 as the engine calls it", rolled, f"{DOWN}.weight: {HUGE}"),
    "FP8 row not written": ("FP8", at("weight", 7, 0), f"{DOWN}.weight: row 7 has only zeros"),
    "MXFP8 exponent": ("MXFP8", at("weight_scale", (3, 1), 255), f"{DOWN}.weight_scale: is 255 in row 3"),
    "MXFP8 NaN": ("MXFP8", at("weight", (4, 40), 0xFF), f"{DOWN}.weight: holds NaN in row 4"),
    "MXFP8 exponent off by one": ("MXFP8", one_more, "row 3 is off by"),
    "MXFP8 rows": ("MXFP8", rolled, f"{DOWN}.weight: {HUGE}"),
    "MXFP4 exponent": ("MXFP4", at("weight_scale", (3, 1), 255), f"{DOWN}.weight_scale: is 255 in row 3"),
    "MXFP4 exponent off by one": ("MXFP8 with MXFP4", one_more, "row 3 is off by"),
    "MXFP4 halves": ("MXFP4", halves_swapped, f"{DOWN}.weight: {HUGE}"),
    "MXFP4 row not written": ("MXFP4", at("weight", 7, 0), f"{DOWN}.weight: row 7 has only zeros"),
    "outer scale": (
        "dual scale",
        at("weight_dual_scale", (3, 1, 0), 0.0),
        f"{DOWN}.weight_dual_scale: is 0.0 in row 3",
    ),
    "outer scale infinite": (
        "dual scale",
        at("weight_dual_scale", (3, 1, 0), float("inf")),
        f"{DOWN}.weight_dual_scale: is inf in row 3",
    ),
    "outer scale doubled": ("dual scale", times("weight_dual_scale", 2), f"{DOWN}.weight: {HUGE}"),
    "pruned not finite": (
        "W16A16S",
        at("weight", (3, 3), float("nan")),
        f"{DOWN}.weight: holds NaN or infinity in row 3",
    ),
    "pruned rows": ("W16A16S", rolled, f"{DOWN}.weight: the weights that are not zero do not resemble the original"),
    "pruned negated": ("W16A16S", times("weight", -1), "their correlation is -"),
    "group size of MX": (
        "MXFP4",
        lambda d: d.globals.update(group_size=64),
        "group_size is 64, expected 32 with MX types",
    ),
    "group size of groups": (
        "W4A16 grouped",
        lambda d: d.globals.update(group_size=0),
        "group_size is 0, expected 32 as the scales of grouped layers have it",
    ),
    "group size of nothing": (
        "W4A8",
        lambda d: d.globals.update(group_size=32),
        "group_size is 32, expected 0 without grouped layers",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(kinds: ModuleType, fault: str, draft: Any, tmp_path: Path) -> None:
    name, change, message = FAULTS[fault]
    kinds.put(draft, name, kinds.matrix())
    change(draft)
    found = kinds.verified(draft, tmp_path)
    assert any(message in problem for problem in found.problems), found.text()


def test_scale_bias_that_does_not_divide_the_width(kinds: ModuleType, draft: Any, tmp_path: Path) -> None:
    kinds.put(draft, "W4A8", kinds.matrix())
    wide = kinds.matrix(columns=kinds.IN + 4)
    parts = kinds.integers(wide, 4, 0)
    draft.original[f"{DOWN}.weight"] = wide
    draft.tensors[f"{DOWN}.weight"] = kinds.rows_in_pairs(parts["weight"])
    found = kinds.verified(draft, tmp_path)
    assert any("scale_bias: has 16 columns, which do not divide 132" in text for text in found.problems)
