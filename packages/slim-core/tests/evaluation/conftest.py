"""A small ascendv1 folder, built by hand from the formulas of the format, and the float model it comes from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, WIDE, VOCABULARY, LAYERS = 16, 32, 24, 2
INPUT_SCALE, INPUT_OFFSET = 0.03125, -7.0
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (WIDE, HIDDEN),
    "mlp.up_proj": (WIDE, HIDDEN),
    "mlp.down_proj": (HIDDEN, WIDE),
}
KINDS = dict.fromkeys(SHAPES, "W8A8") | {"self_attn.o_proj": "W8A16", "mlp.down_proj": "W8A8_DYNAMIC"}


def static_parts(codes: Tensor, scale: Tensor, bias: Tensor | None, *, bf16: bool) -> dict[str, Tensor]:
    """The tensors of a W8A8 linear."""
    deq = (scale.flatten() * INPUT_SCALE).float()
    folded = -INPUT_OFFSET * codes.double().sum(1)
    if bias is not None:
        folded = folded + bias.double() / deq.double()
    return {
        "quant_bias": folded.round().to(torch.int32),
        "input_scale": torch.tensor([INPUT_SCALE]),
        "input_offset": torch.tensor([INPUT_OFFSET]),
        "deq_scale": deq if bf16 else deq.view(torch.int32).to(torch.int64),
    }


@dataclass
class Draft:
    """A folder before it is written: change what you like, then :meth:`write`."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    types: dict[str, Any] = field(default_factory=dict)
    original: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    globals: dict[str, Any] = field(default_factory=dict)
    shards: int = 2
    recipe: str | None = "spec: {process: [{type: linear_quant, qconfig: {weight: {method: minmax}}}]}"

    def add_float(self, name: str, value: Tensor) -> None:
        self.original[name] = value
        self.tensors[name] = value.clone()
        self.types[name] = "FLOAT"

    def add_linear(self, prefix: str, kind: str, weight: Tensor, bias: Tensor | None = None) -> None:
        self.original[f"{prefix}.weight"] = weight
        exact = weight.float()
        scale = exact.abs().amax(1, keepdim=True) / 127
        codes = (exact / scale).round().clamp(-128, 127).to(torch.int8)
        if kind == "W8A8":
            parts = static_parts(codes, scale, bias, bf16=self.config["dtype"] == "bfloat16")
        else:
            parts = {"weight_scale": scale, "weight_offset": torch.zeros_like(scale)}
        for suffix, value in {"weight": codes, **parts}.items():
            self.tensors[f"{prefix}.{suffix}"] = value
            self.types[f"{prefix}.{suffix}"] = kind
        if bias is not None:
            self.original[f"{prefix}.bias"] = bias
            self.tensors[f"{prefix}.bias"] = bias.float()
            self.types[f"{prefix}.bias"] = "FLOAT"

    def rename(self, old: str, new: str) -> None:
        self.tensors[new] = self.tensors.pop(old)
        self.types[new] = self.types.pop(old)

    def drop(self, name: str) -> None:
        del self.tensors[name], self.types[name]

    def set(self, name: str, index: Any, value: float) -> None:
        """Change values of a tensor, or bytes of it where it holds float8."""
        tensor = self.tensors[name].clone()
        (tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor)[index] = value
        self.tensors[name] = tensor

    def retype(self, name: str, dtype: torch.dtype) -> None:
        self.tensors[name] = self.tensors[name].to(dtype)

    def times(self, name: str, factor: float) -> None:
        self.tensors[name] = self.tensors[name] * factor

    def roll(self, name: str) -> None:
        """Every row of a matrix goes one down."""
        stored = self.tensors[name]
        self.tensors[name] = (
            stored.view(torch.uint8).roll(1, 0).view(stored.dtype) if stored.element_size() == 1 else stored.roll(1, 0)
        )

    def relabel(self, prefix: str, kind: str) -> None:
        """A module gets another type in the description."""
        for name in self.types:
            if name.startswith(f"{prefix}.") and not name.endswith(".bias"):
                self.types[name] = kind

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        parts: list[dict[str, Tensor]] = [{} for _ in range(self.shards)]
        for i, (name, tensor) in enumerate(self.tensors.items()):
            parts[i * self.shards // len(self.tensors)][name] = tensor.contiguous().clone()
        placed: dict[str, str] = {}
        for i, part in enumerate(parts, 1):
            file = f"quant_model_weights-{i:05d}-of-{len(parts):05d}.safetensors"
            save_file(part, folder / file)
            placed |= dict.fromkeys(part, file)
        size = sum(tensor.nbytes for tensor in self.tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        (folder / "quant_model_weights.safetensors.index.json").write_text(json.dumps(index))
        (folder / "quant_model_description.json").write_text(json.dumps({**self.types, **self.globals}))
        (folder / "config.json").write_text(json.dumps(self.config))
        (folder / "tokenizer.json").write_text("{}")
        if self.recipe is not None:
            (folder / "tiny_best_practice.yaml").write_text(self.recipe)
        for file in folder.iterdir():
            file.chmod(0o600)
        return folder

    def write_original(self, folder: Path) -> Path:
        folder.mkdir()
        save_file({name: tensor.contiguous() for name, tensor in self.original.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config))
        (folder / "tokenizer.json").write_text("{}")
        return folder


def make_draft(dtype: torch.dtype) -> Draft:
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    draft = Draft()
    draft.config = {
        "dtype": str(dtype).removeprefix("torch."),
        "num_hidden_layers": LAYERS,
        "tie_word_embeddings": True,
    }
    draft.globals = {
        "version": "1.0.0",
        "model_quant_type": "W8A8",
        "metadata": {},
        "group_size": 0,
        "optional": {},
    }
    embedding = random(VOCABULARY, HIDDEN)
    draft.add_float("model.embed_tokens.weight", embedding)
    for i in range(LAYERS):
        block = f"model.layers.{i}"
        draft.add_float(f"{block}.input_layernorm.weight", random(HIDDEN))
        for name, shape in SHAPES.items():
            bias = random(shape[0]) if name == "self_attn.q_proj" else None
            draft.add_linear(f"{block}.{name}", KINDS[name], random(*shape), bias)
    draft.add_float("model.norm.weight", random(HIDDEN))
    draft.add_float("lm_head.weight", embedding)
    del draft.original["lm_head.weight"]
    return draft


@pytest.fixture
def draft() -> Draft:
    """A clean bf16 folder with W8A8, W8A8_DYNAMIC and W8A16 linears, one of them with a bias, and a tied head."""
    return make_draft(torch.bfloat16)


@pytest.fixture
def new_draft() -> Callable[[torch.dtype], Draft]:
    """Clean folders of other dtypes."""
    return make_draft
