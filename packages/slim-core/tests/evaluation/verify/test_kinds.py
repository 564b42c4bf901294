"""The values of every kind of layer: clean ones are fine, and every fault is found.

The layers are built here from the formulas of the format, on top of the clean folder of ``conftest.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slim_core.evaluation.verify import Verification, verify_folder
from slim_core.evaluation.verify import rows as verify_rows

DOWN = "model.layers.1.mlp.down_proj"  # engines cut it along its input
PLAIN = "model.layers.1.mlp.fc"  # no engine knows it
OUT, IN = 16, 128
GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
RANKING = [
    *("FLOAT", "W4A8_DYNAMIC", "W16A16S", "W4A16", "W8A16", "W8A8_DYNAMIC", "W8A8_MIX", "W8A8", "W8A8S"),
    *("WFP8AFP8_DYNAMIC", "W8A8_MXFP8", "W4A8_MXFP", "W4A4_DYNAMIC", "W4A4_MXFP4", "W4A4_MXFP4_DUALSCALE"),
]


def matrix(seed: int = 0, rows: int = OUT, columns: int = IN) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).bfloat16()


def integers(weight: Tensor, bits: int, group: int, symmetric: bool = True) -> dict[str, Tensor]:
    """Codes, scale and offset."""
    w = weight.double().reshape(len(weight), -1, group or weight.shape[1])
    high = 2 ** (bits - 1)
    if symmetric:
        scale = w.abs().amax(2, keepdim=True) / (high - 1)
        offset = torch.zeros_like(scale)
    else:
        low, top = w.amin(2, keepdim=True).clamp(max=0), w.amax(2, keepdim=True).clamp(min=0)
        scale = (top - low) / (2**bits - 1)
        offset = (-low / scale).round() - high
    scale = scale.float().double()
    codes = (w / scale + offset).round().clamp(-high, high - 1)
    return {
        "weight": codes.reshape(weight.shape).to(torch.int8),
        "weight_scale": scale.squeeze(2).float(),
        "weight_offset": offset.squeeze(2).float(),
    }


def rows_in_pairs(codes: Tensor) -> Tensor:
    c = codes.numpy().astype(np.int64)
    return torch.from_numpy((((c[1::2] & 15) << 4) | (c[0::2] & 15)).astype(np.uint8).view(np.int8))


def columns_in_pairs(codes: Tensor) -> Tensor:
    c = codes.numpy().astype(np.int64)
    packed = (((c[:, 1::2] & 15) << 4) | (c[:, 0::2] & 15)).astype(np.uint8)
    return torch.from_numpy(packed if codes.dtype == torch.uint8 else packed.view(np.int8))


def static(weight: Tensor, codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    deq = 0.03125 * scale.flatten()
    return {
        "weight": codes,
        "quant_bias": (7.0 * codes.double().sum(1)).round().to(torch.int32),
        "input_scale": torch.tensor([0.03125]),
        "input_offset": torch.tensor([-7.0]),
        "deq_scale": deq.float(),
    }


def w8a8s(weight: Tensor) -> dict[str, Tensor]:
    w = weight.double()
    magnitude = w.abs().sort(1).values
    scale = torch.maximum(magnitude[:, -3:-2] / 7, magnitude[:, -1:] / 127)
    scale[magnitude[:, -1:] == 0] = 1
    scale = scale.float()
    return static(weight, (w / scale.double()).round().to(torch.int8), scale)


def w8a8_mix(weight: Tensor) -> dict[str, Tensor]:
    found = integers(weight, 8, 0)
    return found | static(weight, found["weight"], found["weight_scale"])


def w4a8(weight: Tensor, parts: int, group: int = 0) -> dict[str, Tensor]:
    found = integers(weight, 4, group)
    codes, scale = found["weight"], found["weight_scale"]
    exact = codes.double().reshape(len(codes), scale.shape[1], -1) * scale.double().unsqueeze(2)
    found["scale_bias"] = (8 * exact.reshape(len(codes), parts, -1).sum(2)).float()
    found["weight"] = rows_in_pairs(codes)
    if group:
        first = scale.amax(1, keepdim=True)
        found |= {"weight_scale": first, "weight_offset": torch.zeros_like(first)}
        found |= {"weight_scale_second": scale / first, "weight_offset_second": torch.zeros_like(scale)}
    return found


def w4a16(weight: Tensor, group: int, symmetric: bool = True) -> dict[str, Tensor]:
    found = integers(weight, 4, group, symmetric)
    found["weight"] = (rows_in_pairs if group else columns_in_pairs)(found["weight"])
    return found


def fp8(weight: Tensor) -> dict[str, Tensor]:
    scale = (weight.double().abs().amax(1, keepdim=True) / 448).float()
    codes = (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scale, "weight_offset": torch.zeros_like(scale)}


def in_blocks(weight: Tensor) -> Tensor:
    return torch.nn.functional.pad(weight.double(), (0, -weight.shape[1] % 32)).reshape(len(weight), -1, 32)


def mxfp8(weight: Tensor) -> dict[str, Tensor]:
    blocks = in_blocks(weight)
    exponent = blocks.abs().amax(2, keepdim=True).log2().floor() - 8
    elements = (blocks / 2**exponent).clamp(-448, 448).float().flatten(1)[:, : weight.shape[1]]
    return {"weight": elements.to(torch.float8_e4m3fn), "weight_scale": (exponent + 127).squeeze(2).to(torch.uint8)}


def fp4(values: Tensor) -> Tensor:
    """uint8 codes of the nearest numbers of four bits."""
    index = (values.abs().unsqueeze(-1) - GRID.double()).abs().argmin(-1)
    return (index + 8 * (values < 0)).to(torch.uint8)


def mxfp4(weight: Tensor) -> dict[str, Tensor]:
    blocks = in_blocks(weight)
    exponent = (blocks.abs().amax(2, keepdim=True) / 0.875 + 9.6e-7).log2().floor() - 2
    codes = fp4(blocks / 2**exponent).flatten(1)[:, : weight.shape[1]]
    return {"weight": columns_in_pairs(codes), "weight_scale": (exponent + 127).squeeze(2).to(torch.uint8)}


def dual(weight: Tensor) -> dict[str, Tensor]:
    outer = (weight.double().reshape(len(weight), -1, 64).abs().amax(2, keepdim=True) / 6).float()
    inner = (weight.double().reshape(len(weight), -1, 64) / outer.double()).reshape(weight.shape)
    return mxfp4(inner) | {"weight_dual_scale": outer}


def pruned(weight: Tensor) -> dict[str, Tensor]:
    cut = weight.float().abs().flatten().quantile(0.3)
    return {"weight": weight.masked_fill(weight.float().abs() <= cut, 0)}


KINDS: dict[str, tuple[str, Callable[[Tensor], dict[str, Tensor]], int]] = {
    "W8A8S": ("W8A8S", w8a8s, 0),
    "W8A8_MIX": ("W8A8_MIX", w8a8_mix, 0),
    "W8A8_DYNAMIC grouped": ("W8A8_DYNAMIC", lambda w: integers(w, 8, 32), 32),
    "W8A16 grouped": ("W8A16", lambda w: integers(w, 8, 32), 32),
    "W8A16 grouped asymmetric": ("W8A16", lambda w: integers(w, 8, 32, False), 32),
    "W4A16": ("W4A16", lambda w: w4a16(w, 0), 0),
    "W4A16 asymmetric": ("W4A16", lambda w: w4a16(w, 0, False), 0),
    "W4A16 grouped": ("W4A16", lambda w: w4a16(w, 32), 32),
    "W4A16 grouped asymmetric": ("W4A16", lambda w: w4a16(w, 32, False), 32),
    "W4A8": ("W4A8_DYNAMIC", lambda w: w4a8(w, 16), 0),
    "W4A8 in two levels": ("W4A8_DYNAMIC", lambda w: w4a8(w, 16, 32), 32),
    "W4A4": ("W4A4_DYNAMIC", lambda w: integers(w, 4, 0), 0),
    "W4A4 grouped asymmetric": ("W4A4_DYNAMIC", lambda w: integers(w, 4, 32, False), 32),
    "FP8": ("WFP8AFP8_DYNAMIC", fp8, 0),
    "FP8 as the engine calls it": ("W8A8FP8_DYNAMIC", fp8, 0),
    "MXFP8": ("W8A8_MXFP8", mxfp8, 32),
    "MXFP8 with MXFP4": ("W4A8_MXFP", mxfp4, 32),
    "MXFP4": ("W4A4_MXFP4", mxfp4, 32),
    "dual scale": ("W4A4_MXFP4_DUALSCALE", dual, 32),
    "W16A16S": ("W16A16S", pruned, 0),
}


def put(draft: Any, name: str, weight: Tensor, prefix: str = DOWN) -> None:
    """Make a linear of the draft one of another kind."""
    kind, build, size = KINDS[name]
    for old in [old for old in draft.tensors if old.startswith(f"{prefix}.")]:
        draft.drop(old)
    draft.original[f"{prefix}.weight"] = weight
    for suffix, tensor in build(weight).items():
        draft.tensors[f"{prefix}.{suffix}"] = tensor
        draft.types[f"{prefix}.{suffix}"] = kind
    present = [label for label in RANKING if label in draft.types.values()]
    draft.globals.update(group_size=size, model_quant_type=present[-1])


def verified(draft: Any, tmp_path: Path, engine: str | None = None) -> Verification:
    return verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"), engine)


def about_values(found: Verification) -> list[str]:
    return [text for text in found.warnings if "vllm-ascend" not in text]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("columns", [128, 192])
def test_clean_layers(name: str, columns: int, draft: Any, tmp_path: Path) -> None:
    put(draft, name, matrix(columns=columns))
    found = verified(draft, tmp_path)
    assert not found.problems, found.text()
    assert not about_values(found)
    assert found.compared
    assert found.checked == len(draft.tensors)


@pytest.mark.parametrize("name", ["MXFP8", "MXFP4", "FP8", "W8A8S", "W4A4"])
def test_widths_that_are_no_multiple_of_a_block(name: str, draft: Any, tmp_path: Path) -> None:
    put(draft, name, matrix(columns=80))
    found = verified(draft, tmp_path)
    assert not found.problems, found.text()
    assert not about_values(found)


@pytest.mark.parametrize("name", KINDS)
def test_many_row_blocks(name: str, draft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_rows, "_BLOCK_ELEMENTS", 300)
    monkeypatch.setattr(verify_rows, "_HELD_ELEMENTS", 600)
    put(draft, name, matrix())
    found = verified(draft, tmp_path)
    assert not found.problems, found.text()
    assert not about_values(found)


def test_scale_bias_in_one_part(draft: Any, tmp_path: Path) -> None:
    KINDS["one part"] = ("W4A8_DYNAMIC", lambda w: w4a8(w, 1), 0)
    try:
        put(draft, "one part", matrix(), PLAIN)
    finally:
        del KINDS["one part"]
    assert not verified(draft, tmp_path).problems


def at(suffix: str, index: Any, value: Any) -> Callable[[Any], None]:
    def change(draft: Any) -> None:
        name = f"{DOWN}.{suffix}"
        tensor = draft.tensors[name].clone()
        if tensor.dtype == torch.float8_e4m3fn:
            tensor.view(torch.uint8)[index] = value
        else:
            tensor[index] = value
        draft.tensors[name] = tensor

    return change


def times(suffix: str, factor: float) -> Callable[[Any], None]:
    return lambda draft: draft.tensors.update({f"{DOWN}.{suffix}": draft.tensors[f"{DOWN}.{suffix}"] * factor})


def halves_swapped(draft: Any) -> None:
    """Low half first becomes high half first."""
    packed = draft.tensors[f"{DOWN}.weight"].numpy().view(np.uint8).astype(np.int64)
    swapped = ((packed & 15) << 4 | packed >> 4).astype(np.uint8)
    draft.tensors[f"{DOWN}.weight"] = torch.from_numpy(swapped).view(draft.tensors[f"{DOWN}.weight"].dtype)


def rolled(draft: Any) -> None:
    stored = draft.tensors[f"{DOWN}.weight"]
    draft.tensors[f"{DOWN}.weight"] = (
        stored.view(torch.uint8).roll(1, 0).view(stored.dtype) if stored.element_size() == 1 else stored.roll(1, 0)
    )


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
def test_faults(fault: str, draft: Any, tmp_path: Path) -> None:
    name, change, message = FAULTS[fault]
    put(draft, name, matrix())
    change(draft)
    found = verified(draft, tmp_path)
    assert any(message in problem for problem in found.problems), found.text()


def test_scale_bias_that_does_not_divide_the_width(draft: Any, tmp_path: Path) -> None:
    put(draft, "W4A8", matrix())
    wide = matrix(columns=IN + 4)
    parts = integers(wide, 4, 0)
    draft.original[f"{DOWN}.weight"] = wide
    draft.tensors[f"{DOWN}.weight"] = rows_in_pairs(parts["weight"])
    found = verified(draft, tmp_path)
    assert any("scale_bias: has 16 columns, which do not divide 132" in text for text in found.problems)


def test_rows_of_zeros(draft: Any, tmp_path: Path) -> None:
    weight = matrix()
    weight[3] = 0
    put(draft, "W8A8S", weight)
    assert float(draft.tensors[f"{DOWN}.deq_scale"][3]) == 0.03125
    found = verified(draft, tmp_path)
    assert not found.problems, found.text()


def outliers() -> Tensor:
    weight = 0.02 * torch.randn(OUT, 4096, generator=torch.Generator().manual_seed(3))
    weight[:, 0] = 4
    return weight.bfloat16()


@pytest.mark.parametrize("name", ["W4A4", "W8A8S", "W4A8", "MXFP4"])
def test_rows_with_outliers_lose_much_without_being_wrong(name: str, draft: Any, tmp_path: Path) -> None:
    put(draft, name, outliers())
    found = verified(draft, tmp_path)
    assert not found.problems, found.text()
    if name != "MXFP4":  # whose blocks are small
        assert any("rows have outliers" in text for text in found.warnings) is (name != "W8A8S")


RECIPE = "spec: {{process: [{{type: linear_quant, qconfig: {{weight: {{method: {}}}}}}}]}}"


def moved(draft: Any, share: float) -> None:
    """What a method does that lets some weights make up for the errors of others."""
    codes = draft.tensors[f"{DOWN}.weight"]
    some = torch.rand(codes.shape, generator=torch.Generator().manual_seed(1)) < share
    draft.tensors[f"{DOWN}.weight"] = (codes + some.to(torch.int8)).clamp(-8, 7)


@pytest.mark.parametrize("method", ["gptq", "ssz", "minmax", "another"])
def test_how_far_a_weight_may_move_is_a_matter_of_its_method(method: str, draft: Any, tmp_path: Path) -> None:
    put(draft, "W4A4", matrix())
    moved(draft, 0.05)
    draft.recipe = RECIPE.format(method)
    found = verified(draft, tmp_path)
    far = f"{DOWN}.weight: row"
    assert any(text.startswith(far) for text in found.problems) is (method == "minmax"), found.text()
    assert any(text.startswith(far) for text in found.warnings) is (method == "another")


def test_the_method_is_that_of_the_rule_that_took_the_linear(draft: Any, tmp_path: Path) -> None:
    put(draft, "W4A4", matrix())
    moved(draft, 0.05)
    gptq = "{type: linear_quant, include: ['*.down_proj'], qconfig: {weight: {method: gptq}}}"
    minmax = "{type: linear_quant, qconfig: {weight: {method: minmax}}}"
    strategy = "{type: autoround_quant, strategies: [{include: ['*.down_proj'], qconfig: {}}]}"
    for i, (process, wrong) in enumerate(
        [
            (f"[{gptq}, {minmax}]", False),
            (f"[{minmax}, {gptq}]", True),
            (f"[{{type: group, configs: [{gptq}, {minmax}]}}]", False),
            (f"[{{type: group, configs: [{minmax}]}}, {gptq}]", True),
            (f"[{strategy}, {minmax}]", False),
            (f"[{gptq.replace('*.down', '*.{down')}, {minmax}]", False),  # a pattern that cannot be read takes all
        ]
    ):
        draft.recipe = f"spec: {{process: {process}}}"
        folder, original = draft.write(tmp_path / f"out{i}"), draft.write_original(tmp_path / f"model{i}")
        assert any("row" in text for text in verify_folder(folder, original).problems) is wrong


def test_more_than_any_method_means(draft: Any, tmp_path: Path) -> None:
    put(draft, "W8A8_DYNAMIC grouped", matrix())
    draft.recipe = RECIPE.format("gptq")
    rolled(draft)
    found = verified(draft, tmp_path)
    assert any(HUGE in text for text in found.problems), found.text()


def test_methods_that_clip_rows_with_outliers(draft: Any, tmp_path: Path) -> None:
    weight = outliers()
    put(draft, "W4A4", weight)
    scale = draft.tensors[f"{DOWN}.weight_scale"] * 0.9
    draft.tensors[f"{DOWN}.weight_scale"] = scale
    draft.tensors[f"{DOWN}.weight"] = (weight.float() / scale).round().clamp(-8, 7).to(torch.int8)
    draft.recipe = RECIPE.format("ssz")
    found = verified(draft, tmp_path)
    assert not found.problems, found.text()
    assert any("it is what ssz does to rows with outliers" in text for text in found.warnings)


def test_pruned_models_are_compared_too(draft: Any, tmp_path: Path) -> None:
    put(draft, "W16A16S", matrix())
    draft.recipe = "spec: {process: [{type: float_sparse}, {type: linear_quant, qconfig: {weight: {method: minmax}}}]}"
    found = verified(draft, tmp_path)
    assert found.compared
    assert not found.problems
    assert found.notes == ["W16A16S: 30.1% to 30.1% of the weights are zero (1 layers)"]
    assert "Notes (1)" in found.text()


def test_sparse_codes_are_counted(draft: Any, tmp_path: Path) -> None:
    put(draft, "W8A8S", matrix())
    (note,) = verified(draft, tmp_path).notes
    assert note == "W8A8S: 99.0% to 99.0% of the codes fit four bits (1 layers)"


def test_a_pruned_bias_keeps_its_type(draft: Any, tmp_path: Path) -> None:
    put(draft, "W16A16S", matrix())
    bias = torch.randn(OUT, generator=torch.Generator().manual_seed(4)).bfloat16()
    draft.tensors[f"{DOWN}.bias"], draft.original[f"{DOWN}.bias"] = bias, bias
    draft.types[f"{DOWN}.bias"] = "W16A16S"
    assert not verified(draft, tmp_path).problems
    draft.types[f"{DOWN}.bias"] = "FLOAT"
    found = verify_folder(draft.write(tmp_path / "other"))
    assert any(f"{DOWN}.bias: has the type FLOAT, expected W16A16S" in text for text in found.problems)


ENGINES: dict[str, tuple[str, str, str | None]] = {
    "groups of eight bits": (
        "vllm-ascend",
        "W8A8_DYNAMIC grouped",
        "loads W8A8_DYNAMIC linear layers only per channel",
    ),
    "offsets": ("vllm-ascend", "W8A16 grouped asymmetric", "loads W8A16 linear layers only per channel"),
    "offsets of four bits": ("mindie-sd", "W4A16 asymmetric", "only without weight_offset; quantize symmetrically"),
    "weights of four bits": ("vllm-ascend", "W4A16", "has no class for W4A16 linear layers"),
    "weights of four bits elsewhere": ("mindie-llm", "W4A16 grouped asymmetric", None),
    "the reference's name": ("vllm-ascend", "FP8", "write them with fp8_label: W8A8FP8_DYNAMIC"),
    "the engine's name": ("vllm-ascend", "FP8 as the engine calls it", None),
    "linears of W4A8": ("vllm-ascend", "W4A8", "has no class for W4A8_DYNAMIC linear layers"),
    "dense W4A8": ("mindie-llm", "W4A8", "loads W4A8_DYNAMIC linear layers only in groups"),
    "dense W4A8 in two levels": ("mindie-llm", "W4A8 in two levels", None),
    "sparse on its chip": ("vllm-ascend-310p", "W8A8S", None),
    "pruned": ("vllm-ascend", "W16A16S", "has no class for W16A16S linear layers"),
    "dual scales": ("vllm-ascend", "dual scale", "has no class for W4A4_MXFP4_DUALSCALE linear layers"),
}


@pytest.mark.parametrize("case", ENGINES)
def test_engines(case: str, draft: Any, tmp_path: Path) -> None:
    engine, name, message = ENGINES[case]
    put(draft, name, matrix())
    about = [text for text in verified(draft, tmp_path, engine).problems if text.startswith(DOWN)]
    assert len(about) == (message is not None), about
    assert all(engine in text and message in text for text in about)


def test_odd_blocks(draft: Any, tmp_path: Path) -> None:
    put(draft, "MXFP8 with MXFP4", matrix(columns=96))
    found = verified(draft, tmp_path, "vllm-ascend")
    assert any("only if 64 divides their input features" in text for text in found.problems)


def test_layers_that_an_engine_refuses_together(draft: Any, tmp_path: Path) -> None:
    put(draft, "W4A16 grouped", matrix())
    KINDS["expert"] = ("W4A8_DYNAMIC", lambda w: w4a8(w, 16), 32)
    try:
        for expert in range(2):
            put(draft, "expert", matrix(), f"model.layers.0.mlp.experts.{expert}.down_proj")
    finally:
        del KINDS["expert"]
    found = verified(draft, tmp_path)
    assert not found.problems, found.text()
    text = "only in models without grouped or MX layers (here model.layers.1.mlp.down_proj)"
    assert any(text in warning for warning in found.warnings)


def test_an_engine_of_another_format(draft: Any, tmp_path: Path) -> None:
    found = verified(draft, tmp_path, "mindie-sd")
    assert any("mindie-sd wants other files around its layers" in text for text in found.problems)
    folder = tmp_path / "out"
    assert not any(entry.engine == "mindie-sd" for entry in verify_folder(folder).loadable)


def test_fused_linears_need_one_size_of_groups(draft: Any, tmp_path: Path) -> None:
    for leaf, name in (("gate_proj", "W8A8_DYNAMIC grouped"), ("up_proj", "W8A8_DYNAMIC grouped")):
        put(draft, name, matrix(), f"model.layers.0.mlp.{leaf}")
    assert not verified(draft, tmp_path).problems
    KINDS["other"] = ("W8A8_DYNAMIC", lambda w: integers(w, 8, 64), 32)
    try:
        put(draft, "other", matrix(), "model.layers.0.mlp.up_proj")
    finally:
        del KINDS["other"]
    found = verify_folder(draft.write(tmp_path / "more"))
    text = "gate_proj is W8A8_DYNAMIC in groups of 32, up_proj is W8A8_DYNAMIC in groups of 64"
    assert any(text in problem for problem in found.problems), found.text()


def test_fused_sparse_linears_see_their_input_alike(draft: Any, tmp_path: Path) -> None:
    for leaf in ("gate_proj", "up_proj"):
        put(draft, "W8A8S", matrix(), f"model.layers.0.mlp.{leaf}")
    draft.tensors["model.layers.0.mlp.up_proj.input_scale"] = torch.tensor([0.0625])
    found = verified(draft, tmp_path)
    assert any("up_proj.input_scale: is 0.0625, expected 0.03125" in text for text in found.problems)
