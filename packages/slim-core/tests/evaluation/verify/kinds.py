"""Layers of every kind, built from the formulas of the format, to stand in a draft of a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from slim_core.evaluation.verify import Verification, verify_folder

DOWN = "model.layers.1.mlp.down_proj"  # engines cut it along its input
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


# The label of the description, how the tensors are made, and the size of the groups.
Kind = tuple[str, Callable[[Tensor], dict[str, Tensor]], int]
KINDS: dict[str, Kind] = {
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


def put(draft: Any, kind: str | Kind, weight: Tensor, prefix: str = DOWN) -> None:
    """Make a linear of the draft one of another kind."""
    label, build, size = KINDS[kind] if isinstance(kind, str) else kind
    for old in [old for old in draft.tensors if old.startswith(f"{prefix}.")]:
        draft.drop(old)
    draft.original[f"{prefix}.weight"] = weight
    for suffix, tensor in build(weight).items():
        draft.tensors[f"{prefix}.{suffix}"] = tensor
        draft.types[f"{prefix}.{suffix}"] = label
    present = [each for each in RANKING if each in draft.types.values()]
    draft.globals.update(group_size=size, model_quant_type=present[-1])


def verified(draft: Any, tmp_path: Path, engine: str | None = None) -> Verification:
    return verify_folder(draft.write(tmp_path / "out"), draft.write_original(tmp_path / "model"), engine)


def about_values(found: Verification) -> list[str]:
    return [text for text in found.warnings if "vllm-ascend" not in text]


def outliers() -> Tensor:
    weight = 0.02 * torch.randn(OUT, 4096, generator=torch.Generator().manual_seed(3))
    weight[:, 0] = 4
    return weight.bfloat16()
