"""What MindIE-SD does with a folder, on the CPU: an independent reader that knows nothing of Slim.

A float model and the path of a description go in. Whatever its reader refuses is refused here; layers are put in the
place of ``torch.nn.Linear`` modules by their names, and compute in float64 what its kernels compute.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

ALGORITHMS = ("W8A8", "W8A8_DYNAMIC", "W8A8_MXFP8", "W4A4_MXFP4", "W4A4_MXFP4_DUALSCALE", "W8A16", "NO_QUANT")
LARGEST = 100 * 1024**3
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def check_file(path: Path) -> None:
    if path.is_symlink():
        raise PermissionError(f"{path.name} is a link")
    found = path.stat()
    if stat.S_IMODE(found.st_mode) & ~0o640:
        raise PermissionError(f"{path.name} is open to others")
    if found.st_size > LARGEST:
        raise ValueError(f"{path.name} is too large")


def quantize(model: nn.Module, path: Path) -> list[str]:
    """Replace layers of a model; the names of those that were."""
    check_file(path)
    described: dict[str, str] = json.loads(path.read_text())
    algorithm = described["model_quant_type"]
    if algorithm not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {algorithm}")
    weights_path = path.parent / f"quant_model_weight_{algorithm.lower()}.safetensors"
    check_file(weights_path)
    opened: Any = safe_open(weights_path, "pt")
    replaced: dict[str, nn.Module] = {}
    with opened as file:
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    for name, layer in model.named_modules():
        keys = (f"{name}.linear.weight", f"{name}.weight", name, f"{name}.fa_q.scale", f"{name}.quant_type")
        if any(described.get(key) == "FLOAT" for key in keys):
            continue
        kind = next((described[key].upper() for key in keys if described.get(key, "").upper() in ALGORITHMS), None)
        if kind is not None and isinstance(layer, nn.Linear):
            replaced[name] = Layer(kind, name, layer, weights)
    for name, layer in replaced.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    return list(replaced)


class Layer(nn.Module):
    def __init__(self, kind: str, name: str, linear: nn.Linear, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.kind = kind
        prefix, self.factor = name, None
        if f"{name}.div.mul_scale" in weights:
            prefix, self.factor = f"{name}.linear", weights[f"{name}.div.mul_scale"].double()
        self.part = {key.removeprefix(f"{prefix}."): t for key, t in weights.items() if key.startswith(f"{prefix}.")}
        self.bias = self.part["bias"].double() if linear.bias is not None else None
        weight = self.part["weight"]
        if kind in ("W4A4_MXFP4", "W4A4_MXFP4_DUALSCALE"):
            weight = elements(weight)
        assert tuple(weight.shape) == (linear.out_features, linear.in_features)
        self.weight = weight.double()
        if "MXFP" in kind:
            assert self.bias is not None, "the kernel cannot do without"
            # The kernel wants exponents in pairs.
            exponents = self.part["weight_scale"].reshape(len(weight), -1, 2).flatten(1)
            self.weight *= (2.0 ** (exponents.double() - 127)).repeat_interleave(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        given = x.double() if self.factor is None else x.double() * self.factor
        if self.kind == "W8A8":
            y = self.static(given)
        elif self.kind == "W8A8_DYNAMIC":
            scale = (given.abs().amax(-1, keepdim=True) / 127).float()
            codes = (given.float() / scale).round().clamp(-128, 127).double()
            y = codes @ self.weight.T * scale.double() * self.part["weight_scale"].squeeze().double()
        elif self.kind == "W4A4_MXFP4_DUALSCALE":
            y = self.dual(given)
        else:
            y = blocks(given, four="MXFP4" in self.kind) @ self.weight.T
        if self.bias is not None and self.kind != "W8A8":
            y = y + self.bias
        return y.to(x.dtype)

    def static(self, x: Tensor) -> Tensor:
        scale, offset = self.part["input_scale"], self.part["input_offset"].to(torch.int8)
        assert self.part["deq_scale"].dtype == torch.float32
        codes = (x.float() / scale.bfloat16().float() + offset).round().clamp(-128, 127).double()
        return (codes @ self.weight.T + self.part["quant_bias"].double()) * self.part["deq_scale"].double()

    def dual(self, x: Tensor) -> Tensor:
        outer = self.part["weight_dual_scale"].squeeze(-1).T.double()  # (blocks, out)
        size = x.shape[-1] // len(outer)
        y = torch.zeros(*x.shape[:-1], len(self.weight), dtype=torch.float64)
        for block, scale in enumerate(outer):
            columns = slice(block * size, (block + 1) * size)
            part = x[..., columns].float()
            token = part.abs().amax(-1, keepdim=True) / 6
            y += blocks((part / token).double(), four=True) @ self.weight[:, columns].T * token.double() * scale
        return y


def elements(weight: Tensor) -> Tensor:
    """Four-bit numbers, from numbers of eight bits that are cast, or from bytes that hold two codes."""
    if weight.dtype == torch.float8_e4m3fn:
        return nearest(weight.double())
    if weight.dtype != torch.uint8:
        raise TypeError(f"a weight of {weight.dtype}")
    codes = torch.stack([weight & 15, weight >> 4], 2).flatten(1).long()
    return torch.cat([E2M1, -E2M1])[codes]


def nearest(x: Tensor) -> Tensor:
    """The four-bit number next to each; halves away from zero, saturating."""
    limits = (E2M1[1:] + E2M1[:-1]) / 2
    return E2M1[torch.bucketize(x.abs(), limits, right=True)] * x.sign()


def blocks(x: Tensor, *, four: bool) -> Tensor:
    """Activations as microscaling numbers: 32 channels share ``2^(floor(log2 largest) - 2)`` (8 for E4M3)."""
    seen = x.reshape(*x.shape[:-1], -1, 32)
    power = torch.frexp(seen.abs().amax(-1, keepdim=True))[1] - 1 - (2 if four else 8)
    scale = torch.ldexp(torch.ones_like(seen[..., :1]), power)
    scaled = seen / scale
    rounded = nearest(scaled) if four else scaled.float().clamp(-448, 448).to(torch.float8_e4m3fn).double()
    return (rounded * scale).reshape(x.shape)
