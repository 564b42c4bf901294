"""A float checkpoint made of what was written, under the names and in the layout of the original one.

Reads ascendv1 with safetensors and json alone. If the original stacks its experts, the written ones are stacked again;
which way the stack lies is found by trying the ways there are.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["rebuild"]

_MOST_OFF = 0.02  # of the norm; eight bits are off by less
_WEIGHTS = re.compile(r"pytorch_model|\.safetensors")


def rebuild(original: Path, written: Path, target: Path) -> list[str]:
    """Write a float checkpoint to ``target``; returns the modules that were quantized.

    Raises:
        ValueError: the written files lack a tensor of the original, have it with other values, or have one too many.
    """
    wanted, have = _read(original), _read(written)
    said = json.loads((written / "quant_model_description.json").read_text())
    quantized = [name.removesuffix(".weight") for name in have if name.endswith(".weight") and said[name] != "FLOAT"]
    values = {f"{module}.weight": _weight(module, have, said[f"{module}.weight"]) for module in quantized}
    used = {name for name in have if name.rpartition(".")[0] in set(quantized)}
    floats = {name: have[name] for name in have if name not in used}
    # Biases of quantized layers are those of the original; static layers also fold them into ``quant_bias``.
    floats |= {f"{module}.bias": have[f"{module}.bias"] for module in quantized if f"{module}.bias" in have}
    result: dict[str, Tensor] = {}
    for name, tensor in wanted.items():
        if name in floats:
            if not torch.equal(floats.pop(name), tensor):
                raise ValueError(f"{name!r} is not what it was")
            result[name] = tensor
        elif name in values:
            result[name] = _near(name, values.pop(name), tensor)
        elif name.endswith(".bias") and name.removesuffix(".bias") in quantized:
            result[name] = tensor  # folded into quant_bias
        else:
            result[name] = _stacked(name, tensor, values, floats)
    tied = [tensor for name, tensor in wanted.items() if result[name] is tensor]
    for name in [name for name, tensor in floats.items() if any(_same(tensor, other) for other in tied)]:
        floats.pop(name)  # engines want what is tied under both of its names
    if left := sorted({*values, *floats}):
        raise ValueError(f"{left[0]!r} is no tensor of the original")
    shutil.copytree(original, target, ignore=lambda _, names: [name for name in names if _WEIGHTS.search(name)])
    save_file(
        {name: tensor.contiguous() for name, tensor in result.items()}, target / "model.safetensors", {"format": "pt"}
    )
    return quantized


def _read(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118
                if name in tensors:
                    raise ValueError(f"{name!r} is stored twice")
                tensors[name] = stored.get_tensor(name)
    return tensors


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)


def _weight(module: str, have: dict[str, Tensor], kind: str) -> Tensor:
    """``codes * scale``; what is static has no scale of its own, it is ``deq_scale / input_scale``."""
    codes = have[f"{module}.weight"].float()
    if kind == "W8A8_DYNAMIC":
        return codes * have[f"{module}.weight_scale"].float()
    assert kind == "W8A8", kind
    stored = have[f"{module}.deq_scale"]
    scale = stored if stored.dtype == torch.float32 else stored.to(torch.int32).view(torch.float32)
    return codes * (scale.view(-1, 1) / have[f"{module}.input_scale"].float())


def _near(name: str, value: Tensor, original: Tensor) -> Tensor:
    if value.shape != original.shape or _off(value, original) > _MOST_OFF:
        raise ValueError(f"{name!r} is not what it was within {_MOST_OFF:.0%} of its norm")
    return value.to(original.dtype)


def _off(value: Tensor, original: Tensor) -> float:
    return float((value - original.float()).norm() / original.float().norm().clamp(min=1e-12))


def _stacked(name: str, original: Tensor, values: dict[str, Tensor], floats: dict[str, Tensor]) -> Tensor:
    """A stack of experts from the tensors of single ones, which are taken away."""
    bias = name.endswith("_bias")
    leaf = "bias" if bias else "weight"
    prefix, _, parameter = name.removesuffix(".weight").rpartition(".")
    pool = {**floats, **values}
    for root in (prefix, f"{prefix}.{parameter}", f"{prefix}.experts"):
        for linears in _fusions(root, leaf, pool):
            names = [
                [".".join(filter(None, (root, str(e), linear, leaf))) for linear in linears]
                for e in range(original.shape[0])
            ]
            if any(one not in pool for row in names for one in row):
                continue
            parts = [torch.stack([pool[row[i]].float() for row in names]) for i in range(len(linears))]
            for candidate in _ways(parts, bias):
                if candidate.shape == original.shape and _off(candidate, original) <= _MOST_OFF:
                    for one in (one for row in names for one in row):
                        values.pop(one, None)
                        floats.pop(one, None)
                    return candidate.to(original.dtype)
    raise ValueError(f"nothing that is written makes {name!r}")


def _fusions(root: str, leaf: str, pool: dict[str, Tensor]) -> list[tuple[str, ...]]:
    """Which linears of an expert a stack may hold, in order."""
    start, end = f"{root}.0.", f".{leaf}"
    linears = [name[len(start) : -len(end)] for name in pool if name.startswith(start) and name.endswith(end)]
    return [("gate_proj", "up_proj"), ("w1", "w3"), *((linear,) for linear in linears), ("",)]


def _ways(parts: list[Tensor], bias: bool) -> Iterator[Tensor]:
    """Linears side by side or alternating, their matrices as they are or turned."""
    for together in (torch.cat(parts, 1), torch.stack(parts, 2).flatten(1, 2)):
        yield together
        if not bias:
            yield together.transpose(1, 2)
