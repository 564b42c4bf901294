"""A reader of ascendv1 folders and the arithmetic of their layers, from the description of the format alone.

Uses safetensors, json, numpy and torch tensors; nothing of Slim.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

GLOBALS = {"version", "model_quant_type", "metadata", "group_size", "optional"}
EPSILON = np.float32(2.0**-23)


@dataclass
class Written:
    """All tensors of a folder, its description, and the file that each tensor lies in."""

    folder: Path
    tensors: dict[str, Tensor]
    description: dict[str, Any]
    place: dict[str, str]

    def kind(self, module: str) -> str:
        return self.description[f"{module}.weight"]

    def quantized(self) -> list[str]:
        return [
            name.removesuffix(".weight") for name in self.tensors if name.endswith(".weight") and self.is_code(name)
        ]

    def is_code(self, name: str) -> bool:
        return self.description[name] != "FLOAT"

    def array(self, name: str) -> np.ndarray:
        return self.tensors[name].numpy()


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    place: dict[str, str] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                assert name not in tensors
                tensors[name] = stored.get_tensor(name)
                place[name] = file.name
    return tensors, place


def read(folder: Path) -> Written:
    tensors, place = read_tensors(folder)
    return Written(folder, tensors, json.loads((folder / "quant_model_description.json").read_text()), place)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def float32(tensor: Tensor) -> np.ndarray:
    return tensor.float().numpy()


def decoded(deq_scale: Tensor) -> np.ndarray:
    """``deq_scale`` as float32 values."""
    if deq_scale.dtype == torch.float32:
        return deq_scale.numpy()
    assert deq_scale.dtype == torch.int64
    return deq_scale.numpy().astype(np.int32).view(np.float32)


def weight_codes(weight: Tensor, symmetric: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scale and offset ``(out, 1)`` of a float weight, all in float32."""
    w = float32(weight)
    low = np.minimum(w.min(1, keepdims=True), np.float32(0))
    high = np.maximum(w.max(1, keepdims=True), np.float32(0))
    if symmetric:
        scale = np.maximum(np.maximum(-low, high) / np.float32(127), EPSILON)
        offset = np.zeros_like(scale)
    else:
        scale = np.maximum(high / np.float32(255) - low / np.float32(255), EPSILON)
        offset = np.round(-low / scale) - np.float32(128)
    return np.clip(np.round(w / scale + offset), -128, 127).astype(np.int8), scale, offset


def input_parameters(low: float, high: float, symmetric: bool, dtype: torch.dtype) -> tuple[np.float32, np.float32]:
    """Scale and offset of an activation; the scale is a number that the model's dtype can hold."""
    least, most = np.float32(min(low, 0.0)), np.float32(max(high, 0.0))
    scale = max(-least, most) / np.float32(127) if symmetric else most / np.float32(255) - least / np.float32(255)
    scale = np.float32(float(torch.tensor(float(max(scale, EPSILON))).to(dtype)))
    if symmetric:
        return scale, np.float32(0)
    return scale, np.float32(np.clip(np.round(-least / scale) - 128, -128, 127))


def ranges(model: nn.Module, names: list[str], inputs: list[list[int]]) -> dict[str, tuple[float, float]]:
    """Extremes of the inputs of these linears while the model runs."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _m, args, name=name: seen[name].append(args[0]))
        for name in names
    ]
    with torch.no_grad():
        for ids in inputs:
            model(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {
        name: (min(float(x.min()) for x in parts), max(float(x.max()) for x in parts)) for name, parts in seen.items()
    }


class Deployed(nn.Module):
    """A written linear as the engine computes it; integer products in int64."""

    def __init__(self, written: Written, module: str) -> None:
        super().__init__()
        self.kind = written.kind(module)
        self.parts = {
            name.removeprefix(f"{module}."): tensor
            for name, tensor in written.tensors.items()
            if name.rpartition(".")[0] == module
        }

    def forward(self, x: Tensor) -> Tensor:
        codes, bias = self.parts["weight"].long(), self.parts.get("bias")
        if self.kind == "W8A8":
            scale, offset = self.parts["input_scale"], self.parts["input_offset"]
            quantized = torch.clamp(torch.round(x.float() / scale + offset), -128, 127).long()
            total = quantized @ codes.T + self.parts["quant_bias"].long()
            return (total.float() * torch.from_numpy(decoded(self.parts["deq_scale"]).copy())).to(x.dtype)
        scale = self.parts["weight_scale"]
        if self.kind == "W8A8_DYNAMIC":
            token = torch.clamp(x.float().abs().amax(-1, keepdim=True) / 127, min=float(EPSILON))
            quantized = torch.round(x.float() / token).long()
            y = (quantized @ codes.T).float() * token * scale.T
            return (y if bias is None else y + bias).to(x.dtype)
        assert self.kind == "W8A16"
        weight = ((codes.float() - self.parts["weight_offset"]) * scale).to(x.dtype)
        return nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def deploy(model: nn.Module, written: Written, below: str = "") -> None:
    """Put the written linears in the place of the float ones."""
    for module in written.quantized():
        if module.startswith(below):
            model.set_submodule(module, Deployed(written, module))


class Fp8Blocks:
    """Matrices in square blocks of float8, with a factor for each, as DeepSeek-V3 is published."""

    def __init__(self, size: int) -> None:
        self.size = size

    def encoded(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and factors."""
        rows, columns = weight.shape
        codes = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
        factors = torch.zeros(-(-rows // self.size), -(-columns // self.size))
        for i in range(len(factors)):
            for j in range(len(factors[0])):
                at = slice(i * self.size, (i + 1) * self.size), slice(j * self.size, (j + 1) * self.size)
                factors[i, j] = weight[at].float().abs().max() / 448
                codes[at] = (weight[at].float() / factors[i, j]).to(torch.float8_e4m3fn)
        return codes, factors

    def decoded(self, codes: Tensor, factors: Tensor) -> Tensor:
        rows, columns = codes.shape
        each = torch.kron(factors, torch.ones(self.size, self.size))
        return (codes.float() * each[:rows, :columns]).bfloat16()
