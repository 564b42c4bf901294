"""Models with a layer for multi-token prediction, as the hub holds them, and what must be written of that layer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 16
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
JOIN = ("eh_proj", "enorm", "hnorm", "shared_head.norm", "shared_head.head", "embed_tokens")
# Prefix of the layer, what is inside it besides a block, and what is outside.
NAMES = {
    "deepseek_v3": ("model.layers.3.", JOIN, {}),
    "glm4_moe": ("model.layers.3.", JOIN, {}),
    "qwen3_next": (
        "mtp.layers.0.",
        (),
        {f"mtp.{name}.weight": name for name in ("fc", "norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding")},
    ),
}
# The linears of a block, written down by hand: the others, such as routers, stay as they are.
LINEARS = {
    "deepseek_v3": r"self_attn\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)|mlp\..*(gate|up|down)_proj",
    "glm4_moe": r"self_attn\.[qkvo]_proj|mlp\..*(gate|up|down)_proj",
    "qwen3_next": r"self_attn\.[qkvo]_proj|mlp\..*(gate|up|down)_proj",
}


def copied(folder: Path, path: Path, **changes: Any) -> dict[str, Any]:
    """All of a model but its weights, with changes of ``config.json``; the configuration."""
    path.mkdir()
    for file in folder.iterdir():
        if file.suffix == ".json":
            (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    return config


def published(folder: Path, family: str, path: Path, *, fp8: Any = None) -> dict[str, Tensor]:
    """A model as it is on the hub, with a layer that predicts another token; its tensors in floating point.

    GLM-4.5 has biases in its attention. ``fp8`` of ``naive.py``: linears in blocks of float8.
    """
    config = copied(folder, path, num_nextn_predict_layers=1, **({"quantization_config": FP8} if fp8 else {}))
    generator = torch.Generator().manual_seed(7)
    tensors = load_file(folder / "model.safetensors")
    dtype = tensors["model.embed_tokens.weight"].dtype

    def random(*shape: int) -> Tensor:
        return (0.3 * torch.randn(shape, generator=generator)).to(dtype)

    if family == "glm4_moe":
        config["attention_bias"] = True
        for name, weight in list(tensors.items()):
            if re.search(r"self_attn\.[qkv]_proj\.weight$", name):
                tensors[name.removesuffix("weight") + "bias"] = random(len(weight))
    (path / "config.json").write_text(json.dumps(config))
    prefix, inside, outside = NAMES[family]
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes = {"eh_proj": (hidden, 2 * hidden), "fc": (hidden, 2 * hidden)}
    shapes |= dict.fromkeys(("shared_head.head", "embed_tokens"), (vocabulary, hidden))
    own = {n.replace("model.layers.2.", prefix): t for n, t in tensors.items() if n.startswith("model.layers.2.")}
    own = {n: t + random(*t.shape).to(t.dtype) for n, t in own.items()}
    tensors |= own | {f"{prefix}{name}.weight": random(*shapes.get(name, (hidden,))) for name in inside}
    tensors |= {name: random(*shapes.get(part, (hidden,))) for name, part in outside.items()}
    stored = dict(tensors)
    if fp8:
        for name in [n for n in tensors if is_linear(n) and "eh_proj" not in n]:
            stored[name], stored[f"{name}_scale_inv"] = fp8.encoded(tensors[name])
            tensors[name] = fp8.decoded(stored[name], stored[f"{name}_scale_inv"])
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    return tensors


def is_linear(name: str) -> bool:
    return re.search(r"(_proj|_proj_with_mqa)\.weight$", name) is not None


def quantized_of(family: str, tensors: dict[str, Tensor]) -> list[str]:
    """The linears that a rule for everything quantizes in the drafting layer."""
    pattern = re.compile(re.escape(NAMES[family][0]) + f"({LINEARS[family]})" + r"\.weight")
    found = [name.removesuffix(".weight") for name in tensors if pattern.fullmatch(name)]
    assert len(found) > 10
    return found


def check(written: Any, naive: ModuleType, family: str, tensors: dict[str, Tensor], kind: str = "W8A8_DYNAMIC") -> None:
    """Hold what was written of a drafting layer against minmax of its own tensors; all of the rest must be the same."""
    linears = quantized_of(family, tensors)
    of_layers = ("mtp.", NAMES[family][0])
    held = {name for name in tensors if name.startswith(of_layers)}
    parts = {f"{name}.{part}" for name in linears for part in ("weight", "weight_scale", "weight_offset")}
    assert {name for name in written.tensors if name.startswith(of_layers)} == held | parts
    for name in linears:
        codes, scale, _ = naive.weight_codes(tensors[f"{name}.weight"])
        assert np.array_equal(written.array(f"{name}.weight"), codes), name
        assert np.array_equal(written.array(f"{name}.weight_scale"), scale), name
        assert {written.description[f"{name}.{part}"] for part in ("weight", "weight_scale")} == {kind}
    for name in held - parts:
        given = tensors[name]
        if name.removesuffix(".bias") in linears:
            given = given.float()  # where the format has the bias of a quantized linear
        assert torch.equal(written.tensors[name], given), name
        assert written.description[name] == "FLOAT"
    # Nothing of the checkpoint is missing.
    assert {name for name in tensors if name not in written.tensors} == set()
    assert {name for name in tensors if name not in written.description} == set()
