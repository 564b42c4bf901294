"""``quarot`` and multi-token prediction: a further layer with its own embedding, head and the join of two states."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from slim_core.evaluation.verify import verify_folder

ModelFolder = Callable[..., Path]
Quantize = Callable[..., Any]
Stranger = Any  # of conftest.py
QUAROT: dict[str, Any] = {"type": "quarot"}


class Drafting(nn.Module):
    """A drafting layer as its family computes it, around a decoder layer of the library."""

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor], prefix: str) -> None:
        super().__init__()
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        self.own = own
        self.block = model.model.layers[-1]  # pyright: ignore
        names = {f"model.layers.2.{name}": tensor for name, tensor in own.items()}
        self.names = names

    @staticmethod
    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    def joined(self, ids: Tensor, state: Tensor) -> Tensor:
        embedded = self.norm(self.own["embed_tokens.weight"][ids], self.own["enorm.weight"])
        both = torch.cat([embedded, self.norm(state, self.own["hnorm.weight"])], -1)
        return both @ self.own["eh_proj.weight"].T

    def logits(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden, self.own["shared_head.norm.weight"]) @ self.own["shared_head.head.weight"].T


def test_a_drafting_layer_is_rotated_with_its_model(
    stranger: Stranger, naive: ModuleType, model_folder: ModelFolder, quantize: Quantize, tmp_path: Path
) -> None:
    """Multi-token prediction: a further layer with its own embedding, head and the join of two states."""
    shutil.copytree(model_folder("deepseek_v3", torch.float32), tmp_path / "model")
    tensors, _ = naive.read_tensors(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    draft = {
        name.replace(".layers.2.", ".layers.3."): tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in tensors.items()
        if ".layers.2." in name
    }
    own = {"embed_tokens": (3072, 32), "eh_proj": (32, 64), "shared_head.head": (3072, 32)}
    draft |= {
        f"model.layers.3.{name}.weight": 0.2 * torch.randn(shape, generator=generator) for name, shape in own.items()
    }
    draft |= {
        f"model.layers.3.{name}.weight": 1 + 0.3 * torch.randn(32, generator=generator)
        for name in ("enorm", "hnorm", "shared_head.norm")
    }
    save_file(tensors | draft, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    result = quantize(tmp_path / "model", tmp_path / "out", process=[QUAROT])
    assert any("model.layers.3, a drafting layer, is rotated by its names" in warning for warning in result.warnings)
    written = naive.read(tmp_path / "out")
    turned = written.tensors
    rotation = load_file(tmp_path / "out" / "optional" / "quarot.safetensors")["global_rotation"]
    state, ids = torch.randn(1, 12, 32, generator=generator), torch.arange(12)[None]
    normed = Drafting.norm(state, torch.ones(32))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    before, after = (Drafting(model, held, "model.layers.3.") for held in (tensors | draft, turned))
    exact = before.joined(ids, normed * tensors["model.norm.weight"])
    found = after.joined(ids, normed @ rotation @ turned["rot.weight"])
    assert stranger.far([exact @ rotation], [found]) < 1e-4
    assert stranger.far([before.logits(exact)], [after.logits(exact @ rotation)]) < 1e-4
    # The block of the layer, run in the place of the last one of the model.
    outputs: list[Tensor] = []
    for held, hidden in ((tensors | draft, exact), (turned, found)):
        swapped = {n.replace(".layers.3.", ".layers.2."): t for n, t in held.items() if ".layers.3." in n}
        folder = tmp_path / f"swapped{len(outputs)}"
        shutil.copytree(tmp_path / "model", folder)
        places = {n: t for n, t in swapped.items() if n in tensors}
        save_file(tensors | places, folder / "model.safetensors", {"format": "pt"})
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            positions = whole.model.rotary_emb(hidden, torch.arange(12)[None])
            outputs.append(whole.model.layers[2](hidden, position_embeddings=positions, attention_mask=None))
    assert stranger.far([outputs[0] @ rotation], [outputs[1]]) < 1e-4
    assert written.description["is_rot_used"] is True
    assert written.place["rot.weight"] == "rot.safetensors"
    index = json.loads((tmp_path / "out" / "quant_model_weights.safetensors.index.json").read_text())
    assert index["weight_map"]["rot.weight"] == "rot.safetensors"
    verification = verify_folder(tmp_path / "out", tmp_path / "model")
    assert verification.ok, verification.text()
